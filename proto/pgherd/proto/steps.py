"""A wall clock that steps don't move at once. Pure: the clock is given.

A machine's wall clock may jump by years: a dead battery at boot, a resumed virtual machine, a hand at `date -s`. What is
deleted or refused for good by its age must not go by such a clock before a person could notice.
"""

from __future__ import annotations

from pgherd.proto.clock import Clock

TOLERANCE_NS = 3600 * 1_000_000_000  # an hour: no daylight saving in UTC, and no NTP corrects so much unnoticed
FOLLOWED_AFTER_S = 86400.0


class UnsteppedClock:
    """What the wall clock would say had it not stepped by more than an hour.

    Never broken: it goes on as monotonic time does; a step is followed once the wall clock has stood by it for
    `FOLLOWED_AFTER_S`. One thread at a time.
    """

    def __init__(self, clock: Clock, believed_unix_ns: int | None = None) -> None:
        """`believed_unix_ns`: what the time is taken for at the start if the wall clock says something much later."""
        self._clock = clock
        wall_unix_ns, self._anchor_mono_s = clock.wall_unix_ns(), clock.mono_s()
        self._anchor_unix_ns = wall_unix_ns
        if believed_unix_ns is not None and wall_unix_ns > believed_unix_ns + TOLERANCE_NS:
            self._anchor_unix_ns = believed_unix_ns
        self._stepped_mono_s: float | None = None

    def wall_unix_ns(self) -> int:
        """Nanoseconds since the epoch."""
        wall_unix_ns, mono_s = self._clock.wall_unix_ns(), self._clock.mono_s()
        expected_unix_ns = self._anchor_unix_ns + int((mono_s - self._anchor_mono_s) * 1e9)
        if abs(wall_unix_ns - expected_unix_ns) <= TOLERANCE_NS:
            self._stepped_mono_s = None
        elif self._stepped_mono_s is None:
            self._stepped_mono_s = mono_s
            return expected_unix_ns
        elif mono_s - self._stepped_mono_s < FOLLOWED_AFTER_S:
            return expected_unix_ns
        else:
            self._stepped_mono_s = None
        self._anchor_unix_ns, self._anchor_mono_s = wall_unix_ns, mono_s
        return wall_unix_ns

    @property
    def has_stepped(self) -> bool:
        """Whether the wall clock stands elsewhere, as of the last look."""
        return self._stepped_mono_s is not None

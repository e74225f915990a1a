"""When which probe is asked. Pure: the time is an argument.

Never broken: a probe isn't asked more often than its tier's interval, however late a tick comes; a probe that
ran into its statement or lock timeout twice in a row is left alone for longer each time, up to `PAUSE_MAX_S`
(so that its last word is still within the collector's lookback), and asked at its own pace after one answer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Final

from pgherd.agent.probes.catalog import Probe, Tier

PAUSE_MAX_S: Final = 240.0
_GRACE: Final = 0.5  # of the fastest interval: a tick that comes this much early still counts as the due one


class Rhythm:
    """The due times of one node's probes, by monotonic seconds."""

    def __init__(self, intervals_s: Mapping[str, float]) -> None:
        self._intervals_s = intervals_s
        self._grace_s = _GRACE * min(intervals_s.values())
        self._due_mono_s: dict[str, float] = {}
        self._tiers: dict[str, Tier] = {}
        self._timeouts: dict[str, int] = {}  # in a row

    def due(self, probes: Iterable[Probe], now_mono_s: float) -> list[Probe]:
        """The probes to ask now, in the order given."""
        return [probe for probe in probes if now_mono_s >= self._due_mono_s.get(probe.name, 0.0) - self._grace_s]

    def answered(self, probe: Probe, now_mono_s: float) -> None:
        """It gave an answer, or an error that asking again at its own pace can't make worse."""
        self._timeouts.pop(probe.name, None)
        self._due_mono_s[probe.name] = self._next(probe, now_mono_s)

    def timed_out(self, probe: Probe, now_mono_s: float) -> None:
        """It ran into the server's statement or lock timeout."""
        count = self._timeouts[probe.name] = self._timeouts.get(probe.name, 0) + 1
        interval_s = self._intervals_s[probe.tier]
        pause_s = 0.0 if count < 2 else min(PAUSE_MAX_S, 3 * interval_s * 2 ** min(count - 2, 10)) - interval_s
        self._due_mono_s[probe.name] = self._next(probe, now_mono_s) + max(0.0, pause_s)

    def hasten(self, tiers: Collection[Tier]) -> None:
        """These tiers are due at the next tick, paused probes apart."""
        for name, tier in self._tiers.items():
            if tier in tiers and self._timeouts.get(name, 0) < 2:
                self._due_mono_s.pop(name, None)

    def forget(self) -> None:
        """Another server answers there, or the same in another role: everything is due."""
        self._due_mono_s.clear()
        self._timeouts.clear()

    def _next(self, probe: Probe, now_mono_s: float) -> float:
        """One interval after it was due, so that small delays don't add up; never in the past."""
        self._tiers[probe.name] = probe.tier
        interval_s = self._intervals_s[probe.tier]
        due_mono_s = self._due_mono_s.get(probe.name, now_mono_s) + interval_s
        return due_mono_s if due_mono_s > now_mono_s else now_mono_s + interval_s

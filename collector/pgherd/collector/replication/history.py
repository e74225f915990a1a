"""When the primary wrote what: the map from a WAL position to the time at which the primary went beyond it. Pure.

The primary of a cluster is sampled every second. Its positions are kept as steps: it stood at `lsn` from `first_ms` to
`last_ms`, as far as anybody looked. A position between two steps was passed somewhere between them, so every answer is a
bracket, and its half width is the error.

A primary at rest still writes: checkpoints, snapshots for standbys, vacuum's traces. While no transaction finishes there is
nothing to be seen elsewhere, so such WAL doesn't end a step; it moves the step's `high`. What finished is read before what was
flushed, but an asynchronous commit may be flushed a moment later: a step's `lsn` settles for SETTLE_MS.

Never broken:
- steps ascend strictly, in time and in position; a sample that contradicts this is told, not kept;
- what is added late, twice or in any order gives the same map (until thinning made it coarser);
- thinning never widens a bracket beyond SHARE of its age past `fine_ms`, so a lag read from it is off by at most half of
  SHARE of itself; an idle primary costs one step however long it idles;
- at most STEPS_MAX steps are kept; with one sample a second that is never the bound (`fine_ms` is capped).

Source: PostgreSQL docs, "Backup Control Functions" (pg_current_wal_flush_lsn) and "Recovery Information Functions".
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from enum import Enum, auto

SHARE = 0.02
FINE_MAX_MS = 2 * 3600_000  # full resolution is kept for delays up to this: one step a second
KEPT_MS = 7 * 86400_000
STEPS_MAX = 12_000
SETTLE_MS = 1500  # three wal_writer_delays at the default, 600 ms, and the next sample
_THIN_EVERY = 256  # additions between two thinnings


class Added(Enum):
    """What became of a sample."""

    KEPT = auto()
    KNOWN = auto()  # it said nothing new
    CONTRADICTS = auto()  # an older sample that can't be true beside its neighbours (a clock that stepped): not kept
    WENT_BACK = auto()  # newer than all and below them: another past (restored, rewound); not kept


@dataclass(slots=True)
class Step:
    """From `first_ms` to `last_ms` nothing finished that isn't in the WAL up to `lsn`; written was up to `high` in the end."""

    lsn: int
    first_ms: int
    last_ms: int
    high: int
    finished: int | None = None


@dataclass(frozen=True, slots=True)
class Bracket:
    """The primary went beyond a position after `after_ms` and by `by_ms`; None: before anything was seen of it."""

    after_ms: int | None
    by_ms: int

    @property
    def width_ms(self) -> int | None:
        return None if self.after_ms is None else self.by_ms - self.after_ms


class WalHistory:
    """The steps of one primary on one timeline. Times are of one clock, in milliseconds; positions are bytes."""

    def __init__(self) -> None:
        self._steps: list[Step] = []
        self._since_thinned = 0
        self.fine_ms = 0  # the longest recovery_min_apply_delay of a standby, capped: younger steps aren't thinned

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def first(self) -> Step | None:
        """The oldest step."""
        return self._steps[0] if self._steps else None

    @property
    def newest(self) -> Step | None:
        """The latest step."""
        return self._steps[-1] if self._steps else None

    def add(self, at_ms: int, lsn: int, finished: int | None = None) -> Added:
        """Take in that the primary stood at `lsn` at `at_ms`, when `finished` transactions had ended (None: not told)."""
        at = bisect_right(self._steps, at_ms, key=_first_ms)  # the steps before `at` began by then
        before = self._steps[at - 1] if at else None
        behind = self._steps[at] if at < len(self._steps) else None
        if before is not None and before.last_ms >= at_ms:
            return Added.KNOWN if before.lsn <= lsn <= before.high else Added.CONTRADICTS
        if before is not None and lsn < before.high:
            return Added.CONTRADICTS if behind is not None else Added.WENT_BACK
        if behind is not None and lsn > behind.lsn:
            return Added.CONTRADICTS
        if before is not None and (lsn == before.high or (finished is not None and finished == before.finished)):
            before.last_ms, before.high = at_ms, lsn
            if at_ms - before.first_ms <= SETTLE_MS:
                before.lsn = lsn
        elif behind is not None and (lsn == behind.lsn or (finished is not None and finished == behind.finished)):
            behind.first_ms = at_ms
        else:
            self._steps.insert(at, Step(lsn, at_ms, at_ms, lsn, finished))
            self._since_thinned += 1
            if self._since_thinned >= _THIN_EVERY:
                self._thin()
        return Added.KEPT

    def standing_at(self, at_ms: int) -> Step | None:
        """The step at `at_ms`, or the last before it; None: nothing was seen of the primary by then."""
        at = bisect_right(self._steps, at_ms, key=_first_ms)
        return self._steps[at - 1] if at else None

    def passed(self, lsn: int) -> Bracket | None:
        """When the primary went beyond `lsn`; None: it isn't known to have."""
        at = bisect_right(self._steps, lsn, key=_lsn)
        if at == len(self._steps):
            return None
        return Bracket(self._steps[at - 1].last_ms if at else None, self._steps[at].first_ms)

    def _thin(self) -> None:
        self._since_thinned = 0
        now_ms = self._steps[-1].last_ms
        start = bisect_left(self._steps, now_ms - KEPT_MS, key=_last_ms)
        kept = self._steps[start : start + 1]
        for step, following in zip(self._steps[start + 1 :], self._steps[start + 2 :], strict=False):
            age_ms = now_ms - following.first_ms - min(self.fine_ms, FINE_MAX_MS)
            if following.first_ms - kept[-1].last_ms > SHARE * age_ms:
                kept.append(step)
        if len(self._steps) > start + 1:
            kept.append(self._steps[-1])
        self._steps = kept[-STEPS_MAX:]


def _first_ms(step: Step) -> int:
    return step.first_ms


def _last_ms(step: Step) -> int:
    return step.last_ms


def _lsn(step: Step) -> int:
    return step.lsn

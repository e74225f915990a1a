"""How far behind the standbys of one cluster are, and when that can't be known. Pure.

A standby that has replayed up to R at time t is behind if the primary had written more than R by t minus the standby's
recovery_min_apply_delay; it is behind by that moment minus the time at which the primary went beyond R. WAL that no finished
transaction stands behind (a checkpoint's, say) counts in bytes, not in seconds: no reader misses anything. No question is put to
the standby that it answers wrongly while its link is cut, and a cascade is measured against the primary, not against its hop.

Never broken:
- 0 only when the standby had replayed everything that the primary is known to have written by the moment in question, and
  the primary was seen within a second of it or is known not to have written since;
- a value only for a time at which the primary was seen too: its samples reach up to it or beyond;
- with positions fixed the lag grows as time does; a standby that replayed more isn't further behind;
- a value is wrong by at most a second or a tenth of itself; what would be worse isn't a value (unknown: history_gap). To it comes what the clocks differ after correction (half a round trip of the heartbeats);
- several primaries, a silent one, another timeline, a position that the primary never wrote: unknown, never a number;
- unknown carries a proven lower bound where there is one: written WAL that isn't replayed stays written.

All times are the collector's (agents' times plus their measured skew), in milliseconds.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

from pgherd.collector.replication.history import FINE_MAX_MS, Added, WalHistory

SILENT_MS = 15_000  # without a sample for so long: nothing is known of a server
GONE_MS = 60_000  # a primary unseen for so long, with an agent that is silent too: its host is taken to be gone
TAKEOVER_MS = 3_000  # a primary unseen for so long while another is: the other took over (three samples)
AHEAD_MAX_MS = 3_000  # ahead of the primary's samples for longer than samples and clocks explain
ERROR_MAX_S = 1.0
WIDTH_MAX_MS = 2_000  # a bracket this wide is at most a second wrong: one missing sample
DEAF_AFTER_S = 35.0  # wal_receiver_timeout / 2 + 5 s at the default: a live receiver has heard something by then
_PENDING_MAX = 32


# How the shell names a node.
Name: TypeAlias = Hashable


class Reason(StrEnum):
    """Why a lag is unknown; the label `reason`."""

    NO_PRIMARY = "no_primary"  # none was ever seen
    PRIMARY_SILENT = "primary_silent"  # dead, cut off, or its agent is
    SEVERAL_PRIMARIES = "several_primaries"
    STANDBY_SILENT = "standby_silent"
    NO_POSITION = "no_position"  # it has replayed nothing yet, or may not say
    TIMELINE = "timeline"  # it isn't on the primary's timeline: just after a promotion, or it never followed
    AHEAD = "ahead_of_primary"  # it has WAL that the primary never wrote: it diverged
    BEFORE_HISTORY = "before_history"  # behind what the collector has seen of this primary
    HISTORY_GAP = "history_gap"  # the primary wasn't seen at the time in question
    CLOCK_SKEW = "clock_skew"  # the agents' clocks are too far off


@dataclass(frozen=True, slots=True)
class Observation:
    """One tick of one node. Positions in bytes; None: not told. A primary has `written` and `finished`, a standby `replayed`.

    `finished` counts the transactions that wrote and ended, and was read before `written`.
    """

    node: Name
    at_ms: int
    is_replica: bool
    timeline: int | None = None
    written: int | None = None
    finished: int | None = None
    replayed: int | None = None
    delay_s: float = 0.0
    streaming: bool | None = None
    heard_age_s: float | None = None


@dataclass(frozen=True, slots=True)
class Known:
    """At `at_ms` the standby was `seconds` behind (beyond its configured delay) and `wal_bytes` (delay included)."""

    at_ms: int
    seconds: float
    wal_bytes: int


@dataclass(frozen=True, slots=True)
class Unknown:
    """The lag can't be told; if `at_least_s` is set, it is no smaller."""

    reason: Reason
    at_least_s: float | None = None


@dataclass(frozen=True, slots=True)
class Hold:
    """Nothing new was learnt; what was said last stands."""


Verdict: TypeAlias = Known | Unknown | Hold


@dataclass(slots=True)
class _Node:
    is_replica: bool
    since_ms: int  # in this role
    latest: Observation
    timeline: int | None = None  # the highest seen: a standby whose receiver is down tells an older one
    pending: list[Observation] = field(default_factory=list)
    judged_ms: int = -1
    is_lost: bool = False  # its agent said that it can't be asked any more

    def is_heard(self, since_ms: int) -> bool:
        return not self.is_lost and self.latest.at_ms >= since_ms


class ClusterLag:
    """What is known of one cluster. Feed observations, then ask; every question takes the time."""

    def __init__(self) -> None:
        self._nodes: dict[Name, _Node] = {}
        self._history = WalHistory()
        self._writer: Name | None = None
        self._timeline: int | None = None

    # ---- feeding

    def observe(self, seen: Observation) -> None:
        """Take in one tick. A node's ticks that come late fill the history's holes, nothing else."""
        node = self._nodes.get(seen.node)
        if node is None:
            node = self._nodes[seen.node] = _Node(seen.is_replica, seen.at_ms, seen)
        elif seen.at_ms <= node.latest.at_ms:
            self.backfill(seen)
            return
        if seen.is_replica != node.is_replica:
            node.is_replica, node.since_ms = seen.is_replica, seen.at_ms
            node.pending.clear()
        node.latest, node.is_lost = seen, False
        if seen.timeline is not None:
            node.timeline = max(seen.timeline, node.timeline or 0)
        if seen.is_replica:
            node.pending = [*node.pending[1 - _PENDING_MAX :], seen]
            self._history.fine_ms = min(FINE_MAX_MS, max(self._history.fine_ms, int(seen.delay_s * 1000)))
        else:
            self._observe_primary(seen)

    def lose(self, name: Name, at_ms: int) -> None:
        """Its agent said at `at_ms` that the node can't be asked any more."""
        node = self._nodes.get(name)
        if node is not None and at_ms > node.latest.at_ms:
            node.is_lost = True

    def backfill(self, seen: Observation) -> None:
        """A tick of the past: only what it says of the primary's positions is used."""
        writer = self._nodes.get(seen.node) if seen.node == self._writer else None
        if writer is not None and not seen.is_replica and seen.written is not None and seen.at_ms >= writer.since_ms:
            self._history.add(seen.at_ms, seen.written, seen.finished)

    def _observe_primary(self, seen: Observation) -> None:
        if seen.node != self._writer:
            if self._writer is not None and self._writes(self._nodes[self._writer], seen.at_ms - TAKEOVER_MS):
                return  # two of them: `primaries` says so
            self._begin(seen.node)
        elif seen.timeline is not None and self._timeline is not None and seen.timeline != self._timeline:
            self._begin(seen.node)
        self._timeline = seen.timeline if seen.timeline is not None else self._timeline
        if seen.written is not None and self._history.add(seen.at_ms, seen.written, seen.finished) is Added.WENT_BACK:
            self._begin(seen.node)
            self._timeline = seen.timeline
            self._history.add(seen.at_ms, seen.written, seen.finished)

    def _begin(self, writer: Name) -> None:
        """Another past begins here: positions of the former don't say when this one wrote them."""
        fine_ms = self._history.fine_ms
        self._history = WalHistory()
        self._history.fine_ms = fine_ms
        self._writer, self._timeline = writer, None
        for node in self._nodes.values():
            node.pending.clear()

    def remember_standby(self, name: Name, at_ms: int) -> None:
        """What an earlier process knew: the node was a standby at `at_ms`. Ignored if it was seen since."""
        node = self._nodes.get(name)
        if node is None or node.latest.at_ms < at_ms:
            self._nodes[name] = _Node(True, at_ms, Observation(name, at_ms, is_replica=True))

    def forget(self, keep: Iterable[Name]) -> None:
        """Drop every node but `keep`."""
        gone = self._nodes.keys() - set(keep)
        for name in gone:
            del self._nodes[name]
        if self._writer in gone:
            self._writer, self._history = None, WalHistory()

    # ---- asking

    @property
    def primary_seen_ms(self) -> int | None:
        """When the last primary of this cluster was last seen; None: none ever was."""
        return None if self._writer is None else self._nodes[self._writer].latest.at_ms

    def standbys(self) -> list[Name]:
        """Nodes whose last known role is standby: they are expected to follow."""
        return [name for name, node in self._nodes.items() if node.is_replica]

    def primaries(self, now_ms: int) -> int:
        """Reachable nodes that took writes at the same time, as of the last 15 s.

        One that was last seen before another began to be a primary has been followed by it, and doesn't count.
        """
        fresh = [node for node in self._nodes.values() if self._writes(node, now_ms - SILENT_MS)]
        latest_since_ms = max((node.since_ms for node in fresh), default=0)
        return sum(node.latest.at_ms >= latest_since_ms for node in fresh)

    def known_primaries(self, now_ms: int, conditions: Mapping[Name, str | None]) -> int | None:
        """The same, and 0 only when every node last known as primary is known not to take writes; None: it can't be told.

        `conditions` as in `broken`. A server that is down takes none. One that hangs, or that nobody speaks of any more, counts
        as gone after GONE_MS. While its agent says anything else, its samples are merely late, or it may not be asked.
        """
        if count := self.primaries(now_ms):
            return count
        for name, node in self._nodes.items():
            condition = conditions.get(name)
            is_gone = condition in (None, "hung") and now_ms - node.latest.at_ms >= GONE_MS
            if not (node.is_replica or condition == "down" or is_gone):
                return None
        return 0

    @staticmethod
    def _writes(node: _Node, since_ms: int) -> bool:
        return not node.is_replica and node.is_heard(since_ms)

    def judge(self, name: Name, now_ms: int) -> Verdict:
        """How far behind the standby `name` is, by its newest sample that the primary's samples reach."""
        node = self._nodes[name]
        newest = self._history.newest
        if self.primaries(now_ms) > 1:
            return Unknown(Reason.SEVERAL_PRIMARIES)
        if self._writer is None or newest is None:
            return Unknown(Reason.NO_PRIMARY)
        if not node.is_heard(now_ms - SILENT_MS):
            return Unknown(Reason.STANDBY_SILENT)
        if node.latest.replayed is None:
            return Unknown(Reason.NO_POSITION)
        if self._timeline is not None and node.timeline is not None and node.timeline != self._timeline:
            return Unknown(Reason.TIMELINE)
        if not self._writes(self._nodes[self._writer], now_ms - SILENT_MS):
            return Unknown(Reason.PRIMARY_SILENT, self._at_least_s(node.latest))
        reached = [seen for seen in node.pending if self._reaches(seen, node.judged_ms) and seen.replayed is not None]
        explained = [seen for seen in reached if (seen.replayed or 0) <= newest.high]
        if explained:
            verdict = self._measure(explained[-1])
            node.judged_ms = explained[-1].at_ms
            return verdict
        if reached and newest.last_ms - reached[0].at_ms > AHEAD_MAX_MS:
            return Unknown(Reason.AHEAD)
        return Hold()

    def _reaches(self, seen: Observation, judged_ms: int) -> bool:
        """Whether the primary was seen before and after a new sample."""
        first, newest = self._history.first, self._history.newest
        return first is not None and newest is not None and max(judged_ms + 1, first.first_ms) <= seen.at_ms <= newest.last_ms

    def _measure(self, seen: Observation) -> Known | Unknown:
        assert seen.replayed is not None
        due_ms = seen.at_ms - int(seen.delay_s * 1000)
        due, first, here = self._history.standing_at(due_ms), self._history.first, self._history.standing_at(seen.at_ms)
        assert first is not None  # the sample is within the history
        assert here is not None
        if due is None and seen.replayed < first.lsn:
            return Unknown(Reason.BEFORE_HISTORY)
        wal_bytes = max(0, here.high - seen.replayed)
        passed = self._history.passed(seen.replayed)
        if due is None or passed is None or due_ms < (passed.after_ms or 0):
            return Known(seen.at_ms, 0.0, wal_bytes)
        if seen.replayed >= due.lsn:
            # What it lacks was written after the primary's last sample before that moment, or after that moment itself: behind by
            # no more than the time since. 0, or the least that is at most a second wrong when a sample came late or is missing.
            if passed.after_ms is None or due_ms - passed.after_ms > WIDTH_MAX_MS:
                return Unknown(Reason.HISTORY_GAP)
            return Known(seen.at_ms, max(0.0, (due_ms - passed.after_ms) / 1000 - ERROR_MAX_S), wal_bytes)
        at_least_s = max(0.0, (due_ms - passed.by_ms) / 1000)
        if passed.after_ms is None:
            return Unknown(Reason.BEFORE_HISTORY, at_least_s)
        seconds = max(0.001, (due_ms - (passed.after_ms + passed.by_ms) / 2) / 1000)
        if passed.by_ms - passed.after_ms > max(WIDTH_MAX_MS, 200 * seconds):
            return Unknown(Reason.HISTORY_GAP, at_least_s)
        return Known(seen.at_ms, seconds, wal_bytes)

    def _at_least_s(self, seen: Observation) -> float | None:
        """WAL that was seen written and isn't replayed was written then, whatever became of the primary."""
        passed = None if seen.replayed is None else self._history.passed(seen.replayed)
        if passed is None:
            return None
        at_least_s = (seen.at_ms - passed.by_ms) / 1000 - seen.delay_s
        return at_least_s if at_least_s > 0 else None

    def broken(self, name: Name, now_ms: int, condition: str | None, deaf_after_s: float = DEAF_AFTER_S) -> bool | None:
        """Whether an expected standby doesn't stream, idle or not; None: it can't be told.

        `condition` is what its agent says of the server (up, down, hung, saturated …), None while the agent is silent. A
        receiver that has heard nothing for `deaf_after_s` holds a link that is dead and doesn't know.
        """
        latest = self._nodes[name].latest
        if condition is None:
            return None
        if condition in ("down", "hung"):
            return True
        if not self._nodes[name].is_heard(now_ms - SILENT_MS) or latest.streaming is None:
            return None
        return not latest.streaming or (latest.heard_age_s is not None and latest.heard_age_s > deaf_after_s)

"""From successive readings of pg_stat_statements to totals that never go back and the statements worth series. Pure.

Never broken: a total never decreases and never counts a statement twice, whatever is evicted, reset or
hidden; memory is bounded by the reading's own bound; a reading that was cut short counts only statements it
had seen before (one that appears may have been below the cut, with a long life behind it).

What is lost: executions of a statement between its last reading and its eviction, and those before it when a
statement is evicted and comes back with more calls than it had.

Source: PostgreSQL docs "pg_stat_statements" (queryid, userid, dbid, toplevel; dealloc; stats_since on 17+).
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

ENTRIES_MAX: Final = 10_000  # a reading's rows: pg_stat_statements.max is 5 000 unless somebody raised it
_STICKY: Final = 1.5  # who is reported stays unless another took this much more time: series that flap are useless


class Key(NamedTuple):
    """What pg_stat_statements tells apart (top-level and nested executions are added up before)."""

    queryid: int
    database: str
    user: str


class Counts(NamedTuple):
    """Cumulative figures of one statement. Seconds."""

    calls: float
    seconds: float
    rows: float
    block_read_seconds: float
    block_write_seconds: float

    def since(self, before: Counts | None) -> Counts:
        """The growth since `before`; all of it when counting began anew."""
        if before is None or self.calls < before.calls or self.seconds < before.seconds:
            return self
        return Counts(*(max(0.0, now - then) for now, then in zip(self, before, strict=True)))


ZERO: Final = Counts(0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Reading:
    """The outcome of one reading: the statements worth series, by the time they took since the last one."""

    top: Mapping[Key, Counts]
    totals: Mapping[str, Counts]  # by database, accumulated since the agent's start


@dataclass(slots=True)
class _Memory:
    """A reading as numbers side by side: 48 bytes a statement instead of 400."""

    ids: array[int] = field(default_factory=lambda: array("q"))  # hashes of the keys
    figures: array[float] = field(default_factory=lambda: array("d"))

    def add(self, ident: int, counts: Counts) -> None:
        self.ids.append(ident)
        self.figures.extend(counts)

    def at(self, index: int | None) -> Counts | None:
        return None if index is None else Counts(*self.figures[index * _WIDTH : (index + 1) * _WIDTH])


_WIDTH: Final = len(Counts._fields)
_Ranked = tuple[float, float, Key, Counts]


@dataclass(slots=True)
class StatementLedger:
    """Successive readings of one server. `limit`: how many statements may have series of their own."""

    limit: int
    _last: _Memory | None = None
    _totals: dict[str, Counts] = field(default_factory=dict)
    _top: frozenset[Key] = frozenset()

    def read(self, entries: Iterable[tuple[Key, Counts]], *, whole: bool = True) -> Reading:
        """Take a reading, each key once. The first one is only where counting begins; `whole`: no entry was left out."""
        now = _Memory()
        ranked = heapq.nsmallest(self.limit, self._fold(entries, now, whole=whole))
        top = {key: counts for _, _, key, counts in ranked}
        self._last, self._top = now, frozenset(top)
        return Reading(top, self._totals)

    def _fold(self, entries: Iterable[tuple[Key, Counts]], now: _Memory, *, whole: bool) -> Iterator[_Ranked]:
        """Add up what grew, keep it in `now`; ranks: those first that took most time, at the start in all their life."""
        last = self._last
        where = {ident: index for index, ident in enumerate(last.ids)} if last is not None else {}
        for key, counts in entries:
            ident = hash(key)
            now.add(ident, counts)
            total = self._totals.setdefault(key.database, ZERO)
            before = last.at(where.get(ident)) if last is not None else counts
            took_s = 0.0
            if before != counts and (whole or before is not None):
                grown = counts.since(before)
                took_s = grown.seconds
                self._totals[key.database] = Counts(*(a + b for a, b in zip(total, grown, strict=True)))
            yield (-took_s * (_STICKY if key in self._top else 1.0), -counts.seconds, key, counts)

    def forget(self) -> None:
        """Another server answers there: totals go on, its entries are where counting begins anew."""
        self._last = None

    def keep_databases(self, databases: Iterable[str]) -> None:
        """Drop the totals of databases that are gone."""
        wanted = set(databases)
        for name in [name for name in self._totals if name not in wanted]:
            del self._totals[name]

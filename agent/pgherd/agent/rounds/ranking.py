"""Which relations of a database are worth series: those that changed most since the last walk, and the largest. Pure.

Never broken: at most `limit` of a kind are chosen, whatever the database holds; what is remembered between
walks is bounded over all databases (12 bytes a relation); a counter that went back (a reset) counts from 0.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

MEMORY_MAX: Final = 400_000  # relations remembered, all databases of a node together: 4.8 MB
_STICKY: Final = 1.5  # who is reported stays unless another changed this much more: series that flap are useless


class Relation(NamedTuple):
    """A table (parent 0) or an index (parent: its table). `activity` grows with every scan and changed row."""

    oid: int
    activity: int
    pages: int
    parent: int


def parse_relations(text: str | None) -> list[Relation]:
    """Relations from "oid activity pages parent,…", the compact form in which a server lists them. Raises ValueError."""
    return [Relation(*map(int, item.split(" "))) for item in text.split(",")] if text else []


@dataclass(frozen=True, slots=True)
class Choice:
    """The oids to report, in order of rank."""

    tables: list[int]
    indexes: list[int]


@dataclass(slots=True)
class _Memory:
    oids: array[int] = field(default_factory=lambda: array("I"))
    activity: array[float] = field(default_factory=lambda: array("d"))
    chosen: frozenset[int] = frozenset()


class Ranking:
    """Ranks the relations of one node's databases, remembering what they had done at the last walk."""

    def __init__(self, memory_max: int = MEMORY_MAX) -> None:
        self._memory_max = memory_max
        self._memories: dict[int, _Memory] = {}

    @property
    def remembered(self) -> int:
        """Relations remembered now."""
        return sum(len(memory.oids) for memory in self._memories.values())

    def forget(self, database: int) -> None:
        """The database is gone."""
        self._memories.pop(database, None)

    def choose(self, database: int, relations: list[Relation], limit: int) -> Choice:
        """What to report of this database now. A table's activity includes that of its indexes."""
        before = self._memories.pop(database, _Memory())
        done = {relation.oid: float(relation.activity) for relation in relations}
        for relation in relations:
            if relation.parent in done:
                done[relation.parent] += relation.activity
        memory = _Memory(array("I", done), array("d", done.values()))
        last = dict(zip(before.oids, before.activity, strict=True))
        for oid, value in done.items():  # in place: of ten thousand relations one more table is a megabyte
            done[oid] = _change(value, last.get(oid)) * (_STICKY if oid in before.chosen else 1.0)
        del last
        tables = _best((one for one in relations if not one.parent), done, limit)
        indexes = _best((one for one in relations if one.parent), done, limit)
        if self.remembered + len(done) > self._memory_max:
            memory = _Memory()
        memory.chosen = frozenset((*tables, *indexes))
        self._memories[database] = memory
        return Choice(tables, indexes)


def _change(now: float, before: float | None) -> float:
    return now if before is None or now < before else now - before


def _best(relations: Iterable[Relation], change: Mapping[int, float], limit: int) -> list[int]:
    """Half of the places for those that changed most, the rest for the largest."""
    candidates = list(relations)
    moved = sorted((one for one in candidates if change[one.oid] > 0), key=lambda one: (-change[one.oid], one.oid))
    chosen = {one.oid: None for one in moved[: (limit + 1) // 2]}
    for one in sorted(candidates, key=lambda one: (-one.pages, -change[one.oid], one.oid)):
        if len(chosen) >= limit:
            break
        chosen[one.oid] = None
    return list(chosen)

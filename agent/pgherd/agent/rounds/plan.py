"""Which databases a walk visits and how much each may say. Pure.

Never broken: a database that waited longest comes first, so that every walk goes on where the last one
stopped; what all databases say together stays within `series_max`, and none is starved to nothing while
others take more than their reserve.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

SERIES_PER_TABLE: Final = 29  # what rounds.toml makes of one table at most …
SERIES_PER_INDEX: Final = 5  # … and of one index
BASIC: Final = 14  # what is told of every database, however many there are: size, counts, its fullest sequences
OTHERS: Final = 32  # what is told beside tables and indexes where there is room for some: more sequences
SEQUENCES_BASIC: Final = 2
SEQUENCES: Final = 20
_PAIR: Final = SERIES_PER_TABLE + SERIES_PER_INDEX
_RESERVE: Final = OTHERS + 3 * _PAIR  # room that every database keeps, when there is so much for each


@dataclass(frozen=True, slots=True)
class Database:
    """One database as pg_database has it. `activity`: rows touched since the statistics' reset."""

    oid: int
    name: str
    activity: float = 0.0


def visiting_order(databases: Iterable[Database], visited_mono_s: Mapping[int, float]) -> list[Database]:
    """Never visited ones first, the busiest of them before others; then by their last visit."""
    return sorted(databases, key=lambda one: (visited_mono_s.get(one.oid, float("-inf")), -one.activity, one.oid))


def relations_allowed(series_max: int, relations_max: int, databases: int, held_by_others: Mapping[int, int]) -> int:
    """How many tables (and as many indexes) the next database may report; 0 when there is no room for any.

    `held_by_others`: series by database of those that have said something; of `databases` in all. Each
    other database keeps a reserve, also while it hasn't spoken: for a few tables, or, with so many databases that
    not even one table each has room, for what is basic, so that the busiest, who come first, tell more.
    """
    share = series_max // max(1, databases)
    reserve = min(_RESERVE, share) if share >= OTHERS + _PAIR else BASIC
    reserved = sum(max(held, reserve) for held in held_by_others.values())
    reserved += max(0, databases - 1 - len(held_by_others)) * reserve
    free = max(series_max - reserved, reserve) - OTHERS
    return max(0, min(relations_max, free // _PAIR))

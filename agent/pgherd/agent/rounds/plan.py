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
SERIES_PER_INDEX: Final = 5  # … of one index …
_OTHERS: Final = 30  # … and of what isn't about one of them: size, counts, sequences
_PAIR: Final = SERIES_PER_TABLE + SERIES_PER_INDEX
_RESERVE: Final = _OTHERS + 3 * _PAIR  # room that every database keeps, when there is so much for each
_LEAST: Final = _OTHERS + _PAIR  # one table and one index are told whatever the bound says


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
    """How many tables (and as many indexes) the next database may report.

    `held_by_others`: series by database of those that have said something; of `databases` in all. Each
    other database keeps a reserve, also while it hasn't spoken.
    """
    reserve = max(_LEAST, min(_RESERVE, series_max // max(1, databases)))
    reserved = sum(max(held, reserve) for held in held_by_others.values())
    reserved += max(0, databases - 1 - len(held_by_others)) * reserve
    free = max(series_max - reserved, reserve) - _OTHERS
    return max(1, min(relations_max, free // _PAIR))

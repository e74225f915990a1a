"""Which backups may go. Pure.

Properties, for every history whatever its clocks say (tests/property/test_retention.py):
 1. Order is the repository's ordinal within one system identifier; no clock is read. Backups of another
    cluster (a re-initialised or upgraded node) are a lineage of their own and never push out these.
 2. The newest backup of each lineage that reached a grade or better is kept, for every grade from "read
    back" on: the newest verified one is never deleted.
 3. The newest `keep` complete backups of a lineage are kept, and the newest `keep` incomplete ones:
    incomplete backups never push out complete ones.
 4. A backup in use is kept. What can't be read isn't listed here and so isn't touched.
 5. Deleting by a plan and planning again deletes nothing more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pgherd.proto.commands import GRADES


@dataclass(frozen=True, slots=True)
class Item:
    """A published backup as retention sees it."""

    name: str
    system_identifier: str
    ordinal: int
    complete: bool
    grade: str
    in_use: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """Keep or delete one backup, and why."""

    name: str
    keep: bool
    reason: str


def plan(items: Iterable[Item], keep: int) -> tuple[Decision, ...]:
    """One decision per item, newest first within each lineage. `keep` is at least 1."""
    lineages: dict[str, list[Item]] = {}
    for item in items:
        lineages.setdefault(item.system_identifier, []).append(item)
    decisions: list[Decision] = []
    for lineage in sorted(lineages):
        newest_first = sorted(lineages[lineage], key=lambda item: (item.ordinal, item.name), reverse=True)
        decisions += _plan_lineage(newest_first, max(keep, 1))
    return tuple(decisions)


def _plan_lineage(newest_first: Sequence[Item], keep: int) -> list[Decision]:
    proven = _newest_of_each_grade(newest_first)
    counts = {True: 0, False: 0}
    decisions = []
    for item in newest_first:
        counts[item.complete] += 1
        kind = "complete" if item.complete else "incomplete"
        if counts[item.complete] <= keep:
            decisions.append(Decision(item.name, True, f"among the newest {keep} {kind} backups"))
        elif item.name in proven:
            decisions.append(Decision(item.name, True, f"the newest backup that is {proven[item.name]} or better"))
        elif item.in_use:
            decisions.append(Decision(item.name, True, "in use"))
        else:
            decisions.append(Decision(item.name, False, f"{keep} newer {kind} backups are kept"))
    return decisions


def _newest_of_each_grade(newest_first: Sequence[Item]) -> dict[str, str]:
    proven: dict[str, str] = {}
    for rank in range(len(GRADES) - 1, 0, -1):
        for item in newest_first:
            if GRADES.index(item.grade) >= rank:
                proven.setdefault(item.name, GRADES[rank])
                break
    return proven

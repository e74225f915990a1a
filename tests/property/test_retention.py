"""Retention over any history: failovers, re-initialised nodes, failed proofs, incomplete backups."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pgherd.proto.commands import GRADES
from pgherd.storage.retention import Item, plan


@st.composite
def _histories(draw: st.DrawFn) -> list[Item]:
    count = draw(st.integers(0, 25))
    items = []
    for ordinal in draw(st.permutations(range(count))):
        complete = draw(st.booleans())
        items.append(
            Item(
                # names come from a clock: they say nothing about the order
                name=f"{draw(st.integers(0, 99)):02d}-{ordinal}",
                system_identifier=draw(st.sampled_from("AB")),
                ordinal=ordinal,
                complete=complete,
                grade=draw(st.sampled_from(GRADES)) if complete else "unproven",
                in_use=draw(st.integers(0, 5)) == 0,
            )
        )
    return items


@given(_histories(), st.integers(-1, 8))
def test_retention_keeps_its_promises(items: list[Item], keep: int) -> None:
    decisions = {decision.name: decision for decision in plan(items, keep)}
    assert decisions.keys() == {item.name for item in items}
    assert all(decision.reason for decision in decisions.values())
    deleted = [item for item in items if not decisions[item.name].keep]
    left = [item for item in items if decisions[item.name].keep]
    for lineage in "AB":
        mine = [item for item in items if item.system_identifier == lineage]
        for rank in range(1, len(GRADES)):
            proven = [item for item in mine if GRADES.index(item.grade) >= rank]
            if proven:
                assert max(proven, key=lambda item: item.ordinal) in left
    for item in deleted:
        assert not item.in_use
        newer = [
            other
            for other in left
            if other.system_identifier == item.system_identifier
            and other.ordinal > item.ordinal
            and other.complete == item.complete
        ]
        assert len(newer) >= max(keep, 1)
    assert all(decision.keep for decision in plan(left, keep)), "a second pass deletes more"


@given(st.integers(1, 400), st.integers(1, 200))
def test_the_number_is_bounded(count: int, keep: int) -> None:
    items = [Item(f"b{n}", "A", n, True, "read back") for n in range(count)]
    kept = [decision.name for decision in plan(items, keep) if decision.keep]
    assert kept == [f"b{n}" for n in reversed(range(max(0, count - keep), count))]

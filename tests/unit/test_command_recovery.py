"""What a restarted agent does with an accepted command; the whole table. And the clock offset."""

from __future__ import annotations

import itertools

import pytest

from pgherd.agent.command.recovery import Found, Resume, StepKind, resume, step_kind
from pgherd.agent.command.skew import clock_offset_ns
from pgherd.proto.commands import VERB_NAMES


@pytest.mark.parametrize(
    ("kind", "outcome"),
    [
        (StepKind.IDEMPOTENT, Resume.RUN),
        (StepKind.PROBE_THEN_ACT, Resume.RUN),
        (StepKind.STAGED, Resume.INTERRUPTED),
        (StepKind.ONCE, Resume.INDETERMINATE),
    ],
)
def test_a_child_that_died_without_a_result(kind: StepKind, outcome: Resume) -> None:
    assert resume(kind, Found(finished=False, starting=True, child_alive=False, result_present=False)) is outcome


@pytest.mark.parametrize("kind", list(StepKind))
def test_what_is_the_same_for_every_kind(kind: StepKind) -> None:
    for finished, starting, alive, result in itertools.product([False, True], repeat=4):
        way = resume(kind, Found(finished, starting, alive, result))
        if finished:
            assert way is Resume.NOTHING
        elif alive:
            assert way is Resume.ADOPT
        elif result:
            assert way is Resume.REPORT
        elif not starting:
            assert way is Resume.RUN
        else:
            assert way is not Resume.RUN or kind in (StepKind.IDEMPOTENT, StepKind.PROBE_THEN_ACT)


def test_every_verb_has_a_kind() -> None:
    kinds = {name: step_kind(cls()) for cls, name in VERB_NAMES.items()}
    assert {name for name, kind in kinds.items() if kind is StepKind.STAGED} == {"backup.run", "backup.verify", "restore"}
    assert all(isinstance(kind, StepKind) for kind in kinds.values())


@pytest.mark.parametrize(
    ("sent", "received", "answered", "back", "offset", "wire"),
    [
        (100, 110, 110, 120, 0, 20),
        (100, 1110, 1115, 125, 1000, 20),  # theirs is 1000 ahead
        (1000, 110, 112, 1022, -900, 20),
        (100, 105, 205, 210, 0, 10),  # the time they took to answer isn't on the wire
    ],
)
def test_clock_offset(sent: int, received: int, answered: int, back: int, offset: int, wire: int) -> None:
    assert clock_offset_ns(sent, received, answered, back) == (offset, wire)

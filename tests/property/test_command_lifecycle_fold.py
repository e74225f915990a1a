"""The fold of a command's life: order and repetition don't matter, outcomes absorb, no change is off the table."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pgherd.collector.control.lifecycle import (
    TRANSITIONS,
    DeadlinePassed,
    Forgotten,
    Input,
    Life,
    Offered,
    Reported,
    State,
    fold,
    step,
)
from pgherd.proto.commands import Event
from pgherd.proto.errors import TransientError

ID = "5f0c1df0-3b0e-4f42-8d9b-0f8b1a4a7c11"
ERROR = TransientError("command.interrupted", "stopped").as_dict()


@st.composite
def legal_reports(draw: st.DrawFn) -> list[Input]:
    """What one agent may say of one command: accepted, some progress, at most one outcome; or a rejection."""
    if draw(st.booleans()) and draw(st.booleans()):
        return [Reported(Event(ID, 1, 1, "rejected", ERROR))]
    progress = draw(st.integers(0, 4))
    said = [Event(ID, 1, 1, "accepted")]
    said += [Event(ID, 2 + index, 2 + index, "progress", {"done": index}) for index in range(progress)]
    outcome = draw(st.sampled_from(["", "succeeded", "failed", "indeterminate"]))
    if outcome:
        gap = draw(st.integers(0, 3))
        said.append(Event(ID, 2 + progress + gap, 99, outcome, ERROR if outcome != "succeeded" else {"x": 1}))
    return [Reported(event) for event in said]


@st.composite
def arrivals(draw: st.DrawFn) -> tuple[list[Input], list[Input]]:
    """A legal set, and the same with repetitions in any order."""
    inputs = [*draw(legal_reports()), Offered(draw(st.integers(1, 3)))]
    if draw(st.booleans()):
        inputs.append(DeadlinePassed(50))
    repeated = inputs + draw(st.lists(st.sampled_from(inputs), max_size=6))
    return inputs, draw(st.permutations(repeated))


@given(arrivals())
def test_any_order_and_repetition_folds_to_the_same(case: tuple[list[Input], list[Input]]) -> None:
    inputs, arrived = case
    one, other = fold(inputs), fold(arrived)
    assert one.state is other.state
    assert (one.outcome, one.result(), one.error()) == (other.outcome, other.result(), other.error())
    assert one.last_sequence == other.last_sequence or one.outcome is not None


anything = st.one_of(
    st.builds(Offered, st.integers(1, 9)),
    st.builds(DeadlinePassed, st.integers(1, 9)),
    st.builds(Forgotten, st.integers(1, 9)),
    st.builds(
        lambda kind, sequence: Reported(Event(ID, sequence, 1, kind, {} if kind in ("accepted", "progress") else ERROR)),
        st.sampled_from(["accepted", "progress", "rejected", "succeeded", "failed", "indeterminate"]),
        st.integers(1, 6),
    ),
)


@given(st.lists(anything, max_size=12))
def test_outcomes_absorb_and_the_table_is_never_left(inputs: list[Input]) -> None:
    life = Life()
    for given_input in inputs:
        after = step(life, given_input)
        if life.outcome is not None:
            assert after == life
        if after.state is not life.state:
            assert after.state in TRANSITIONS[life.state]
        life = after


@given(st.lists(anything, max_size=12), anything)
def test_repeating_an_input_changes_nothing(inputs: list[Input], again: Input) -> None:
    once = step(fold(inputs), again)
    assert step(once, again) == once


def test_every_row_of_the_table_can_be_reached() -> None:
    reports: list[Input] = [
        Reported(Event(ID, 5, 1, kind, {} if kind in ("accepted", "progress") else ERROR))
        for kind in ("accepted", "progress", "rejected", "succeeded", "failed", "indeterminate")
    ]
    reached: dict[State, set[State]] = {state: set() for state in State}
    lives, seen = [Life()], {repr(Life())}
    while lives:
        life = lives.pop()
        for given_input in (*reports, Offered(1), DeadlinePassed(1), Forgotten(1)):
            after = step(life, given_input)
            if after.state is not life.state:
                reached[life.state].add(after.state)
            key = repr(after)
            if key not in seen:
                seen.add(key)
                lives.append(after)
    assert {state: set(after) for state, after in TRANSITIONS.items()} == reached

"""A command's states, one input at a time."""

from __future__ import annotations

from typing import Any

import pytest

from pgherd.collector.control.lifecycle import DeadlinePassed, Forgotten, Input, Life, Offered, Reported, State, fold
from pgherd.proto.commands import Event
from pgherd.proto.errors import TransientError

ID = "5f0c1df0-3b0e-4f42-8d9b-0f8b1a4a7c11"
ERROR = TransientError("command.interrupted", "stopped").as_dict()


def said(kind: str, sequence: int, **body: Any) -> Reported:
    return Reported(Event(ID, sequence, 1000 + sequence, kind, body))


ACCEPTED, PROGRESS, SUCCEEDED = said("accepted", 1), said("progress", 2, phase="dump"), said("succeeded", 3, x=1)
FAILED = said("failed", 3, **ERROR)


@pytest.mark.parametrize(
    ("inputs", "state", "late"),
    [
        ([], "queued", False),
        ([Offered(1)], "offered", False),
        ([Offered(1), ACCEPTED], "accepted", False),
        ([Offered(1), ACCEPTED, PROGRESS], "running", False),
        ([Offered(1), ACCEPTED, PROGRESS, SUCCEEDED], "succeeded", False),
        ([Offered(1), said("rejected", 1, **ERROR)], "rejected", False),
        ([Offered(1), ACCEPTED, FAILED], "failed", False),
        ([Offered(1), ACCEPTED, said("indeterminate", 2, **ERROR)], "indeterminate", False),
        # A result before its acceptance wins, and what comes after it changes nothing.
        ([Offered(1), SUCCEEDED, ACCEPTED, PROGRESS], "succeeded", False),
        ([Offered(1), SUCCEEDED, FAILED, DeadlinePassed(9), Forgotten(9)], "succeeded", False),
        # Silence: the collector's conclusion, which yields to what the agent reports.
        ([DeadlinePassed(9)], "expired", False),
        ([Offered(1), DeadlinePassed(9)], "expired", False),
        ([Offered(1), DeadlinePassed(9), ACCEPTED], "accepted", True),
        ([Offered(1), DeadlinePassed(9), SUCCEEDED], "succeeded", True),
        ([Offered(1), ACCEPTED, DeadlinePassed(9)], "accepted", False),
        ([Offered(1), ACCEPTED, Forgotten(9)], "indeterminate", False),
        ([Offered(1), ACCEPTED, Forgotten(9), SUCCEEDED], "succeeded", False),
        ([Offered(1), ACCEPTED, Forgotten(9), PROGRESS], "indeterminate", False),
    ],
)
def test_state_after_inputs(inputs: list[Input], state: str, late: bool) -> None:
    life = fold(inputs)
    assert life.state is State(state)
    assert life.late is late


def test_result_and_error_are_what_the_agent_said() -> None:
    assert fold([ACCEPTED, SUCCEEDED]).result() == {"x": 1}
    assert fold([ACCEPTED, SUCCEEDED]).error() is None
    assert fold([ACCEPTED, FAILED]).error() == ERROR
    assert fold([ACCEPTED, FAILED]).result() is None


def test_expiry_says_whether_the_agent_may_have_it() -> None:
    never, maybe = fold([DeadlinePassed(9)]).error(), fold([Offered(1), DeadlinePassed(9)]).error()
    assert never is not None
    assert maybe is not None
    assert "no agent" in never["message"]
    assert "hasn't answered" in maybe["message"]
    assert never["code"] == maybe["code"] == "command.expired"


def test_finish_time_is_of_whoever_ended_it() -> None:
    assert fold([ACCEPTED, SUCCEEDED]).finished_unix_ns == 1003
    assert fold([DeadlinePassed(77)]).finished_unix_ns == 77
    assert fold([ACCEPTED, Forgotten(88)]).finished_unix_ns == 88
    assert fold([ACCEPTED, PROGRESS]).finished_unix_ns is None
    assert Life().last_sequence == 0
    assert fold([ACCEPTED, PROGRESS]).last_sequence == 2

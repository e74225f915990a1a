"""Which requests become commands, which commands go out, and what a reconnect means."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgherd.collector.control.admission import OPEN_PER_NODE_MAX, OpenCommand, Request, admit, offerable, reconcile
from pgherd.collector.control.lifecycle import OPEN_STATES, State
from pgherd.proto.commands import BackupRun, Diagnostics, Ping, Restore, Verb, is_exclusive
from pgherd.proto.errors import PreconditionError


def command(seq: int, verb: Verb, state: State, node: str = "n1") -> OpenCommand:
    return OpenCommand(f"c{seq}", seq, node, verb, state)


def test_a_new_request_becomes_a_command() -> None:
    assert admit(Request("n1", Ping()), None, 0) is None


def test_a_key_names_its_first_command_for_ever() -> None:
    request = Request("n1", BackupRun())
    assert admit(request, ("c1", request), OPEN_PER_NODE_MAX + 5) == "c1"


@pytest.mark.parametrize("before", [Request("n2", BackupRun()), Request("n1", Ping()), Request("n1", Restore("b"))])
def test_a_key_used_for_something_else_is_refused(before: Request) -> None:
    with pytest.raises(PreconditionError) as caught:
        admit(Request("n1", BackupRun()), ("c1", before), 0)
    assert caught.value.code == "command.conflict"


def test_a_node_has_a_bound_of_open_commands() -> None:
    with pytest.raises(PreconditionError):
        admit(Request("n1", Ping()), None, OPEN_PER_NODE_MAX)


def test_exclusive_commands_go_out_one_at_a_time_in_order() -> None:
    queue = [command(3, Restore(), State.QUEUED), command(2, BackupRun(), State.QUEUED), command(4, Ping(), State.QUEUED)]
    assert offerable(queue) == ["c2", "c4"]
    assert offerable([command(1, BackupRun(), State.RUNNING), *queue]) == ["c4"]
    assert offerable([command(1, BackupRun(), State.RUNNING, node="other"), *queue]) == ["c2", "c4"]


def test_reconnect_sorts_every_command() -> None:
    ledger = [
        command(1, BackupRun(), State.RUNNING),
        command(2, Ping(), State.OFFERED),
        command(3, Ping(), State.ACCEPTED),
        command(4, BackupRun(), State.QUEUED),
        command(5, Ping(), State.OFFERED),
    ]
    found = reconcile(ledger, {"c1": 3, "c5": 1, "old": 2, "strange": 1}, frozenset({"old"}))
    assert found.offer == ("c2",)
    assert found.await_report == ("c1", "c5", "old")
    assert found.forgotten == ("c3",)
    assert found.unknown == ("strange",)


verbs: st.SearchStrategy[Verb] = st.sampled_from([Ping(), BackupRun(), Restore(), Diagnostics()])
ledgers = st.lists(
    st.tuples(
        verbs,
        st.sampled_from(sorted(OPEN_STATES)),
        st.sampled_from(["n1", "n2"]),
    ),
    max_size=8,
).map(lambda rows: [command(index, verb, state, node) for index, (verb, state, node) in enumerate(rows)])


@given(ledgers, st.dictionaries(st.sampled_from([*(f"c{n}" for n in range(8)), "x", "y"]), st.integers(1, 5)))
def test_reconciling_never_offers_what_was_accepted_and_names_each_once(
    ledger: list[OpenCommand], listed: dict[str, int]
) -> None:
    found = reconcile(ledger, listed)
    named = [*found.offer, *found.await_report, *found.forgotten, *found.unknown]
    assert len(named) == len(set(named))
    states = {one.id: one.state for one in ledger}
    assert all(states[one] in (State.QUEUED, State.OFFERED) and one not in listed for one in found.offer)
    assert set(listed) <= set(named)
    assert {one.id for one in ledger if one.state in (State.ACCEPTED, State.RUNNING)} <= set(named)


@given(ledgers)
def test_a_node_is_never_told_two_exclusive_commands(ledger: list[OpenCommand]) -> None:
    out = set(offerable(ledger))
    for node in ("n1", "n2"):
        busy = [
            one
            for one in ledger
            if one.node_id == node
            and is_exclusive(one.verb)
            and (one.id in out or one.state in (State.ACCEPTED, State.RUNNING))
        ]
        told = [one for one in busy if one.id in out]
        assert len(told) <= 1
        assert not told or told[0] == min(
            (one for one in ledger if one.node_id == node and is_exclusive(one.verb)), key=lambda c: c.seq
        )

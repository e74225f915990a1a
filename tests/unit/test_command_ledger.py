"""The ledger, one call at a time: what is kept, what is repeated, who is meant by a name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from pgherd.collector.control.herd import Herd
from pgherd.collector.control.ledger import AUDIT_KEPT_NS, COMMANDS_KEPT_NS, Ledger
from pgherd.collector.control.views import Views
from pgherd.proto.commands import BackupRun, Event, Ping
from pgherd.proto.errors import ConfigError, PeerError, PreconditionError
from pgherd.storage.control.schema import agents, audit
from pgherd.storage.control.store import ControlStore
from support.control import ManualClock, add_node, enrol


class World:
    """A ledger with one agent and its node."""

    def __init__(self, store: ControlStore) -> None:
        self.store = store
        self.clock = ManualClock()
        self.ledger = Ledger(store, self.clock)
        self.views = Views(store, Herd(store, self.clock, heartbeat_interval_s=5))
        self.agent = enrol(store)
        self.node = add_node(store, self.agent)

    def issue(self, **options: Any) -> str:
        return self.ledger.submit(self.node, BackupRun(), actor="uid:root", via="test", **options).command_id


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    store = ControlStore.open(tmp_path / "control.db")
    yield World(store)
    store.close()


def progress(command_id: str, sequence: int) -> Event:
    return Event(command_id, sequence, sequence, "progress", {"phase": "dump", "done": sequence, "total": 9, "unit": "bytes"})


def test_late_and_repeated_progress_takes_nothing_back(world: World) -> None:
    command_id = world.issue()
    assert world.ledger.record(world.agent, progress(command_id, 5)).changed
    assert not world.ledger.record(world.agent, progress(command_id, 5)).changed
    assert not world.ledger.record(world.agent, progress(command_id, 3)).changed
    assert world.views.command(command_id)["progress"]["done"] == 5
    assert world.ledger.record(world.agent, progress(command_id, 7)).changed
    assert [event["sequence"] for event in world.views.events(command_id)] == [7]


def test_an_event_is_kept_once(world: World) -> None:
    command_id = world.issue()
    accepted = Event(command_id, 1, 1, "accepted")
    assert world.ledger.record(world.agent, accepted).changed
    assert not world.ledger.record(world.agent, accepted).changed
    assert len(world.views.events(command_id)) == 1


def test_what_was_handed_out_is_there_after_a_restart(world: World) -> None:
    command_id = world.issue(idempotency_key="k")
    world.store.close()
    store = ControlStore.open(world.store.path)
    again = Ledger(store, world.clock).submit(world.node, BackupRun(), actor="uid:root", via="test", idempotency_key="k")
    store.close()
    assert (again.command_id, again.created) == (command_id, False)


def test_the_offer_says_what_is_left_of_the_deadline(world: World) -> None:
    world.issue(accept_within_s=60)
    world.clock.advance(45)
    assert [offer.accept_within_ms for offer in world.ledger.take_offers(world.agent)] == [15_000]
    world.clock.advance(-3600)  # a wall clock that steps back gives no more time than there ever was
    assert [offer.accept_within_ms for offer in world.ledger.take_offers(world.agent)] == [60_000]


def test_what_is_over_is_neither_offered_nor_forgotten_about(world: World) -> None:
    command_id = world.issue(accept_within_s=10)
    assert world.ledger.next_deadline_unix_ns() == world.clock.unix_ns + 10_000_000_000
    world.clock.advance(10)
    assert world.ledger.take_offers(world.agent) == []
    assert world.ledger.expire_due() == [command_id]
    assert world.ledger.expire_due() == []
    assert world.ledger.next_deadline_unix_ns() is None


@pytest.mark.parametrize("seconds", [0.0, -1.0, 1e9])
def test_a_deadline_has_bounds(world: World, seconds: float) -> None:
    with pytest.raises(ConfigError):
        world.issue(accept_within_s=seconds)


@pytest.mark.parametrize("sequence", [0, 2**31, 2**32 - 1])
def test_a_sequence_out_of_range_is_refused(world: World, sequence: int) -> None:
    with pytest.raises(PeerError):
        world.ledger.record(world.agent, Event(world.issue(), sequence, 1, "accepted"))


def test_what_ended_long_ago_is_forgotten_and_nothing_else(world: World) -> None:
    ended, open_still = world.issue(), world.issue()
    world.ledger.record(world.agent, Event(ended, 1, 1, "failed", {"code": "x", "message": "m"}))  # by a clock of 1970
    world.ledger.record(world.agent, Event(open_still, 1, 1, "accepted"))
    late = world.issue()
    world.clock.advance(COMMANDS_KEPT_NS / 1e9 - 1)
    world.ledger.record(world.agent, Event(late, 1, 1, "failed", {"code": "x", "message": "m"}))
    assert world.ledger.prune() == 0
    world.clock.advance(2)
    assert world.ledger.prune() == 1
    with pytest.raises(PreconditionError):
        world.views.command(ended)
    assert [world.views.command(one)["state"] for one in (open_still, late)] == ["accepted", "failed"]
    with world.store.read() as connection:
        kept = connection.execute(select(func.count()).select_from(audit)).scalar_one()
    world.clock.advance((AUDIT_KEPT_NS - COMMANDS_KEPT_NS) / 1e9)
    assert world.ledger.prune(limit=2) == 3  # the late command, and two rows of the audit
    world.ledger.prune()
    with world.store.read() as connection:
        left = connection.execute(select(audit.c.action)).scalars().all()
    assert 0 < len(left) < kept  # what happened on the last day, above all
    assert world.views.command(open_still)["open"]


def test_an_agent_can_t_fill_the_ledger_with_one_command(world: World) -> None:
    command_id = world.issue()
    for sequence in range(1, 33):
        world.ledger.record(world.agent, Event(command_id, sequence, 1, "accepted"))
    with pytest.raises(PeerError):
        world.ledger.record(world.agent, Event(command_id, 33, 1, "accepted"))
    assert not world.ledger.record(world.agent, Event(command_id, 32, 1, "accepted")).changed  # a repeat is no event more
    with pytest.raises(PeerError):
        world.ledger.record(world.agent, Event(world.issue(), 1, 1, "failed", {"code": "x", "message": "m" * 300_000}))
    assert len(world.views.events(command_id)) == 32


def test_a_result_of_another_verb_is_refused_and_nothing_of_it_kept(world: World) -> None:
    command_id = world.issue()  # backup.run
    with pytest.raises(PeerError):
        world.ledger.record(world.agent, Event(command_id, 1, 1, "succeeded", {"agent_unix_ns": 5}))
    assert world.views.events(command_id) == []
    assert world.views.command(command_id)["state"] == "queued"


def test_who_is_meant_by_a_name(world: World) -> None:
    assert world.views.node("n1")["id"] == world.views.node("c1/n1")["id"] == world.views.node(world.node)["id"] == world.node
    with pytest.raises(PreconditionError) as missing:
        world.views.node("c2/n1")
    assert missing.value.code == "node.not_found"
    other = enrol(world.store, "agent-b")
    later = add_node(world.store, other)
    with pytest.raises(ConfigError) as ambiguous:
        world.ledger.submit("n1", Ping(), actor="t", via="t")
    assert later in str(ambiguous.value.hint)
    with world.store.begin() as connection:  # the host was set up anew: the old agent is revoked
        connection.execute(agents.update().where(agents.c.id == world.agent).values(status="revoked"))
    assert world.views.node("n1")["id"] == later

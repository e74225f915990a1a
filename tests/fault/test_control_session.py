"""The control session at its edges: foreign identities, repeated and late events, second sessions, lost journals."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import grpc
import pytest
from sqlalchemy import select

from pgherd.collector.ingest.admit import Said
from pgherd.proto.commands import BackupRun, Event, Offer, Ping, Restore
from pgherd.proto.control.v1 import control_pb2 as pb
from pgherd.proto.errors import PreconditionError, TransientError
from pgherd.storage.control.schema import agents, audit, nodes
from support.control import Plane, Puppet, add_node, control_plane, enrol, puppet, until, wire_node

pytestmark = pytest.mark.fault

BACKUP = {
    "name": "b1", "node_id": "", "system_identifier": "7", "started_unix_ns": 1, "finished_unix_ns": 2,
    "stored_bytes": 3, "databases": ["app"], "complete": True, "warnings": [], "grade": "read back",
}  # fmt: skip
FAILED = TransientError("command.interrupted", "stopped").as_dict()


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


def audited(plane: Plane) -> list[str]:
    with plane.store.read() as connection:
        return [row.action for row in connection.execute(select(audit).order_by(audit.c.id))]


def state(plane: Plane, command_id: str) -> str:
    return str(plane.views.command(command_id)["state"])


async def offered(plane: Plane, node: str, verb: Any, **options: Any) -> str:
    return (await plane.dispatcher.submit(node, verb, actor="uid:root", via="test", **options)).command_id


def said(command_id: str, sequence: int, kind: str, verb: Any = None, body: Any = None) -> pb.CommandEvent:
    return Event(command_id, sequence, 5, kind, body or {}).to_wire(verb or Ping())


def test_an_offer_goes_out_and_events_are_acknowledged(tmp_path: Path) -> None:
    async def story() -> None:
        async with control_plane(tmp_path) as plane:
            agent = enrol(plane.store)
            node = str(uuid.uuid4())
            async with puppet(plane.target, agent) as link:
                await link.begin([wire_node(node, role=pb.ROLE_PRIMARY, condition=pb.CONDITION_UP, server_version_num=170004)])
                command_id = await offered(plane, "c1/n1", BackupRun())
                await until(lambda: link.offers, "the offer")
                assert Offer.from_wire(link.offers[0]).verb == BackupRun()
                assert Offer.from_wire(link.offers[0]).actor == "uid:root"
                for wire in (
                    said(command_id, 1, "accepted"),
                    said(command_id, 2, "progress", body={"phase": "dump", "done": 5, "total": 9, "unit": "bytes"}),
                    said(command_id, 3, "succeeded", BackupRun(), BACKUP),
                ):
                    await link.event(wire)
                await until(lambda: len(link.acks) == 3, "three acks")
                assert state(plane, command_id) == "succeeded"
                assert [row["name"] for row in plane.views.backups().items] == ["b1"]
                shown = plane.views.node("n1")
                assert (shown["condition"], shown["role"], shown["server_version_num"]) == ("up", "primary", 170004)

    run(story())


@pytest.mark.parametrize("order", [(3, 1, 2, 2, 1, 3), (2, 2, 3, 1), (1, 3, 2)])
def test_repeated_late_and_reordered_events_come_to_the_same(tmp_path: Path, order: tuple[int, ...]) -> None:
    async def story() -> None:
        async with control_plane(tmp_path) as plane:
            agent = enrol(plane.store)
            node = add_node(plane.store, agent)
            async with puppet(plane.target, agent) as link:
                await link.begin([wire_node(node)])
                command_id = await offered(plane, node, BackupRun())
                await until(lambda: link.offers, "the offer")
                events = {
                    1: said(command_id, 1, "accepted"),
                    2: said(command_id, 2, "progress", body={"phase": "dump", "done": 5, "total": 9, "unit": "bytes"}),
                    3: said(command_id, 3, "succeeded", BackupRun(), BACKUP),
                }
                for number in order:
                    await link.event(events[number])
                await until(lambda: len(link.acks) == len(order), "an ack for each, repeated or not")
                shown = plane.views.command(command_id)
                assert (shown["state"], shown["result"]["name"]) == ("succeeded", "b1")
                assert audited(plane).count("command.finished") == 1

    run(story())


def test_a_result_after_the_deadline_is_kept_and_called_late(tmp_path: Path) -> None:
    async def story() -> None:
        async with control_plane(tmp_path) as plane:
            agent = enrol(plane.store)
            node = add_node(plane.store, agent)
            command_id = await offered(plane, node, Ping(), accept_within_s=0.05)
            await until(lambda: state(plane, command_id) == "expired", "the expiry")
            async with puppet(plane.target, agent) as link:
                await link.begin([wire_node(node)], {command_id: 2})
                await link.event(said(command_id, 2, "succeeded", Ping(), {"agent_unix_ns": 4}))
                await until(lambda: link.acks, "the ack")
                shown = plane.views.command(command_id)
                assert (shown["state"], shown["late"], shown["result"]) == ("succeeded", True, {"agent_unix_ns": 4})
                assert not link.offers, "what expired isn't offered"

    run(story())


def test_a_hello_of_another_agent_is_refused(tmp_path: Path) -> None:
    async def story() -> None:
        async with control_plane(tmp_path) as plane:
            mine, other = enrol(plane.store), enrol(plane.store, "agent-b")
            async with puppet(plane.target, mine) as link:
                await link.hello(agent_id=other)
                code, details = await link.ended()
            assert code is grpc.StatusCode.PERMISSION_DENIED
            assert details.startswith("identity.mismatch")
            assert plane.service.live_sessions == 0

    run(story())


def test_events_of_another_agents_command_are_refused_and_audited(tmp_path: Path) -> None:
    async def story() -> None:
        async with control_plane(tmp_path) as plane:
            owner, thief = enrol(plane.store), enrol(plane.store, "agent-b")
            node = add_node(plane.store, owner)
            command_id = await offered(plane, node, Ping())
            async with puppet(plane.target, thief) as link:
                await link.begin()
                await link.event(said(command_id, 1, "succeeded", Ping(), {"agent_unix_ns": 1}))
                code, details = await link.ended()
                assert not link.acks
            assert code is grpc.StatusCode.PERMISSION_DENIED
            assert details.startswith("identity.mismatch")
            assert state(plane, command_id) == "queued"
            assert "command.foreign_event" in audited(plane)
            async with puppet(plane.target, thief) as link:
                await link.hello(unfinished={command_id: 1})
                assert (await link.ended())[0] is grpc.StatusCode.PERMISSION_DENIED

    run(story())


def test_a_node_of_another_agent_cannot_be_claimed_unless_that_is_revoked(tmp_path: Path) -> None:
    async def story() -> None:
        async with control_plane(tmp_path) as plane:
            owner, other = enrol(plane.store), enrol(plane.store, "agent-b")
            node = add_node(plane.store, owner)
            async with puppet(plane.target, other) as link:
                await link.hello([wire_node(node)])
                assert (await link.ended())[0] is grpc.StatusCode.PERMISSION_DENIED
            async with puppet(plane.target, other) as link:  # nor later, in a heartbeat
                await link.begin()
                await link.send(pb.AgentMessage(heartbeat=pb.Heartbeat(sent_unix_ns=1, nodes=[wire_node(node)])))
                assert (await link.ended())[0] is grpc.StatusCode.PERMISSION_DENIED
            assert audited(plane).count("node.claim_refused") == 2
            with plane.store.begin() as connection:
                connection.execute(agents.update().where(agents.c.id == owner).values(status="revoked"))
            async with puppet(plane.target, other) as link:
                await link.begin([wire_node(node)])
            with plane.store.read() as connection:
                assert connection.execute(select(nodes.c.agent_id).where(nodes.c.id == node)).scalar() == other
            assert "node.taken_over" in audited(plane)

    run(story())


def test_names_of_another_agents_node_cannot_be_claimed_until_that_is_revoked(tmp_path: Path) -> None:
    """Who reports as c1/n1 is c1/n1 to every rule, whatever its node id: also while that agent is silent."""

    async def story() -> None:
        async with control_plane(tmp_path) as plane:
            owner, other = enrol(plane.store), enrol(plane.store, "agent-b")
            db, mine, herd = str(uuid.uuid4()), str(uuid.uuid4()), plane.dispatcher.herd
            true = Said(db, "c1", "n1", "n1:5432")

            async def refused(link: Puppet) -> None:
                code, details = await link.ended()
                assert code is grpc.StatusCode.PERMISSION_DENIED
                assert f"agents revoke {owner}" in details

            async with puppet(plane.target, owner) as owners_link:
                await owners_link.begin([wire_node(db)])
                for claimed in (wire_node(mine, instance="x:1"), wire_node(mine, "n2", instance="n1:5432")):
                    async with puppet(plane.target, other) as link:
                        await link.hello([claimed])
                        await refused(link)
                async with puppet(plane.target, other) as link:  # nor by a heartbeat, once the session has begun
                    await link.begin([wire_node(mine, "n2")])
                    await link.send(pb.AgentMessage(heartbeat=pb.Heartbeat(sent_unix_ns=1, nodes=[wire_node(mine)])))
                    await refused(link)
                assert herd.owns(owner, true)
                assert herd.owns(owner, Said(db, "c1", "former", "former:5432")), "an earlier name, still in the spool"
                assert herd.owns(other, Said(mine, "c1", "n2", "n2:5432"))
                assert herd.owns(other, Said("", instance="host-b"))
                for lie in (
                    true,
                    Said(mine, "c1", "n1", "n2:5432"),
                    Said(mine, "c1", "n2", "n1:5432"),
                    Said("", "c1", "", "n1:5432"),
                ):
                    assert not herd.owns(other, lie), lie
            async with puppet(plane.target, other) as link:  # its owner is silent, not gone
                await link.hello([wire_node(mine)])
                await refused(link)
            assert audited(plane).count("node.claim_refused") == 4
            with plane.store.begin() as connection:
                connection.execute(agents.update().where(agents.c.id == owner).values(status="revoked"))
            async with puppet(plane.target, other) as link:
                await link.begin([wire_node(mine)])
                assert herd.owns(other, Said(mine, "c1", "n1", "n1:5432"))

    run(story())


def test_a_name_that_its_agent_gave_up_is_free(tmp_path: Path) -> None:
    """A server moves from one agent's configuration to another's, or is renamed, and both agents live on."""

    async def story() -> None:
        async with control_plane(tmp_path) as plane:
            former, other = enrol(plane.store), enrol(plane.store, "agent-b")
            kept, moved, renamed = (str(uuid.uuid4()) for _ in range(3))
            async with puppet(plane.target, former) as link:
                await link.begin([wire_node(kept), wire_node(moved, "n2"), wire_node(renamed, "n3")])
            async with puppet(plane.target, former) as link:
                await link.begin([wire_node(kept), wire_node(renamed, "n4")])
                async with puppet(plane.target, other) as newer:
                    await newer.begin([wire_node(str(uuid.uuid4()), "n2"), wire_node(str(uuid.uuid4()), "n3")])
                assert not plane.dispatcher.herd.owns(former, Said(renamed, "c1", "n3", "n3:5432"))

    run(story())


def test_the_newest_session_of_an_agent_wins(tmp_path: Path) -> None:
    async def story() -> None:
        async with control_plane(tmp_path, heartbeat_interval_s=30) as plane:
            agent = enrol(plane.store)
            node = add_node(plane.store, agent)
            async with puppet(plane.target, agent) as first, puppet(plane.target, agent) as second:
                await first.begin([wire_node(node)])
                await second.begin([wire_node(node)])
                assert (await first.ended())[0] is grpc.StatusCode.UNAVAILABLE
                await offered(plane, node, Ping())
                await until(lambda: second.offers, "the offer on the newer session")
                assert not first.offers
                assert plane.service.live_sessions == 1
                assert "agent.session_replaced" in audited(plane)

    run(story())


def test_an_offer_that_was_lost_is_made_again(tmp_path: Path) -> None:
    async def story() -> None:
        async with control_plane(tmp_path) as plane:
            agent = enrol(plane.store)
            node = add_node(plane.store, agent)
            async with puppet(plane.target, agent) as link:
                await link.begin([wire_node(node)])
                command_id = await offered(plane, node, Ping())
                await until(lambda: link.offers, "the offer")
            assert state(plane, command_id) == "offered", "a lost stream says nothing about a command"
            async with puppet(plane.target, agent) as link:  # it never journalled the offer
                await link.begin([wire_node(node)])
                await until(lambda: link.offers, "the offer again")
                assert link.offers[0].command_id == command_id
            async with puppet(plane.target, agent) as link:  # now it did
                await link.begin([wire_node(node)], {command_id: 1})
                other = await offered(plane, node, Ping())
                await until(lambda: link.offers, "the next offer")
                assert [one.command_id for one in link.offers] == [other]

    run(story())


def test_a_lost_journal_leaves_the_command_indeterminate(tmp_path: Path) -> None:
    async def story() -> None:
        async with control_plane(tmp_path) as plane:
            agent = enrol(plane.store)
            node = add_node(plane.store, agent)
            async with puppet(plane.target, agent) as link:
                await link.begin([wire_node(node)])
                command_id = await offered(plane, node, BackupRun())
                await link.event(said(command_id, 1, "accepted"))
                await until(lambda: link.acks, "the ack")
            async with puppet(plane.target, agent) as link:
                await link.begin([wire_node(node)])
                assert state(plane, command_id) == "indeterminate"
                assert plane.views.command(command_id)["error"]["code"] == "command.indeterminate"
                assert not link.offers, "it isn't run a second time"

    run(story())


def test_events_of_unknown_commands_are_kept_and_acknowledged(tmp_path: Path) -> None:
    async def story() -> None:
        async with control_plane(tmp_path) as plane:
            agent = enrol(plane.store)
            async with puppet(plane.target, agent) as link:
                lost = str(uuid.uuid4())
                await link.begin([], {lost: 2})
                await link.event(said(lost, 2, "failed", Ping(), FAILED))
                await until(lambda: link.acks == [(lost, 2)], "the ack")
                assert "command.unknown_event" in audited(plane)

    run(story())


def test_a_command_of_the_agents_own_schedule_enters_the_ledger(tmp_path: Path) -> None:
    async def story() -> None:
        async with control_plane(tmp_path) as plane:
            agent, other = enrol(plane.store), enrol(plane.store, "agent-b")
            node, foreign = add_node(plane.store, agent), add_node(plane.store, other, "n2")
            async with puppet(plane.target, agent) as link:
                await link.begin([wire_node(node)])
                for target in (node, foreign):
                    own = Offer(str(uuid.uuid4()), target, BackupRun(), 7, 1000, "schedule")
                    await link.event(said(own.command_id, 1, "accepted", body={"issued_here": own.to_json()}))
                    await link.event(said(own.command_id, 2, "succeeded", BackupRun(), BACKUP))
                await until(lambda: len(link.acks) == 4, "the acks")
                shown = plane.views.commands().items
                assert [(one["node"], one["state"], one["via"], one["actor"]) for one in shown] == [
                    ("n1", "succeeded", "schedule", f"agent:{agent}")
                ]
                assert [(row["node"], row["name"]) for row in plane.views.backups().items] == [("n1", "b1")]

    run(story())


def test_exclusive_commands_follow_each_other(tmp_path: Path) -> None:
    async def story() -> None:
        async with control_plane(tmp_path) as plane:
            agent = enrol(plane.store)
            node = add_node(plane.store, agent)
            async with puppet(plane.target, agent) as link:
                await link.begin([wire_node(node)])
                first, second = await offered(plane, node, BackupRun()), await offered(plane, node, Restore())
                third = await offered(plane, node, Ping())
                await until(lambda: len(link.offers) == 2, "two offers")
                assert [one.command_id for one in link.offers] == [first, third]
                await link.event(said(first, 1, "rejected", body=PreconditionError("command.expired", "no").as_dict()))
                await until(lambda: len(link.offers) == 3, "the third offer")
                assert link.offers[2].command_id == second

    run(story())


def test_a_silent_agent_is_unknown_and_its_session_ends(tmp_path: Path) -> None:
    async def story() -> None:
        async with control_plane(tmp_path, heartbeat_interval_s=0.1) as plane:
            agent = enrol(plane.store)
            node = add_node(plane.store, agent)
            async with puppet(plane.target, agent) as link:
                await link.begin([wire_node(node, condition=pb.CONDITION_UP, role=pb.ROLE_PRIMARY)])
                await link.send(
                    pb.AgentMessage(heartbeat=pb.Heartbeat(sent_unix_ns=1, nodes=[wire_node(node, condition=pb.CONDITION_UP)]))
                )
                await until(lambda: link.beats == 1, "the heartbeat's ack")
                assert plane.views.node(node)["condition"] == "up"
                code, _ = await link.ended()
                assert code is grpc.StatusCode.UNAVAILABLE
            shown = plane.views.node(node)
            assert (shown["condition"], shown["role"]) == ("unknown", "unknown")
            assert plane.views.agents().items[0]["connected"] is False
            plane.herd.flush()
            assert plane.views.node(node)["last_condition"] == "up"

    run(story())


@pytest.mark.parametrize(
    "message",
    [
        pb.AgentMessage(heartbeat=pb.Heartbeat(sent_unix_ns=1)),
        pb.AgentMessage(hello=pb.Hello(agent_id="", protocol_version=0)),
        pb.AgentMessage(),
    ],
)
def test_a_session_that_does_not_begin_with_a_good_hello_is_refused(tmp_path: Path, message: pb.AgentMessage) -> None:
    async def story() -> None:
        async with control_plane(tmp_path) as plane:
            agent = enrol(plane.store)
            if message.WhichOneof("message") == "hello":
                message.hello.agent_id = agent
            async with puppet(plane.target, agent) as link:
                await link.send(message)
                code, details = await link.ended()
                assert code is grpc.StatusCode.INVALID_ARGUMENT
                assert details.startswith("peer.protocol")

    run(story())


def test_an_event_nobody_knows_ends_the_session_unacknowledged(tmp_path: Path) -> None:
    async def story() -> None:
        async with control_plane(tmp_path) as plane:
            agent = enrol(plane.store)
            async with puppet(plane.target, agent) as link:
                await link.begin()
                await link.event(pb.CommandEvent(command_id=str(uuid.uuid4()), sequence=1))
                assert (await link.ended())[0] is grpc.StatusCode.INVALID_ARGUMENT
                assert not link.acks

    run(story())

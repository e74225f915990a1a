"""The agent's session against collectors that go mute, lie, speak a newer language or have no room."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from pgherd.agent.command.child import child_alive
from pgherd.agent.command.disabled import DisabledCommands
from pgherd.agent.command.executor import ExecutorSettings
from pgherd.agent.command.outlet import Outlet
from pgherd.agent.command.policy import Policy
from pgherd.agent.command.session import ControlClient, SessionSettings, SpoolState
from pgherd.proto.commands import BackupRun, Event, Offer, Ping, Restore
from pgherd.proto.control.v1 import control_pb2 as pb
from pgherd.proto.control.v1 import control_pb2_grpc
from pgherd.proto.errors import IntegrityError
from pgherd.runtime.clock import SystemClock
from support.control import until
from support.tiny_agent import AgentParts, build, running

pytestmark = pytest.mark.fault

NODE = "5f0c1df0-3b0e-4f42-8d9b-0f8b1a4a7c11"
AGENT = "0c0c1df0-3b0e-4f42-8d9b-0f8b1a4a7c22"


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


class Script(control_pb2_grpc.ControlServicer):
    """A collector that does what the test says. Events are acknowledged only while `acking`."""

    def __init__(self) -> None:
        self.hellos: list[pb.Hello] = []
        self.beats: list[pb.Heartbeat] = []
        self.events: list[Event] = []
        self.offers: list[pb.CommandOffer] = []  # made at the beginning of every session
        self.acking = True
        self.mute = False
        self.ahead_ns = 0
        self.refuse: grpc.StatusCode | None = None

    async def Session(self, requests: Any, context: Any) -> None:  # noqa: N802 - gRPC's name
        async for message in requests:
            match message.WhichOneof("message"):
                case "hello":
                    self.hellos.append(message.hello)
                    if self.refuse is not None:
                        await context.abort(self.refuse, "identity.revoked: no")
                    await context.write(pb.CollectorMessage(welcome=pb.Welcome(heartbeat_interval_ms=100, protocol_version=1)))
                    for offer in self.offers:
                        await context.write(pb.CollectorMessage(command_offer=offer))
                case "heartbeat":
                    self.beats.append(message.heartbeat)
                    if not self.mute:
                        now = SystemClock().wall_unix_ns() + self.ahead_ns
                        ack = pb.HeartbeatAck(
                            heartbeat_sent_unix_ns=message.heartbeat.sent_unix_ns, received_unix_ns=now, sent_unix_ns=now
                        )
                        await context.write(pb.CollectorMessage(heartbeat_ack=ack))
                case "command_event":
                    event = Event.from_wire(message.command_event)
                    self.events.append(event)
                    if self.acking:
                        taken = pb.CommandEventAck(command_id=event.command_id, sequence=event.sequence)
                        await context.write(pb.CollectorMessage(command_event_ack=taken))

    def of(self, command_id: str) -> list[str]:
        return [event.kind for event in self.events if event.command_id == command_id and event.kind != "progress"]


@contextlib.asynccontextmanager
async def scripted(directory: Path) -> AsyncIterator[tuple[Script, str]]:
    script = Script()
    server = grpc.aio.server()
    control_pb2_grpc.add_ControlServicer_to_server(script, server)  # type: ignore[no-untyped-call]
    target = f"unix:{directory / 'script.sock'}"
    server.add_insecure_port(target)
    await server.start()
    try:
        yield script, target
    finally:
        await server.stop(None)


def offer(verb: Any, within_ms: int = 20_000, node: str = NODE, epoch: int = 0) -> Offer:
    return Offer(str(uuid.uuid4()), node, verb, 1, within_ms, "uid:root", epoch)


def agent(directory: Path, target: str, settings: ExecutorSettings | None = None) -> AgentParts:
    return build(directory, AGENT, NODE, target, settings=settings)


def executed(directory: Path) -> list[str]:
    """A line of each child that ever ran."""
    file = directory / "executions"
    return file.read_text().splitlines() if file.exists() else []


def test_hello_heartbeats_and_skew(tmp_path: Path) -> None:
    async def story() -> None:
        async with scripted(tmp_path) as (script, target):
            script.ahead_ns = 7_000_000_000
            async with running(agent(tmp_path, target)) as parts:
                await until(lambda: [beat for beat in script.beats if beat.HasField("skew_ns")], "a measured skew")
                assert script.hellos[0].agent_id == AGENT
                assert script.hellos[0].nodes[0].alias == "n1"
                assert "ping" in script.hellos[0].verbs_allowed
                assert "diagnostics" not in script.hellos[0].verbs_allowed
                beat = script.beats[-1]
                assert abs(beat.skew_ns - 7_000_000_000) <= beat.round_trip_ns + 1_000_000
                assert parts.client.connected

    run(story())


def test_a_mute_collector_is_left_and_dialled_again(tmp_path: Path) -> None:
    async def story() -> None:
        async with scripted(tmp_path) as (script, target):
            script.mute = True
            async with running(agent(tmp_path, target)):
                await until(lambda: len(script.hellos) >= 2, "a second hello")

    run(story())


def test_a_renewed_identity_is_dialled_with_at_once(tmp_path: Path) -> None:
    async def story() -> None:
        async with scripted(tmp_path) as (script, target), running(agent(tmp_path, target)) as parts:
            await until(lambda: script.beats, "a heartbeat")
            parts.mark[0] = 2
            await until(lambda: len(script.hellos) == 2, "the second hello")
            await until(lambda: len(script.beats) >= 4, "more heartbeats")
            assert len(script.hellos) == 2

    run(story())


def test_a_refused_agent_goes_on_trying_and_comes_back(tmp_path: Path) -> None:
    async def story() -> None:
        async with scripted(tmp_path) as (script, target):
            script.refuse = grpc.StatusCode.UNAUTHENTICATED
            async with running(agent(tmp_path, target)) as parts:
                await until(lambda: len(script.hellos) >= 2, "a second try")
                assert not parts.client.connected
                script.refuse = None
                await until(lambda: parts.client.connected, "the session")

    run(story())


def test_an_offer_made_twice_is_executed_once(tmp_path: Path) -> None:
    async def story() -> None:
        async with scripted(tmp_path) as (script, target):
            given = offer(BackupRun())
            script.offers = [given.to_wire(), given.to_wire()]
            (tmp_path / "go").touch()
            async with running(agent(tmp_path, target)) as parts:
                await until(lambda: "succeeded" in script.of(given.command_id), "the result")
                parts.mark[0] = 2  # and the next session offers it twice more
                await until(lambda: len(script.hellos) == 2, "the second hello")
                await until(lambda: len(script.beats) >= 4, "some time")
            assert script.of(given.command_id) == ["accepted", "succeeded"]
            assert len(executed(tmp_path)) == 1

    run(story())


def test_events_are_repeated_until_they_are_acknowledged(tmp_path: Path) -> None:
    async def story() -> None:
        async with scripted(tmp_path) as (script, target):
            given = offer(Ping())
            script.offers, script.acking = [given.to_wire()], False
            async with running(agent(tmp_path, target)) as parts:
                await until(lambda: len(script.events) == 2, "both events")
                parts.mark[0] = 2
                await until(lambda: len(script.events) == 4, "both again")
                listed = {one.command_id: one.last_sequence for one in script.hellos[1].unfinished}
                assert listed == {given.command_id: script.events[1].sequence}
                assert [event.sequence for event in script.events[:2]] == [event.sequence for event in script.events[2:]]
                script.acking = True
                parts.mark[0] = 3
                await until(lambda: not parts.journal.unacknowledged(), "the acknowledgements")
                parts.mark[0] = 4
                await until(lambda: len(script.hellos) == 4, "the fourth hello")
                assert not script.hellos[3].unfinished

    run(story())


@pytest.mark.parametrize(
    ("given", "code"),
    [
        (offer(Ping(), within_ms=0), "command.expired"),
        (offer(Ping(), node=str(uuid.uuid4())), "node.not_found"),
        (offer(Restore("b", "drills", "x")), "restore.outside_roots"),
    ],
)
def test_offers_that_are_refused(tmp_path: Path, given: Offer, code: str) -> None:
    async def story() -> None:
        async with scripted(tmp_path) as (script, target):
            script.offers = [given.to_wire()]
            async with running(agent(tmp_path, target)):
                await until(lambda: script.of(given.command_id), "the answer")
            assert script.of(given.command_id) == ["rejected"]
            assert script.events[0].body["code"] == code

    run(story())


def test_a_verb_of_a_newer_collector_is_refused_as_unsupported(tmp_path: Path) -> None:
    async def story() -> None:
        async with scripted(tmp_path) as (script, target):
            newer = pb.CommandOffer(command_id=str(uuid.uuid4()), node_id=NODE, accept_within_ms=1000)
            hostile = Offer(str(uuid.uuid4()), NODE, Restore("b", "r", "n"), 1, 1000, "x").to_wire()
            hostile.restore.new_directory.name = "../../etc"
            script.offers = [newer, hostile, pb.CommandOffer(command_id="../../etc/passwd")]
            async with running(agent(tmp_path, target)):
                await until(lambda: len(script.events) == 2, "two refusals")
            assert {event.body["code"] for event in script.events} == {"command.unsupported", "usage.invalid"}
            assert not [child for child in (tmp_path / "commands").iterdir() if child.is_dir()]

    run(story())


def test_an_epoch_smaller_than_one_seen_is_refused_after_a_restart_too(tmp_path: Path) -> None:
    async def story() -> None:
        async with scripted(tmp_path) as (script, target):
            newer, older = offer(Ping(), epoch=9), offer(Ping(), epoch=8)
            script.offers = [newer.to_wire()]
            async with running(agent(tmp_path, target)):
                await until(lambda: "succeeded" in script.of(newer.command_id), "the first answer")
            script.offers = [older.to_wire()]
            async with running(agent(tmp_path, target)):
                await until(lambda: script.of(older.command_id), "the second answer")
            assert script.of(older.command_id) == ["rejected"]
            assert script.events[-1].body["code"] == "command.stale_epoch"

    run(story())


def test_a_node_runs_one_exclusive_command_and_keeps_a_bounded_queue(tmp_path: Path) -> None:
    async def story() -> None:
        async with scripted(tmp_path) as (script, target):
            given = [offer(BackupRun()) for _ in range(4)]
            ping = offer(Ping())
            script.offers = [one.to_wire() for one in (*given, ping)]
            settings = ExecutorSettings(poll_interval_s=0.02, waiting_max=2, stop_grace_s=0.5)
            async with running(agent(tmp_path, target, settings)) as parts:
                await until(lambda: "succeeded" in script.of(ping.command_id), "the ping, beside the backup")
                await until(lambda: all(script.of(one.command_id) for one in given), "an answer to each")
                kinds = [script.of(one.command_id) for one in given]
                assert kinds.count(["rejected"]) in (1, 2), "one or two, depending on whether the first had left the queue"
                assert kinds[:2] == [["accepted"], ["accepted"]]
                await until(lambda: executed(tmp_path), "the first child")
                assert len(executed(tmp_path)) == 1
                (tmp_path / "go").touch()
                accepted = [one for one, kind in zip(given, kinds, strict=True) if kind == ["accepted"]]
                await until(lambda: all("succeeded" in script.of(one.command_id) for one in accepted), "the others")
                assert parts.executor.running == 0

    run(story())


def test_a_command_that_the_agent_issues_itself_is_announced(tmp_path: Path) -> None:
    async def story() -> None:
        async with scripted(tmp_path) as (script, target), running(agent(tmp_path, target)) as parts:
            (tmp_path / "go").touch()
            command_id = await parts.executor.issue(NODE, BackupRun(), by="schedule")
            outcome = await parts.executor.wait(command_id)
            assert outcome is not None
            assert outcome.kind == "succeeded"
            await until(lambda: script.of(command_id) == ["accepted", "succeeded"], "the announcement")
            announced = next(event for event in script.events if event.kind == "accepted").body["issued_here"]
            assert (announced["verb"], announced["node_id"], announced["actor"]) == ("backup.run", NODE, "schedule")

    run(story())


def test_a_command_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    async def story() -> None:
        async with scripted(tmp_path) as (script, target):
            given = offer(BackupRun())
            script.offers = [given.to_wire()]
            settings = ExecutorSettings(poll_interval_s=0.02, run_timeout_s=0.2, stop_grace_s=0.2)
            async with running(agent(tmp_path, target, settings)):
                await until(lambda: "failed" in script.of(given.command_id), "the end")
            assert script.events[-1].body["code"] == "child.timeout"

    run(story())


def test_an_offer_that_cannot_be_journalled_is_neither_accepted_nor_run(tmp_path: Path) -> None:
    async def story() -> None:
        async with scripted(tmp_path) as (script, target), running(agent(tmp_path, target)) as parts:
            given = offer(Ping())
            in_the_way = tmp_path / "commands" / given.command_id
            in_the_way.write_text("")
            await parts.executor.receive(given, time.monotonic())
            assert parts.journal.entry(given.command_id) is None
            assert script.of(given.command_id) == []
            in_the_way.unlink()
            await parts.executor.receive(given, time.monotonic())  # offered again, with room
            await until(lambda: "succeeded" in script.of(given.command_id), "the answer")

    run(story())


def test_an_outcome_waits_until_it_can_be_journalled(tmp_path: Path) -> None:
    async def story() -> None:
        async with scripted(tmp_path) as (script, target), running(agent(tmp_path, target)) as parts:
            given = offer(BackupRun())
            await parts.executor.receive(given, time.monotonic())
            await until(lambda: executed(tmp_path), "the child")
            directory = tmp_path / "commands" / given.command_id
            await until(lambda: "child" in (directory / "journal.jsonl").read_text(), "the note of the child")
            (directory / "journal.jsonl").rename(directory / "aside")
            (directory / "journal.jsonl").mkdir()
            (tmp_path / "go").touch()
            await until((directory / "result.json").exists, "the result")
            await until(lambda: not child_alive(directory), "the child's end")
            beats = len(script.beats)
            await until(lambda: len(script.beats) >= beats + 3, "some time")
            entry = parts.journal.entry(given.command_id)
            assert entry is not None
            assert entry.outcome is None
            (directory / "journal.jsonl").rmdir()
            (directory / "aside").rename(directory / "journal.jsonl")
            await until(lambda: "succeeded" in script.of(given.command_id), "the outcome")

    run(story())


def test_commands_that_are_disabled_are_refused_by_name_on_a_living_session(tmp_path: Path) -> None:
    """The collector keeps waiting for what is in the journal that can't be read, and offers in vain."""
    left = "11111111-3b0e-4f42-8d9b-0f8b1a4a7c11"
    (tmp_path / "commands" / left).mkdir(parents=True)
    (tmp_path / "commands" / ".lock").touch()

    async def story() -> None:
        async with scripted(tmp_path) as (script, target):
            given = offer(Ping())
            script.offers = [given.to_wire()]
            clock, outlet = SystemClock(), Outlet()
            reason = IntegrityError("format.newer", "a newer journal")
            disabled = DisabledCommands(reason, tmp_path / "commands", outlet, clock)
            client = ControlClient(
                settings=SessionSettings(AGENT, "test", "host", backoff_s_min=0.05, backoff_s_max=0.2),
                dial=lambda: grpc.aio.insecure_channel(target),
                identity_mark=lambda: 1,
                nodes=list,
                spool=lambda: SpoolState(0, 0),
                policy=Policy(frozenset()),
                journal=disabled,
                executor=disabled,
                outlet=outlet,
                clock=clock,
            )
            session = asyncio.create_task(client.run())
            try:
                await until(lambda: script.of(given.command_id), "an answer to the offer")
                await until(lambda: len(script.beats) > 2, "heartbeats")
            finally:
                session.cancel()
                await asyncio.gather(session, return_exceptions=True)
            (event,) = script.events
            assert (event.kind, event.body["code"]) == ("rejected", "format.newer")
            assert len(script.hellos) == 1
            assert [one.command_id for one in script.hellos[0].unfinished] == [left]
            assert list(script.hellos[0].verbs_allowed) == []

    run(story())

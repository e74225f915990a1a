"""kill -9 of the agent or the collector at every point of a command: one outcome, never two executions."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from pgherd.collector.control.herd import Herd
from pgherd.collector.control.ledger import Ledger
from pgherd.collector.control.views import Views
from pgherd.proto.commands import FINAL_EVENTS, BackupRun, Diagnostics, Verb
from pgherd.runtime.clock import SystemClock
from pgherd.storage.control.schema import command_events
from pgherd.storage.control.store import ControlStore
from support.control import Caller, Plane, add_node, control_plane, enrol, until
from support.tiny_agent import AgentParts, build, running
from support.waiting import wait_until

pytestmark = pytest.mark.fault

TESTS = Path(__file__).resolve().parent.parent


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 90))


@contextmanager
def process(script: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """One of the tiny processes; gone when the block is left."""
    environment = os.environ | {"PYTHONPATH": str(TESTS), "GRPC_ENABLE_FORK_SUPPORT": "0"}
    argv = [sys.executable, str(TESTS / "support" / script), *arguments]
    with subprocess.Popen(argv, env=environment, stderr=subprocess.DEVNULL) as child:
        try:
            yield child
        finally:
            child.kill()


@dataclass
class World:
    """One agent's files, as the test sees them."""

    directory: Path
    agent: str
    node: str
    target: str

    def agent_process(self, crash: str = "") -> Any:
        return process("tiny_agent.py", str(self.directory), self.agent, self.node, self.target, crash)

    def agent_here(self) -> AbstractAsyncContextManager[AgentParts]:
        """The same agent in this process; it is stopped in order when the block is left."""
        return running(build(self.directory, self.agent, self.node, self.target))

    def executions(self) -> list[tuple[str, int]]:
        """(command id, pid) of every child that ever ran."""
        file = self.directory / "executions"
        lines = file.read_text().splitlines() if file.exists() else []
        return [(line.split()[0], int(line.split()[1])) for line in lines]

    def let_go(self) -> None:
        (self.directory / "go").touch()

    def journalled(self, command_id: str) -> list[str]:
        """Kinds of the events in the agent's journal."""
        file = self.directory / "commands" / command_id / "journal.jsonl"
        if not file.exists():
            return []
        records = [json.loads(line)["record"] for line in file.read_text().splitlines() if line.endswith("}")]
        return [record["kind"] for record in records if record["type"] == "event"]


def world_of(directory: Path, store: ControlStore) -> World:
    agent = enrol(store)
    return World(directory, agent, add_node(store, agent), f"unix:{directory / 'grpc.sock'}")


def outcome(plane: Plane, command_id: str) -> dict[str, Any]:
    """The command, if it is over."""
    shown = plane.views.command(command_id)
    return {} if shown["open"] else shown


def finals(store: ControlStore, command_id: str) -> list[str]:
    with store.read() as connection:
        kinds = [
            row.kind for row in connection.execute(select(command_events).where(command_events.c.command_id == command_id))
        ]
    return [kind for kind in kinds if kind in FINAL_EVENTS]


def one_outcome(world: World, store: ControlStore, command_id: str, *, executions: int) -> None:
    assert len(finals(store, command_id)) == 1
    assert [one for one, _ in world.executions()] == [command_id] * executions
    assert len([kind for kind in world.journalled(command_id) if kind in FINAL_EVENTS]) == 1


async def issue(plane: Plane, world: World, verb: Verb | None = None) -> str:
    submitted = await plane.dispatcher.submit(world.node, verb or BackupRun(), actor="uid:root", via="test")
    return submitted.command_id


async def gone(child: subprocess.Popen[bytes]) -> None:
    await until(lambda: child.poll() is not None, "the agent's death")
    assert child.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("point", "state", "executions"),
    [
        ("before-accept", "succeeded", 1),  # nothing was promised: offered again
        ("after-accept", "succeeded", 1),  # promised and never started: started now
        ("before-spawn", "failed", 0),  # may have started: a backup is staged, so it is interrupted
    ],
)
def test_an_agent_killed_at_a_point(tmp_path: Path, point: str, state: str, executions: int) -> None:
    async def story() -> None:
        async with control_plane(tmp_path, peer=lambda _: Caller(world.agent), store=store) as plane:
            command_id = await issue(plane, world)
            world.let_go()
            with world.agent_process(point) as agent:
                await gone(agent)
            assert plane.views.command(command_id)["open"]
            with world.agent_process():
                shown = await until(lambda: outcome(plane, command_id), "the outcome")
            assert shown["state"] == state
            assert state == "succeeded" or shown["error"]["code"] == "command.interrupted"
            one_outcome(world, store, command_id, executions=executions)

    store = ControlStore.open(tmp_path / "control.db")
    world = world_of(tmp_path, store)
    run(story())
    store.close()


@pytest.mark.parametrize("meanwhile", ["child lives on", "child ends", "child dies"])
def test_an_agent_killed_while_its_child_runs(tmp_path: Path, meanwhile: str) -> None:
    async def story() -> None:
        async with control_plane(tmp_path, peer=lambda _: Caller(world.agent), store=store) as plane:
            command_id = await issue(plane, world)
            with world.agent_process() as agent:
                await until(world.executions, "the child")
                await until(lambda: plane.views.command(command_id)["state"] == "running", "progress at the collector")
                agent.kill()
                await gone(agent)
            (_, child_pid), *_ = world.executions()
            os.kill(child_pid, 0)  # it outlived its agent
            await until(lambda: not plane.service.live_sessions, "the end of the old session")
            result_file = world.directory / "commands" / command_id / "result.json"
            if meanwhile == "child ends":
                world.let_go()
                await until(result_file.exists, "the result")
            elif meanwhile == "child dies":
                os.kill(child_pid, signal.SIGKILL)
            with world.agent_process():
                if meanwhile == "child lives on":
                    seen = plane.views.command(command_id)["progress"]
                    assert seen == {"phase": "waiting", "done": 1, "total": 2, "unit": "steps"}
                    await until(
                        lambda: plane.service.live_sessions, "the session of the new agent, which has looked around by then"
                    )
                    assert plane.views.command(command_id)["open"]
                    world.let_go()
                shown = await until(lambda: outcome(plane, command_id), "the outcome")
            if meanwhile == "child dies":
                assert (shown["state"], shown["error"]["code"]) == ("failed", "command.interrupted")
            else:
                assert (shown["state"], shown["result"]["name"]) == ("succeeded", "b1")
            one_outcome(world, store, command_id, executions=1)

    store = ControlStore.open(tmp_path / "control.db")
    world = world_of(tmp_path, store)
    run(story())
    store.close()


def test_an_agent_killed_between_result_and_acknowledgement(tmp_path: Path) -> None:
    async def begin() -> str:
        async with control_plane(tmp_path, peer=lambda _: Caller(world.agent), store=store) as plane:
            command_id = await issue(plane, world)
            await until(lambda: plane.views.command(command_id)["state"] == "running", "progress at the collector")
            return command_id

    async def finish() -> None:
        async with control_plane(tmp_path, peer=lambda _: Caller(world.agent), store=store) as plane:
            with world.agent_process():
                shown = await until(lambda: outcome(plane, command_id), "the outcome")
            assert shown["state"] == "succeeded"

    store = ControlStore.open(tmp_path / "control.db")
    world = world_of(tmp_path, store)
    with world.agent_process() as agent:
        command_id = asyncio.run(begin())
        world.let_go()  # the collector is gone; the agent finishes alone
        wait_until(lambda: "succeeded" in world.journalled(command_id), what="the journalled result")
        agent.kill()
    assert finals(store, command_id) == []
    run(finish())
    one_outcome(world, store, command_id, executions=1)
    store.close()


def test_a_collector_killed_while_a_command_runs(tmp_path: Path) -> None:
    store = ControlStore.open(tmp_path / "control.db")
    world = world_of(tmp_path, store)
    clock = SystemClock()
    views = Views(store, Herd(store, clock, heartbeat_interval_s=1))
    command_id = Ledger(store, clock).submit(world.node, BackupRun(), actor="uid:root", via="test").command_id
    with world.agent_process():
        with process("tiny_collector.py", str(tmp_path), world.agent) as collector:
            wait_until(lambda: views.command(command_id)["state"] == "running", 30, "progress at the collector")
            collector.kill()
            collector.wait()
        world.let_go()
        wait_until(lambda: "succeeded" in world.journalled(command_id), what="the journalled result")
        assert views.command(command_id)["state"] == "running"
        with process("tiny_collector.py", str(tmp_path), world.agent):
            wait_until(lambda: not views.command(command_id)["open"], 30, "the outcome")
    assert views.command(command_id)["state"] == "succeeded"
    one_outcome(world, store, command_id, executions=1)
    store.close()


@pytest.mark.parametrize(
    ("mode", "code"),
    [("error", "postgres.unreachable"), ("vanish", "child.failed"), ("die", "child.failed")],
)
def test_a_child_that_fails(tmp_path: Path, mode: str, code: str) -> None:
    async def story() -> None:
        async with control_plane(tmp_path, peer=lambda _: Caller(world.agent), store=store) as plane:
            command_id = await issue(plane, world)
            async with world.agent_here():
                shown = await until(lambda: outcome(plane, command_id), "the outcome")
            assert (shown["state"], shown["error"]["code"]) == ("failed", code)
            assert "hunter2" not in json.dumps(shown)
            if mode == "vanish":
                assert "something went wrong" in shown["error"]["context"]["stderr"]
            one_outcome(world, store, command_id, executions=1)

    store = ControlStore.open(tmp_path / "control.db")
    world = world_of(tmp_path, store)
    (tmp_path / "mode").write_text(mode)
    world.let_go()
    run(story())
    store.close()


@pytest.mark.parametrize("mode", ["result", "stubborn"])
def test_an_agent_that_is_stopped_ends_its_children(tmp_path: Path, mode: str) -> None:
    async def story() -> None:
        async with control_plane(tmp_path, peer=lambda _: Caller(world.agent), store=store) as plane:
            command_id = await issue(plane, world)
            async with world.agent_here():
                await until(lambda: plane.views.command(command_id)["state"] == "running", "progress at the collector")
            (_, child_pid), *_ = world.executions()
            with pytest.raises(ProcessLookupError):
                os.kill(child_pid, 0)
            assert world.journalled(command_id) == ["accepted", "failed"]
            async with world.agent_here():
                shown = await until(lambda: outcome(plane, command_id), "the outcome")
            assert (shown["state"], shown["error"]["code"]) == ("failed", "command.interrupted")
            one_outcome(world, store, command_id, executions=1)

    store = ControlStore.open(tmp_path / "control.db")
    world = world_of(tmp_path, store)
    (tmp_path / "mode").write_text(mode)
    run(story())
    store.close()


def test_a_denied_verb_is_journalled_rejected_and_told(tmp_path: Path) -> None:
    async def story() -> None:
        async with control_plane(tmp_path, peer=lambda _: Caller(world.agent), store=store) as plane:
            command_id = await issue(plane, world, Diagnostics())
            async with world.agent_here():
                shown = await until(lambda: outcome(plane, command_id), "the outcome")
            assert (shown["state"], shown["error"]["code"]) == ("rejected", "command.denied")
            assert world.journalled(command_id) == ["rejected"]
            one_outcome(world, store, command_id, executions=0)

    store = ControlStore.open(tmp_path / "control.db")
    world = world_of(tmp_path, store)
    run(story())
    store.close()

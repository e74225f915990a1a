"""Ledgers, sessions and agents for tests of the control plane: real stores, real gRPC over UNIX sockets."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio
from sqlalchemy import insert

from pgherd.collector.control.dispatch import Dispatcher
from pgherd.collector.control.herd import Herd
from pgherd.collector.control.ledger import Ledger
from pgherd.collector.control.session import ControlService, SessionSettings
from pgherd.collector.control.views import Views
from pgherd.proto.clock import Clock
from pgherd.proto.control.v1 import control_pb2 as pb
from pgherd.proto.control.v1 import control_pb2_grpc
from pgherd.runtime.clock import SystemClock
from pgherd.storage.control.schema import agents, nodes
from pgherd.storage.control.store import ControlStore

T = TypeVar("T")

AGENT_METADATA = "test-agent"


class ManualClock:
    """Time that only the test moves."""

    def __init__(self, unix_ns: int = 1_800_000_000_000_000_000) -> None:
        self.unix_ns = unix_ns
        self.elapsed_s = 0.0

    def wall_unix_ns(self) -> int:
        return self.unix_ns

    def mono_s(self) -> float:
        return self.elapsed_s

    def advance(self, seconds: float) -> None:
        self.unix_ns += round(seconds * 1e9)
        self.elapsed_s += seconds


async def until(condition: Callable[[], T], what: str, timeout_s: float = 20.0) -> T:
    """`wait_until` on an event loop."""
    deadline_s = asyncio.get_running_loop().time() + timeout_s
    while True:
        answer = condition()
        if answer:
            return answer
        if asyncio.get_running_loop().time() > deadline_s:
            raise AssertionError(f"{what} didn't come true within {timeout_s:g} s (last answer: {answer!r})")
        await asyncio.sleep(0.01)


def enrol(store: ControlStore, name: str = "agent-a", status: str = "active") -> str:
    """An agent as joining leaves it; returns its id."""
    agent_id = str(uuid.uuid4())
    with store.begin() as connection:
        connection.execute(insert(agents).values(id=agent_id, name=name, status=status, labels={}, facts={}, joined_unix_ns=1))
    return agent_id


def add_node(store: ControlStore, agent_id: str, alias: str = "n1", cluster: str = "c1") -> str:
    """A node that the agent has claimed; returns its id."""
    node_id = str(uuid.uuid4())
    with store.begin() as connection:
        connection.execute(
            insert(nodes).values(id=node_id, agent_id=agent_id, alias=alias, cluster=cluster, first_seen_unix_ns=1)
        )
    return node_id


@dataclass(frozen=True)
class Caller:
    """What the identity gate would have found out."""

    id: str


def caller_of(context: Any) -> Caller:
    """The caller by its metadata: stands in for the certificate, which other tests are about."""
    return Caller(dict(context.invocation_metadata())[AGENT_METADATA])


@dataclass
class Plane:
    """A collector's control plane on a UNIX socket."""

    store: ControlStore
    ledger: Ledger
    herd: Herd
    dispatcher: Dispatcher
    service: ControlService
    views: Views
    target: str


@contextlib.asynccontextmanager
async def control_plane(
    directory: Path,
    clock: Clock | None = None,
    store: ControlStore | None = None,
    peer: Callable[[Any], Caller] = caller_of,
    **settings: Any,
) -> AsyncIterator[Plane]:
    """Serve until the block is left. The store file is `control.db` in `directory`."""
    clock = clock or SystemClock()
    opened = store if store is not None else await asyncio.to_thread(ControlStore.open, directory / "control.db")
    members: dict[str, Any] = {"collector_version": "test", "heartbeat_interval_s": 0.2} | settings
    bounds = SessionSettings(**members)
    ledger = Ledger(opened, clock)
    herd = Herd(opened, clock, heartbeat_interval_s=bounds.heartbeat_interval_s)
    dispatcher = Dispatcher(ledger, herd)
    service = ControlService(dispatcher, bounds, clock, peer)
    server = grpc.aio.server()
    control_pb2_grpc.add_ControlServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    target = f"unix:{directory / 'grpc.sock'}"
    (directory / "grpc.sock").unlink(missing_ok=True)  # of a killed one
    server.add_insecure_port(target)
    await server.start()
    sweeping = asyncio.create_task(dispatcher.run())
    try:
        yield Plane(opened, ledger, herd, dispatcher, service, Views(opened, herd), target)
    finally:
        sweeping.cancel()
        await asyncio.gather(sweeping, return_exceptions=True)
        await server.stop(None)
        if store is None:
            opened.close()


class Puppet:
    """An agent's end of a session whose every message the test writes."""

    def __init__(self, target: str, agent_id: str) -> None:
        self.agent_id = agent_id
        self._channel = grpc.aio.insecure_channel(target)
        self._call = control_pb2_grpc.ControlStub(self._channel).Session(metadata=((AGENT_METADATA, agent_id),))  # type: ignore[no-untyped-call]
        self.acks: list[tuple[str, int]] = []
        self.offers: list[pb.CommandOffer] = []
        self.beats = 0
        self.welcome: pb.Welcome | None = None
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for message in self._call:
                match message.WhichOneof("message"):
                    case "welcome":
                        self.welcome = message.welcome
                    case "command_offer":
                        self.offers.append(message.command_offer)
                    case "command_event_ack":
                        self.acks.append((message.command_event_ack.command_id, message.command_event_ack.sequence))
                    case "heartbeat_ack":
                        self.beats += 1

    async def hello(
        self, nodes: list[pb.Node] | None = None, unfinished: dict[str, int] | None = None, agent_id: str | None = None
    ) -> None:
        listed = [pb.UnfinishedCommand(command_id=one, last_sequence=last) for one, last in (unfinished or {}).items()]
        hello = pb.Hello(
            agent_id=agent_id or self.agent_id, protocol_version=1, software_version="9", nodes=nodes or [], unfinished=listed
        )
        await self._call.write(pb.AgentMessage(hello=hello))

    async def begin(self, nodes: list[pb.Node] | None = None, unfinished: dict[str, int] | None = None) -> None:
        """Hello, and wait for the welcome."""
        await self.hello(nodes, unfinished)
        await until(lambda: self.welcome, "the welcome")

    async def send(self, message: pb.AgentMessage) -> None:
        await self._call.write(message)

    async def event(self, wire: pb.CommandEvent) -> None:
        await self._call.write(pb.AgentMessage(command_event=wire))

    async def ended(self) -> tuple[grpc.StatusCode, str]:
        """Wait for the end of the session: status and details."""
        async with asyncio.timeout(20):
            await self._reading
            return await self._call.code(), await self._call.details()

    async def close(self) -> None:
        self._call.cancel()
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        await self._channel.close(None)


@contextlib.asynccontextmanager
async def puppet(target: str, agent_id: str) -> AsyncIterator[Puppet]:
    """A puppet that is gone when the block is left."""
    made = Puppet(target, agent_id)
    try:
        yield made
    finally:
        await made.close()


def wire_node(node_id: str, alias: str = "n1", **members: Any) -> pb.Node:
    """A node as a hello names it."""
    return pb.Node(**{"node_id": node_id, "alias": alias, "cluster": "c1", "instance": f"{alias}:5432", **members})

"""The agent's end of the control session: dials, says who it is, keeps the link honest, carries events.

    run          dial, converse, and again after a jittered pause, for ever
    reader       offers to the executor, acknowledgements to the journal, round trips to the clock offset
    heartbeats   one per interval; silence of the collector for three of them is a dead link
    sender       what the journal holds unacknowledged, then what is passing

A session that ends means nothing for a running command. Durable events are sent again on every session
until the collector acknowledges them.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import grpc.aio
from grpc.aio import EOF  # type: ignore[attr-defined]  # the stubs lack it

from pgherd.agent.command.outlet import Outlet
from pgherd.agent.command.policy import Policy
from pgherd.agent.command.skew import clock_offset_ns
from pgherd.agent.node import NodeStatus
from pgherd.proto.clock import Clock
from pgherd.proto.commands import PROTOCOL_VERSION, Event, Offer, Ping, check_uuid
from pgherd.proto.control.v1 import control_pb2 as pb
from pgherd.proto.control.v1 import control_pb2_grpc
from pgherd.proto.errors import PeerError, PgherdError, TransientError
from pgherd.runtime.logging import get_logger

_log = get_logger(__name__)

_HEARTBEAT_INTERVAL_S_MIN = 0.05
_HEARTBEAT_INTERVAL_S_MAX = 300.0

_ROLES = {"unknown": pb.ROLE_UNKNOWN, "primary": pb.ROLE_PRIMARY, "standby": pb.ROLE_STANDBY}
_CONDITIONS = {
    "unknown": pb.CONDITION_UNKNOWN,
    "up": pb.CONDITION_UP,
    "down": pb.CONDITION_DOWN,
    "saturated": pb.CONDITION_SATURATED,
    "auth_failed": pb.CONDITION_AUTH_FAILED,
    "hung": pb.CONDITION_HUNG,
}


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """Who this agent is, and its patience."""

    agent_id: str
    software_version: str
    hostname: str
    dial_timeout_s: float = 10.0
    write_timeout_s: float = 30.0
    resend_after_s: float = 30.0  # an event that isn't acknowledged meanwhile
    silent_after_heartbeats: int = 3
    backoff_s_min: float = 0.5
    backoff_s_max: float = 30.0
    refused_backoff_s: float = 60.0  # after the collector said no: revoked, mismatch


@dataclass(frozen=True, slots=True)
class SpoolState:
    """How much waits to be shipped; `oldest_unix_ns` is 0 when nothing does."""

    bytes: int
    oldest_unix_ns: int


class CommandMemory(Protocol):
    """What the session tells of commands (journal.py, disabled.py)."""

    def unfinished(self) -> list[tuple[str, int]]: ...
    def unacknowledged(self) -> Sequence[tuple[Offer, Event]]: ...


class CommandTaker(Protocol):
    """Whom the session hands offers and acknowledgements to (executor.py, disabled.py)."""

    def receive(self, offer: Offer, received_mono_s: float) -> Awaitable[None]: ...
    def acknowledge(self, command_id: str, sequence: int) -> Awaitable[None]: ...


class _IdentityChanged(Exception):  # noqa: N818 - not an error
    """The certificate was renewed: dial anew with it."""


class ControlClient:
    """Keeps one control session alive. One event loop.

    `dial` makes a channel from the identity's files as they are now; `identity_mark` changes when those
    files do (renewal), and a new channel is then dialled.
    """

    def __init__(
        self,
        *,
        settings: SessionSettings,
        dial: Callable[[], grpc.aio.Channel],
        identity_mark: Callable[[], object],
        nodes: Callable[[], Sequence[NodeStatus]],
        spool: Callable[[], SpoolState],
        policy: Policy,
        journal: CommandMemory,
        executor: CommandTaker,
        outlet: Outlet,
        clock: Clock,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._settings = settings
        self._dial = dial
        self._identity_mark = identity_mark
        self._nodes = nodes
        self._spool = spool
        self._policy = policy
        self._journal = journal
        self._executor = executor
        self._outlet = outlet
        self._clock = clock
        self._jitter = jitter
        self.connected = False  # for status.json and metrics
        self.skew_ns: int | None = None  # collector's clock minus ours, from the last round trip
        self.round_trip_ns: int | None = None

    async def run(self) -> None:
        """Until cancelled; no failure of the link ends it."""
        failures = 0
        while True:
            pause_s = 0.0
            try:
                await self._one_session()
            except _IdentityChanged:
                _log.info("session.identity_changed")
                failures = 0
                continue
            except grpc.aio.AioRpcError as error:
                failures = 1 if self.connected else failures + 1
                pause_s = self._pause_s(failures, error.code())
                _log.warning(
                    "session.lost",
                    status=error.code().name,
                    details=(error.details() or "")[:300],
                    retry_in_s=round(pause_s, 2),
                )
            except PgherdError as error:
                failures = 1 if self.connected else failures + 1
                pause_s = self._pause_s(failures, None)
                _log.warning("session.lost", code=error.code, details=error.message, retry_in_s=round(pause_s, 2))
            except Exception as error:  # noqa: BLE001 - loop guard: an agent without its session can't be helped from afar
                failures += 1
                pause_s = self._pause_s(failures, None)
                _log.error("session.broke", error=repr(error)[:500], retry_in_s=round(pause_s, 2))
            finally:
                self.connected = False
            await asyncio.sleep(pause_s)

    def _pause_s(self, failures: int, status: grpc.StatusCode | None) -> float:
        """Exponential with jitter, bounded; a herd that lost its collector must not come back as one."""
        settings = self._settings
        if status in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED):
            ceiling_s = settings.refused_backoff_s
        else:
            ceiling_s = min(settings.backoff_s_max, settings.backoff_s_min * 2 ** min(failures, 16))
        return ceiling_s * (0.5 + 0.5 * self._jitter())

    async def _one_session(self) -> None:
        mark = self._identity_mark()
        channel = self._dial()
        try:
            call = control_pb2_grpc.ControlStub(channel).Session()  # type: ignore[no-untyped-call]  # generated
            await _Link(self, call, mark).converse()
        finally:
            await channel.close(None)


class _Link:
    """One stream and what is known only while it lives."""

    def __init__(self, client: ControlClient, call: Any, mark: object) -> None:
        self._client = client
        self._settings = client._settings
        self._clock = client._clock
        self._call = call
        self._mark = mark
        self._writing = asyncio.Lock()
        self._interval_s = 5.0
        self._heard_mono_s = self._clock.mono_s()
        self._beats: dict[int, float] = {}  # sent_unix_ns → mono; a few, for round trips
        self._sent: dict[tuple[str, int], float] = {}  # durable events of this session → mono

    async def converse(self) -> None:
        """Until the stream ends, by an exception always."""
        await self._write(pb.AgentMessage(hello=self._hello()))
        try:
            async with asyncio.timeout(self._settings.dial_timeout_s):
                first = await self._call.read()
        except TimeoutError as error:
            raise TransientError("peer.unreachable", "the collector didn't answer the hello") from error
        if first is EOF:
            await self._raise_status()
        if first.WhichOneof("message") != "welcome":
            raise PeerError("peer.protocol", "the collector's first message isn't a welcome")
        self._interval_s = min(
            max(first.welcome.heartbeat_interval_ms / 1000, _HEARTBEAT_INTERVAL_S_MIN), _HEARTBEAT_INTERVAL_S_MAX
        )
        self._heard_mono_s = self._clock.mono_s()
        self._client.connected = True
        _log.info("session.began", collector_version=first.welcome.collector_version)
        await _first_ends(self._read(), self._beat(), self._send())

    def _hello(self) -> pb.Hello:
        client, settings = self._client, self._settings
        return pb.Hello(
            agent_id=settings.agent_id,
            protocol_version=PROTOCOL_VERSION,
            software_version=settings.software_version,
            hostname=settings.hostname,
            nodes=[_node_to_wire(node) for node in client._nodes()],
            unfinished=[
                pb.UnfinishedCommand(command_id=command_id, last_sequence=sequence)
                for command_id, sequence in client._journal.unfinished()
            ],
            verbs_allowed=client._policy.verbs_allowed(),
        )

    async def _write(self, message: pb.AgentMessage) -> None:
        async with self._writing:
            try:
                async with asyncio.timeout(self._settings.write_timeout_s):
                    await self._call.write(message)
            except TimeoutError as error:
                raise TransientError("peer.unreachable", "the collector takes nothing from the session") from error
            except asyncio.InvalidStateError:  # the call is over: its status says why
                await self._raise_status()

    async def _raise_status(self) -> None:
        async with asyncio.timeout(self._settings.dial_timeout_s):
            code, details = await self._call.code(), await self._call.details()
        initial, trailing = await self._call.initial_metadata(), await self._call.trailing_metadata()
        raise grpc.aio.AioRpcError(code, initial, trailing, details or "", "")

    # ---- the three loops ------------------------------------------------------------------------

    async def _read(self) -> None:
        while True:
            message = await self._call.read()  # bounded by _beat, which ends the session in silence
            if message is EOF:
                await self._raise_status()
            self._heard_mono_s = self._clock.mono_s()
            match message.WhichOneof("message"):
                case "command_offer":
                    await self._offered(message.command_offer)
                case "command_event_ack":
                    ack = message.command_event_ack
                    await self._client._executor.acknowledge(ack.command_id, ack.sequence)
                case "heartbeat_ack":
                    self._measure(message.heartbeat_ack)
                case _:
                    continue  # a message that a newer collector adds

    async def _offered(self, wire: pb.CommandOffer) -> None:
        try:
            offer = Offer.from_wire(wire)
        except PgherdError as error:
            _log.warning("command.not_understood", command_id=wire.command_id[:64], code=error.code, error=error.message)
            self._refuse_unread(wire, error)
            return
        await self._client._executor.receive(offer, self._heard_mono_s)

    def _refuse_unread(self, wire: pb.CommandOffer, error: PgherdError) -> None:
        """An offer that can't be read can't be journalled either; it is refused anew whenever it is offered."""
        try:
            event = Event(check_uuid(wire.command_id, "command_id"), 1, self._clock.wall_unix_ns(), "rejected", error.as_dict())
        except PgherdError:
            return  # it names no command
        self._client._outlet.passing(event.to_wire(Ping()))  # a rejection carries no result, any verb will do

    def _measure(self, ack: pb.HeartbeatAck) -> None:
        sent_mono_s = self._beats.pop(ack.heartbeat_sent_unix_ns, None)
        if sent_mono_s is None:
            return
        elapsed_ns = round((self._heard_mono_s - sent_mono_s) * 1e9)
        sent = ack.heartbeat_sent_unix_ns
        self._client.skew_ns, self._client.round_trip_ns = clock_offset_ns(
            sent, ack.received_unix_ns, ack.sent_unix_ns, sent + elapsed_ns
        )

    async def _beat(self) -> None:
        client = self._client
        silence_s = self._settings.silent_after_heartbeats * self._interval_s
        while True:
            if self._clock.mono_s() - self._heard_mono_s > silence_s:
                raise TransientError("peer.unreachable", "the collector doesn't answer heartbeats", silence_s=silence_s)
            if client._identity_mark() != self._mark:
                raise _IdentityChanged
            spool = client._spool()
            beat = pb.Heartbeat(
                nodes=[_node_to_wire(node) for node in client._nodes()],
                spool_bytes=spool.bytes,
                spool_oldest_unix_ns=spool.oldest_unix_ns,
            )
            if client.skew_ns is not None and client.round_trip_ns is not None:
                beat.skew_ns, beat.round_trip_ns = client.skew_ns, client.round_trip_ns
            beat.sent_unix_ns = self._clock.wall_unix_ns()
            while len(self._beats) > self._settings.silent_after_heartbeats:
                self._beats.pop(next(iter(self._beats)))
            self._beats[beat.sent_unix_ns] = self._clock.mono_s()
            await self._write(pb.AgentMessage(heartbeat=beat))
            await asyncio.sleep(self._interval_s)

    async def _send(self) -> None:
        client = self._client
        while True:
            now_mono_s = self._clock.mono_s()
            for offer, event in client._journal.unacknowledged():
                key = (event.command_id, event.sequence)
                sent_mono_s = self._sent.get(key)
                if sent_mono_s is None or now_mono_s - sent_mono_s > self._settings.resend_after_s:
                    await self._write(pb.AgentMessage(command_event=event.to_wire(offer.verb)))
                    self._sent[key] = now_mono_s
            for passing in client._outlet.take_passing():
                await self._write(pb.AgentMessage(command_event=passing))
            await client._outlet.wait(self._settings.resend_after_s / 2)


async def _first_ends(*jobs: Any) -> None:
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if not task.cancelled():  # grpc cancels what else waits on a call when one wait is timed out
                task.result()
        raise TransientError("peer.unreachable", "the session was cut off on this side")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _node_to_wire(node: NodeStatus) -> pb.Node:
    return pb.Node(
        node_id=node.node_id,
        alias=node.alias,
        cluster=node.cluster,
        system_identifier=node.system_identifier,
        instance=node.instance,
        server_version_num=node.server_version_num,
        role=_ROLES[node.role],
        condition=_CONDITIONS[node.condition],
    )

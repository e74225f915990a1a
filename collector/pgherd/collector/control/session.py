"""The `Control` service: one session per agent, dialled by the agent.

    reader   hello, then heartbeats and command events; an event is acknowledged after the ledger's commit
    offerer  woken when something may be offered; looks into the ledger, never keeps a list of its own
    writer   the only one that writes, from a bounded queue

Overflow of the queue: the reader and the offerer wait (the agent feels it as back pressure); a session
that takes nothing for `write_timeout_s` is ended. Ending a session says nothing about commands: they
live in the ledger and in the agent's journal, and the next hello compares the two.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import grpc

from pgherd.collector.control.dispatch import Dispatcher
from pgherd.collector.control.herd import node_reports
from pgherd.proto.clock import Clock
from pgherd.proto.commands import PROTOCOL_VERSION, Event, check_uuid
from pgherd.proto.control.v1 import control_pb2 as pb
from pgherd.proto.control.v1 import control_pb2_grpc
from pgherd.proto.errors import DeniedError, PeerError, PgherdError, TransientError
from pgherd.runtime.logging import get_logger

_log = get_logger(__name__)

_UNFINISHED_MAX = 4096
_UNKNOWN_EVENTS_MAX = 1024
_VERBS_MAX = 64
_TEXT_MAX = 255


class PeerIdentity(Protocol):
    """The verified caller (pgherd.collector.identity.peer.Peer)."""

    @property
    def id(self) -> str: ...


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """Bounds of one session."""

    collector_version: str
    heartbeat_interval_s: float = 5.0
    hello_timeout_s: float = 10.0
    write_timeout_s: float = 30.0
    silent_after_heartbeats: int = 4  # then the session is taken for half-open and ended
    queue_max: int = 64


@dataclass(eq=False, slots=True)
class _Session:
    """What lives as long as one stream."""

    agent_id: str
    outgoing: asyncio.Queue[pb.CollectorMessage]
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    replaced: asyncio.Event = field(default_factory=asyncio.Event)
    listed: set[str] = field(default_factory=set)  # what the agent said it has
    offered: set[str] = field(default_factory=set)  # on this stream
    unknown_events: int = 0


class ControlService(control_pb2_grpc.ControlServicer):
    """Serves `pgherd.control.v1.Control`. `peer` gives the verified caller of an RPC."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        settings: SessionSettings,
        clock: Clock,
        peer: Callable[[Any], PeerIdentity],
    ) -> None:
        self._dispatcher = dispatcher
        self._settings = settings
        self._clock = clock
        self._peer = peer
        self._sessions: dict[str, _Session] = {}

    @property
    def live_sessions(self) -> int:
        """How many agents hold a session (for the collector's own metrics)."""
        return len(self._sessions)

    async def Session(self, request_iterator: AsyncIterator[pb.AgentMessage], context: Any) -> None:  # noqa: N802 - gRPC's name
        """One stream, from hello to its end."""
        agent_id = self._peer(context).id
        try:
            await self._serve(agent_id, aiter(request_iterator), context)
        except PgherdError as error:
            _log.warning("control.session_refused", agent_id=agent_id, code=error.code, error=error.message)
            await _abort(context, error)

    async def _serve(self, agent_id: str, requests: AsyncIterator[pb.AgentMessage], context: Any) -> None:
        try:
            async with asyncio.timeout(self._settings.hello_timeout_s):
                first = await anext(requests, None)
        except TimeoutError as error:
            raise PeerError("peer.protocol", "no hello arrived") from error
        if first is None:
            return
        if first.WhichOneof("message") != "hello":
            raise PeerError("peer.protocol", "the first message isn't a hello")
        await self._claim(agent_id, first.hello)
        session = _Session(agent_id, asyncio.Queue(self._settings.queue_max))
        await self._replace(session)
        self._dispatcher.attach(agent_id, session.wake)
        try:
            await self._converse(session, first.hello, requests, context)
        finally:
            self._dispatcher.detach(agent_id, session.wake)
            if self._sessions.get(agent_id) is session:
                del self._sessions[agent_id]
                self._dispatcher.herd.depart(agent_id)
            _log.info("control.session_ended", agent_id=agent_id)

    async def _claim(self, agent_id: str, hello: pb.Hello) -> None:
        """Check a hello against the certificate and the herd, and store it."""
        if hello.agent_id != agent_id:
            raise DeniedError(
                "identity.mismatch", "the hello names another agent", certificate=agent_id, hello=hello.agent_id[:64]
            )
        if hello.protocol_version < 1:
            raise PeerError("peer.protocol", "the hello states no protocol version")
        if len(hello.unfinished) > _UNFINISHED_MAX or len(hello.verbs_allowed) > _VERBS_MAX:
            raise PeerError("peer.protocol", "the hello lists too much")
        reports = node_reports(hello.nodes)
        facts = {
            "software_version": hello.software_version[:64],
            "protocol_version": hello.protocol_version,
            "verbs_allowed": [name[:64] for name in hello.verbs_allowed],
        }
        await asyncio.to_thread(self._dispatcher.herd.claim, agent_id, reports, facts)
        self._dispatcher.herd.arrive(agent_id, reports, facts)

    async def _replace(self, session: _Session) -> None:
        """The newest session of an agent wins; an older one is either half-open or a second holder of the identity."""
        older = self._sessions.get(session.agent_id)
        self._sessions[session.agent_id] = session
        if older is None:
            return
        older.replaced.set()
        _log.warning("control.session_replaced", agent_id=session.agent_id)
        await asyncio.to_thread(
            self._dispatcher.ledger.note, f"agent:{session.agent_id}", "grpc", "agent.session_replaced", session.agent_id, {}
        )

    async def _converse(
        self, session: _Session, hello: pb.Hello, requests: AsyncIterator[pb.AgentMessage], context: Any
    ) -> None:
        unfinished = {check_uuid(one.command_id, "command_id"): one.last_sequence for one in hello.unfinished}
        found = await asyncio.to_thread(self._dispatcher.ledger.reconcile, session.agent_id, unfinished)
        session.listed.update(unfinished)
        if found.forgotten or found.unknown:
            _log.warning(
                "control.reconciled", agent_id=session.agent_id, forgotten=len(found.forgotten), unknown=len(found.unknown)
            )
        session.outgoing.put_nowait(
            pb.CollectorMessage(
                welcome=pb.Welcome(
                    collector_version=self._settings.collector_version,
                    protocol_version=min(PROTOCOL_VERSION, hello.protocol_version),
                    heartbeat_interval_ms=round(self._settings.heartbeat_interval_s * 1000),
                    sent_unix_ns=self._clock.wall_unix_ns(),
                )
            )
        )
        session.wake.set()
        _log.info("control.session_began", agent_id=session.agent_id, hostname=hello.hostname[:_TEXT_MAX])
        await _first_ends(
            self._read(session, requests), self._offer(session), self._write(session, context), self._until_replaced(session)
        )

    async def _until_replaced(self, session: _Session) -> None:
        await session.replaced.wait()
        raise TransientError("peer.unreachable", "a newer session of this agent took over")

    async def _read(self, session: _Session, requests: AsyncIterator[pb.AgentMessage]) -> None:
        silence_s = self._settings.silent_after_heartbeats * self._settings.heartbeat_interval_s
        while True:
            try:
                async with asyncio.timeout(silence_s):
                    message = await anext(requests, None)
            except TimeoutError as error:
                raise TransientError("peer.unreachable", "no heartbeat arrived", silence_s=silence_s) from error
            if message is None:
                return
            match message.WhichOneof("message"):
                case "heartbeat":
                    await self._heartbeat(session, message.heartbeat)
                case "command_event":
                    await self._event(session, message.command_event)
                case "hello":
                    raise PeerError("peer.protocol", "a second hello on one session")
                case _:
                    continue  # a message that a newer agent adds; fields are only ever added

    async def _heartbeat(self, session: _Session, beat: pb.Heartbeat) -> None:
        received_unix_ns = self._clock.wall_unix_ns()
        facts: dict[str, Any] = {
            "spool_bytes": min(beat.spool_bytes, 2**63 - 1),
            "spool_oldest_unix_ns": min(beat.spool_oldest_unix_ns, 2**63 - 1) or None,
        }
        if beat.HasField("skew_ns"):
            facts["skew_ns"] = beat.skew_ns
        if beat.HasField("round_trip_ns"):
            facts["round_trip_ns"] = beat.round_trip_ns
        reports = node_reports(beat.nodes)
        if self._sessions.get(session.agent_id) is session:
            herd = self._dispatcher.herd
            if herd.heartbeat(session.agent_id, reports, facts):
                await asyncio.to_thread(herd.claim, session.agent_id, reports, facts)
                herd.arrive(session.agent_id, reports, facts)
        await session.outgoing.put(
            pb.CollectorMessage(
                heartbeat_ack=pb.HeartbeatAck(
                    heartbeat_sent_unix_ns=beat.sent_unix_ns,
                    received_unix_ns=received_unix_ns,
                    sent_unix_ns=self._clock.wall_unix_ns(),
                )
            )
        )

    async def _event(self, session: _Session, wire: pb.CommandEvent) -> None:
        """Durable first, acknowledged after. A refusal ends the session; nothing was acknowledged then."""
        event = Event.from_wire(wire)
        recorded = await self._dispatcher.record(session.agent_id, event)
        session.listed.add(event.command_id)
        if not recorded.known and event.kind != "progress":
            session.unknown_events += 1
            _log.warning("control.unknown_event", agent_id=session.agent_id, command_id=event.command_id, kind=event.kind)
            if session.unknown_events > _UNKNOWN_EVENTS_MAX:
                raise PeerError("peer.protocol", "too many events of commands that were never issued")
        ack = pb.CommandEventAck(command_id=event.command_id, sequence=event.sequence)
        await session.outgoing.put(pb.CollectorMessage(command_event_ack=ack))

    async def _offer(self, session: _Session) -> None:
        while True:
            await session.wake.wait()
            session.wake.clear()
            offers = await asyncio.to_thread(
                self._dispatcher.ledger.take_offers, session.agent_id, besides=session.listed | session.offered
            )
            for offer in offers:
                session.offered.add(offer.command_id)
                await session.outgoing.put(pb.CollectorMessage(command_offer=offer.to_wire()))
            if offers:
                session.wake.set()  # there may be more than one batch

    async def _write(self, session: _Session, context: Any) -> None:
        while True:
            message = await session.outgoing.get()
            try:
                async with asyncio.timeout(self._settings.write_timeout_s):
                    await context.write(message)
            except TimeoutError as error:
                raise TransientError("peer.unreachable", "the agent takes nothing from its session") from error


async def _first_ends(*jobs: Awaitable[None]) -> None:
    """Run all until the first returns or raises; the others are cancelled and waited for."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if not task.cancelled():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _abort(context: Any, error: PgherdError) -> NoReturn:
    """End the RPC with the error's own status; details are `code: message`."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1.0):  # a caller that doesn't read can hold the status back
            await context.abort(getattr(grpc.StatusCode, error.info.grpc_status), f"{error.code}: {error.message}")
    raise error

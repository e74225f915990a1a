"""The gate that every RPC passes, and the watch over the calls that stay open.

    gate = PeerGate(...)                                   one per gRPC server
    server = grpc.aio.server(interceptors=[PeerInterceptor(gate)], ...)

The interceptor wraps each kind of handler. Before the handler runs: a certificate of this CA, an
identity in it, a kind that the service is open to, a known serial, not expired, not revoked. While it
runs: the watch asks again every `recheck_s`, and `cut` ends calls at once. A refused call ends with
UNAUTHENTICATED or PERMISSION_DENIED and the code of the error registry in its details.

When the control store can't be asked, new RPCs are UNAVAILABLE (agents spool and retry), and open ones
are cut after `blind_s` without an answer: unknown is not OK.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

import grpc
import grpc.aio

from pgherd.collector.identity.peer import Peer, PeerKind, Standing, StandingSource, acting_as, judge, read_peer
from pgherd.proto.clock import Clock
from pgherd.proto.errors import DeniedError, PgherdError, TransientError
from pgherd.runtime.logging import get_logger

_log = get_logger(__name__)

_STORE_TIMEOUT_S = 5.0
_ABORT_TIMEOUT_S = 1.0
_CACHE_ENTRIES_MAX = 65_536

# Which service is open to whom; a service that isn't named is open to nobody.
SERVICES: Mapping[str, frozenset[PeerKind]] = {
    "pgherd.control.v1.Control": frozenset({PeerKind.AGENT}),
    "opentelemetry.proto.collector.metrics.v1.MetricsService": frozenset({PeerKind.AGENT, PeerKind.CLIENT}),
}

# The same for what isn't gRPC: agents need sequences, which OTLP/HTTP doesn't carry.
OTLP_HTTP = "OTLP/HTTP"
HTTP_SERVICES: Mapping[str, frozenset[PeerKind]] = {OTLP_HTTP: frozenset({PeerKind.CLIENT})}


@dataclass(eq=False, slots=True)
class _LiveCall:
    """One RPC that is being served. `verdict` says why it was cut."""

    peer: Peer
    task: asyncio.Task[Any]
    verdict: PgherdError | None = None


@dataclass(slots=True)
class _Seen:
    standing: Standing | None
    mono_s: float


@dataclass(slots=True)
class PeerGate:
    """Judges callers and holds the registry of live calls. One event loop; `standings` runs in threads."""

    ca_pem: bytes
    trust_domain: str
    source: StandingSource
    clock: Clock
    recheck_s: float = 1.0
    blind_s: float = 5.0
    cache_s: float = 1.0
    _live: set[_LiveCall] = field(default_factory=set)
    _seen: dict[str, _Seen] = field(default_factory=dict)
    _watch: asyncio.Task[None] | None = None
    # Threads of its own: a writer that waits for the disk in the shared pool must not hold the gate shut.
    _threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "identity"))

    @property
    def live_calls(self) -> int:
        """How many RPCs are being served now (for the collector's own metrics)."""
        return len(self._live)

    async def admit(self, certificate_pem: bytes | None, service: str, services: Mapping[str, frozenset[PeerKind]]) -> Peer:
        """The caller, fully checked. Raises DeniedError identity.* | peer.untrusted, TransientError store.unavailable."""
        if certificate_pem is None:
            raise DeniedError("identity.missing", "the call carries no client certificate", hint="join the herd first")
        peer = read_peer(certificate_pem, self.ca_pem, self.trust_domain)
        if peer.kind not in services.get(service, frozenset()):
            raise DeniedError("identity.mismatch", f"{service} isn't open to a {peer.kind.value}", peer=peer.id)
        standing = await self._standing(peer.serial)
        error = judge(peer, standing, self.clock.wall_unix_ns())
        if error is not None:
            raise error
        return peer

    def cut(self, subject_ids: Iterable[str], error: PgherdError | None = None) -> int:
        """End every live call of these agents or clients now and forget what was cached; returns how many calls.

        Called after a revocation was committed; the watch finds the same within `recheck_s` by itself.
        """
        ids = set(subject_ids)
        self._seen.clear()
        reason = error or DeniedError("identity.revoked", "the identity was revoked", hint="join again with a new token")
        hit = [call for call in self._live if call.peer.id in ids]
        for call in hit:
            _end(call, reason)
        return len(hit)

    @contextlib.contextmanager
    def watched(self, peer: Peer) -> Any:
        """Register the running task as a live call of `peer` while inside."""
        task = asyncio.current_task()
        assert task is not None, "gRPC serves every RPC in a task"
        call = _LiveCall(peer, task)
        self._live.add(call)
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._keep_watch(), name="identity-watch")
        try:
            yield call
        finally:
            self._live.discard(call)

    async def _standing(self, serial: str) -> Standing | None:
        seen = self._seen.get(serial)
        now_s = self.clock.mono_s()
        if seen is not None and now_s - seen.mono_s < self.cache_s:
            return seen.standing
        standings = await self._ask([serial])
        if len(self._seen) >= _CACHE_ENTRIES_MAX:
            self._seen.clear()
        self._seen[serial] = _Seen(standings.get(serial), now_s)
        return standings.get(serial)

    async def _ask(self, serials: list[str]) -> Mapping[str, Standing]:
        try:
            async with asyncio.timeout(_STORE_TIMEOUT_S):
                return await asyncio.get_running_loop().run_in_executor(self._threads, self.source.standings, serials)
        except TimeoutError as error:
            raise TransientError("store.unavailable", "the control store doesn't answer", timeout_s=_STORE_TIMEOUT_S) from error

    async def _keep_watch(self) -> None:
        """Re-judge all live calls until none is left; the next call starts a new watch."""
        answered_mono_s = self.clock.mono_s()
        while self._live:
            await asyncio.sleep(self.recheck_s)  # first: who was admitted just now needs no second look
            calls = list(self._live)
            try:
                standings = await self._ask(sorted({call.peer.serial for call in calls}))
                answered_mono_s = self.clock.mono_s()
            except Exception as error:  # noqa: BLE001 - loop guard: a watch that died would let every open call through
                blind_for_s = self.clock.mono_s() - answered_mono_s
                _log.warning("identity.watch_blind", error=str(error), blind_for_s=round(blind_for_s, 1))
                if blind_for_s > self.blind_s:
                    for call in calls:
                        _end(call, TransientError("store.unavailable", "identities can't be checked now"))
            else:
                now_unix_ns = self.clock.wall_unix_ns()
                for call in calls:
                    verdict = judge(call.peer, standings.get(call.peer.serial), now_unix_ns)
                    if verdict is not None:
                        _end(call, verdict)


def _end(call: _LiveCall, error: PgherdError) -> None:
    if call.verdict is None and not call.task.done():
        call.verdict = error
        call.task.cancel()
        _log.info("identity.call_cut", peer=call.peer.id, kind=call.peer.kind.value, code=error.code)


class PeerInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Puts the gate in front of every handler of a grpc.aio server."""

    def __init__(self, gate: PeerGate, services: Mapping[str, frozenset[PeerKind]] = SERVICES) -> None:
        self._gate = gate
        self._services = services

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        unserved = await continuation(handler_call_details)
        handler: Any = unserved
        if handler is None:
            return unserved  # grpc answers UNIMPLEMENTED
        service = str(handler_call_details.method).strip("/").partition("/")[0]
        behaviour = next(
            found
            for found in (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
            if found is not None
        )
        guarded = self._guarded_stream(behaviour, service) if handler.response_streaming else self._guarded(behaviour, service)
        make: Any = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[bool(handler.request_streaming), bool(handler.response_streaming)]
        wrapped: grpc.RpcMethodHandler[Any, Any] = make(guarded, handler.request_deserializer, handler.response_serializer)
        return wrapped

    def _guarded(self, behaviour: Any, service: str) -> Any:
        async def serve(request: Any, context: Any) -> Any:
            async def body() -> Any:
                return await behaviour(request, context)

            return await self._serve(body, service, context)

        return serve

    def _guarded_stream(self, behaviour: Any, service: str) -> Any:
        # A coroutine that writes, not a generator: a cancellation then always lands in our own frames,
        # also while a message is being sent, and can be turned into a status.
        async def serve(request: Any, context: Any) -> None:
            async def body() -> None:
                answer = behaviour(request, context)
                if not isinstance(answer, AsyncIterable):
                    await answer
                    return
                async with contextlib.aclosing(cast(Any, answer)) as messages:
                    async for message in messages:
                        await context.write(message)

            await self._serve(body, service, context)

        return serve

    async def _serve(self, body: Callable[[], Awaitable[Any]], service: str, context: Any) -> Any:
        try:
            peer = await self._gate.admit(_certificate_pem(context), service, self._services)
        except PgherdError as error:
            _log.warning("identity.call_refused", service=service, code=error.code, caller=context.peer())
            await refuse(context, error)
        with self._gate.watched(peer) as call, acting_as(peer):
            try:
                answer = await body()
            except asyncio.CancelledError:
                if call.verdict is None:
                    raise  # the caller hung up or the server stops
                call.task.uncancel()
            if call.verdict is not None:  # also when the servicer took its cancellation for a normal end
                await refuse(context, call.verdict)
            return answer


async def refuse(context: Any, error: PgherdError) -> NoReturn:
    """End an RPC with the error's own status; details are `code: message`. Servicers may use it too."""
    async with asyncio.timeout(_ABORT_TIMEOUT_S):  # a caller that doesn't read can hold the status back
        await context.abort(getattr(grpc.StatusCode, error.info.grpc_status), f"{error.code}: {error.message}")
    raise AssertionError("abort always raises")


def _certificate_pem(context: Any) -> bytes | None:
    chain = list(context.auth_context().get("x509_pem_cert", ()))
    return bytes(chain[0]) if chain else None

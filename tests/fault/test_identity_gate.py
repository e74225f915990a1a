"""Who gets through the gate: every RPC of the descriptors on a real grpc.aio mTLS server with the real interceptor."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import message_factory
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2

from pgherd.collector.identity.gate import SERVICES, PeerGate, PeerInterceptor
from pgherd.collector.identity.peer import Peer, PeerKind, Standing, current_peer
from pgherd.collector.identity.registry import revoke_agent
from pgherd.proto.control.v1 import control_pb2
from pgherd.proto.errors import TransientError
from support.identity import DAY_S, Bare, Herd

pytestmark = pytest.mark.fault

_DEADLINE_S = 10.0
_EOF: Any = vars(grpc.aio)["EOF"]  # the stubs don't have it


@dataclass(frozen=True)
class Rpc:
    """One RPC as its descriptor says, callable from both sides without generated stubs."""

    service: str
    method: str
    streams_in: bool
    streams_out: bool
    request: type[Any]
    response: type[Any]

    def __str__(self) -> str:
        return f"{self.service}/{self.method}"


def _of_descriptors(*files: Any) -> list[Rpc]:
    return [
        Rpc(
            service.full_name,
            method.name,
            method.client_streaming,
            method.server_streaming,
            message_factory.GetMessageClass(method.input_type),
            message_factory.GetMessageClass(method.output_type),
        )
        for file in files
        for service in file.services_by_name.values()
        for method in service.methods
    ]


REAL = _of_descriptors(control_pb2.DESCRIPTOR, metrics_service_pb2.DESCRIPTOR)
# The descriptors have two of the four kinds today; the others must be guarded before they are needed.
KINDS = [
    Rpc("test.Kinds", f"In{i}Out{o}", i, o, control_pb2.AgentMessage, control_pb2.CollectorMessage)
    for i in (False, True)
    for o in (False, True)
]
ALL = REAL + KINDS
OPEN_TO = {**SERVICES, "test.Kinds": frozenset(PeerKind)}


@dataclass
class Servicer:
    """Answers every RPC: a unary answer at once, a stream's first message at once and its end never."""

    served: list[Peer] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)

    def handler(self, rpc: Rpc) -> Any:
        make: Any = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[rpc.streams_in, rpc.streams_out]

        async def unary(request: Any, context: Any) -> Any:
            self.served.append(current_peer(context))
            if rpc.streams_in:
                async for _ in request:
                    pass
            return rpc.response()

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            self.served.append(current_peer(context))
            try:
                yield rpc.response()
                if rpc.streams_in:
                    async for _ in request:
                        yield rpc.response()
                else:
                    await asyncio.Event().wait()
            finally:
                self.ended.append(str(rpc))

        return make(stream if rpc.streams_out else unary, rpc.request.FromString, rpc.response.SerializeToString)


@asynccontextmanager
async def _server(
    herd: Herd, gate: PeerGate, services: Mapping[str, frozenset[PeerKind]] = OPEN_TO
) -> AsyncIterator[tuple[int, Servicer]]:
    servicer = Servicer()
    server = grpc.aio.server(interceptors=[PeerInterceptor(gate, services)])
    for service in {rpc.service for rpc in ALL}:
        handlers = {rpc.method: servicer.handler(rpc) for rpc in ALL if rpc.service == service}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_secure_port("localhost:0", herd.certificate.grpc_credentials())
    await server.start()
    try:
        yield port, servicer
    finally:
        await server.stop(None)


def _open(channel: grpc.aio.Channel, rpc: Rpc, *, timeout_s: float = _DEADLINE_S, says: int = 1) -> Any:
    """Start the RPC; a request stream says that many messages and stays open.

    Say none to a server that will refuse: gRPC-Python's client may report a write that crosses the status
    as INTERNAL "Internal error from Core" and lose the status.
    """
    make: Any = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }[rpc.streams_in, rpc.streams_out]

    async def requests() -> AsyncIterator[Any]:
        for _ in range(says):
            yield rpc.request()
        await asyncio.Event().wait()

    callable_ = make(f"/{rpc}", rpc.request.SerializeToString, rpc.response.FromString)
    return callable_(requests() if rpc.streams_in else rpc.request(), timeout=timeout_s)


async def _status(call: Any) -> tuple[str, str]:
    try:
        async with asyncio.timeout(_DEADLINE_S + 5):
            while hasattr(call, "read"):  # gRPC keeps a status back behind messages that nobody reads
                try:
                    if await call.read() is _EOF:
                        break
                except grpc.aio.AioRpcError:
                    break
            return (await call.code()).name, await call.details()
    finally:
        call.cancel()


async def _admitted(call: Any, rpc: Rpc) -> None:
    """The RPC is being served (streams) or was (unary)."""
    async with asyncio.timeout(_DEADLINE_S):
        if rpc.streams_out:
            assert await call.read() is not _EOF
        elif not rpc.streams_in:
            await call


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(_DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - the gate has no event to wait for, and needs none
            await asyncio.sleep(0.01)


def _run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(bounded())


@pytest.fixture
def herd(tmp_path: Path) -> Any:
    herd = Herd.create(tmp_path / "herd")
    yield herd
    herd.close()


def test_every_rpc_refuses_no_certificate_a_foreign_one_and_a_server_s(herd: Herd, tmp_path: Path) -> None:
    foreign = Herd.create(tmp_path / "foreign")
    server_pem = (tmp_path / "herd" / "tls" / "server.pem").read_bytes()
    key_pem, mark, certificate_pem = server_pem.partition(b"-----BEGIN CERTIFICATE-----")
    as_client = Bare(key_pem, mark + certificate_pem)

    async def test() -> None:
        async with _server(herd, herd.gate()) as (port, servicer):
            for member in (None, foreign.member(), as_client):
                async with herd.channel(member, port) as channel:
                    for rpc in ALL:
                        code, _ = await _status(_open(channel, rpc, says=0))
                        assert code == "UNAVAILABLE", rpc
            assert servicer.served == []

    _run(test)
    foreign.close()


def test_a_stolen_agent_certificate_can_t_play_the_collector(herd: Herd) -> None:
    stolen, victim = herd.member(), herd.member()
    credentials = grpc.ssl_server_credentials([(stolen.key_pem, stolen.certificate_pem)])

    async def test() -> None:
        server = grpc.aio.server()
        port = server.add_secure_port("localhost:0", credentials)
        await server.start()
        try:
            async with herd.channel(victim, port) as channel:
                code, _ = await _status(_open(channel, KINDS[0]))
                assert code == "UNAVAILABLE"  # not UNIMPLEMENTED: it never got as far as a request
        finally:
            await server.stop(None)

    _run(test)


def test_every_rpc_serves_a_member_and_knows_who_it_is(herd: Herd) -> None:
    member = herd.member()

    async def test() -> None:
        async with _server(herd, herd.gate()) as (port, servicer), herd.channel(member, port) as channel:
            for rpc in ALL:
                call = _open(channel, rpc)
                await _admitted(call, rpc)
                call.cancel()
                if rpc.streams_in and not rpc.streams_out:
                    continue
                assert servicer.served.pop() == Peer(
                    PeerKind.AGENT, member.id, member.issued.serial, member.issued.not_after_unix_ns
                )

    _run(test)


@pytest.mark.parametrize("why", ["revoked", "expired", "unknown", "other herd's name"])
def test_every_rpc_refuses_on_a_connection_that_was_good(herd: Herd, why: str) -> None:
    """gRPC itself lets all of these through: the handshake was fine."""
    member = herd.member(recorded=why != "unknown")
    gate = herd.gate(cache_s=0.0)
    code_of = {
        "revoked": "identity.revoked",
        "expired": "identity.expired",
        "unknown": "identity.missing",
        "other herd's name": "identity.missing",
    }

    async def test() -> None:
        async with _server(herd, gate) as (port, servicer), herd.channel(member, port) as channel:
            if why in ("revoked", "expired"):
                await _admitted(_open(channel, KINDS[0]), KINDS[0])
                assert servicer.served.pop().id == member.id
            if why == "revoked":
                revoke_agent(herd.store, member.id, now_unix_ns=1, actor="test", via="test")
            elif why == "expired":
                herd.clock.offset_s = DAY_S + 1
            elif why == "other herd's name":
                gate.trust_domain = "herd-elsewhere"
            for rpc in ALL:
                code, details = await _status(_open(channel, rpc, says=0))
                assert (code, details.split(":")[0]) == ("UNAUTHENTICATED", code_of[why]), rpc
            assert servicer.served == []

    _run(test)


def test_a_single_revoked_certificate_is_refused_while_its_agent_s_other_one_serves(herd: Herd) -> None:
    member = herd.member()
    other = herd.member(subject_id=member.id)

    async def test() -> None:
        from sqlalchemy import update

        from pgherd.storage.control.schema import certificates

        with herd.store.begin() as connection:
            connection.execute(
                update(certificates).where(certificates.c.serial == member.issued.serial).values(revoked_unix_ns=1)
            )
        async with _server(herd, herd.gate()) as (port, _):
            async with herd.channel(member, port) as channel:
                assert (await _status(_open(channel, KINDS[0])))[0] == "UNAUTHENTICATED"
            async with herd.channel(other, port) as channel:
                await _admitted(_open(channel, KINDS[0]), KINDS[0])

    _run(test)


def test_clients_may_send_metrics_and_nothing_else_and_unnamed_services_are_open_to_nobody(herd: Herd) -> None:
    client, agent = herd.member(PeerKind.CLIENT), herd.member()

    async def test() -> None:
        async with _server(herd, herd.gate(), SERVICES) as (port, _):
            for member in (client, agent):
                async with herd.channel(member, port) as channel:
                    for rpc in ALL:
                        allowed = rpc.service.startswith("opentelemetry.") or (member is agent and rpc in REAL)
                        call = _open(channel, rpc, says=int(allowed))
                        if allowed:
                            await _admitted(call, rpc)
                            call.cancel()
                        else:
                            assert (await _status(call))[0] == "PERMISSION_DENIED", (member.id, rpc)

    _run(test)


LIVE = [rpc for rpc in ALL if rpc.streams_in or rpc.streams_out]


@pytest.mark.parametrize("how", ["revoked elsewhere", "revoked here", "expired", "store silent"])
def test_live_streams_are_cut_within_five_seconds(herd: Herd, how: str) -> None:
    """Revoked elsewhere: only the store knows, as when another process did it."""
    member, bystander = herd.member(), herd.member(lifetime_s=3 * DAY_S)
    # Revoked here: the watch sleeps, so that only the cut itself can be what ended them.
    gate = herd.gate(blind_s=1.0, recheck_s=600.0 if how == "revoked here" else 1.0)
    expected = {"expired": "identity.expired", "store silent": "store.unavailable"}.get(how, "identity.revoked")

    async def test() -> None:
        async with (
            _server(herd, gate) as (port, servicer),
            herd.channel(member, port) as channel,
            herd.channel(bystander, port) as other_channel,
        ):
            calls = [_open(channel, rpc, timeout_s=30) for rpc in LIVE]
            spared = _open(other_channel, KINDS[-1], timeout_s=30)
            for rpc, call in zip(LIVE, calls, strict=True):
                await _admitted(call, rpc)
            await _admitted(spared, KINDS[-1])
            await _until(lambda: gate.live_calls == len(LIVE) + 1)
            started_s = time.monotonic()
            if how == "expired":
                herd.clock.offset_s = DAY_S + 1
            elif how == "store silent":
                gate.source = _Silent()
            else:
                revoke_agent(herd.store, member.id, now_unix_ns=1, actor="test", via="test")
                if how == "revoked here":
                    assert gate.cut([member.id]) == len(LIVE)
            statuses = [await _status(call) for call in calls]
            took_s = time.monotonic() - started_s
            want = "UNAVAILABLE" if how == "store silent" else "UNAUTHENTICATED"
            assert [(code, details.split(":")[0]) for code, details in statuses] == [(want, expected)] * len(LIVE)
            assert took_s < 5.0
            if how != "store silent":
                assert not spared.done(), "somebody else's stream was cut too"
                assert gate.live_calls == 1
            spared.cancel()
            assert {str(rpc) for rpc in LIVE if rpc.streams_out} <= set(servicer.ended), "a handler went on after the cut"

    _run(test)


class _Silent:
    def standings(self, serials: Sequence[str]) -> Mapping[str, Standing]:
        raise TransientError("store.unavailable", "as told")


def test_a_new_rpc_waits_for_the_store_instead_of_being_trusted(herd: Herd) -> None:
    member = herd.member()
    gate = herd.gate()
    gate.source = _Silent()

    async def test() -> None:
        async with _server(herd, gate) as (port, servicer), herd.channel(member, port) as channel:
            for rpc in ALL:
                assert (await _status(_open(channel, rpc, says=0)))[0] == "UNAVAILABLE"
            assert servicer.served == []

    _run(test)


def test_a_caller_that_hangs_up_leaves_the_registry_without_an_error(herd: Herd, caplog: pytest.LogCaptureFixture) -> None:
    member = herd.member()
    gate = herd.gate()

    async def test() -> None:
        async with _server(herd, gate) as (port, servicer), herd.channel(member, port) as channel:
            call = _open(channel, KINDS[1])
            await _admitted(call, KINDS[1])
            call.cancel()
            await _until(lambda: gate.live_calls == 0)
            assert servicer.ended == [str(KINDS[1])]

    _run(test)
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_servicer_that_takes_its_cancellation_for_a_normal_end_still_ends_refused(herd: Herd) -> None:
    member, gate = herd.member(), herd.gate()

    async def polite(request: Any, context: Any) -> None:
        await context.write(control_pb2.CollectorMessage())
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    async def test() -> None:
        server = grpc.aio.server(interceptors=[PeerInterceptor(gate, OPEN_TO)])
        serializer = control_pb2.CollectorMessage.SerializeToString
        handler: Any = grpc.unary_stream_rpc_method_handler(polite, None, serializer)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Kinds", {"InFalseOutTrue": handler}),))
        port = server.add_secure_port("localhost:0", herd.certificate.grpc_credentials())
        await server.start()
        try:
            async with herd.channel(member, port) as channel:
                call = _open(channel, KINDS[1])
                await _admitted(call, KINDS[1])
                assert gate.cut([member.id]) == 1
                assert (await _status(call))[0] == "UNAUTHENTICATED"
        finally:
            await server.stop(None)

    _run(test)


def test_the_server_certificate_is_swapped_while_serving(herd: Herd) -> None:
    member = herd.member()

    async def test() -> None:
        async with _server(herd, herd.gate()) as (port, _):
            async with herd.channel(member, port) as channel:
                await _admitted(_open(channel, KINDS[0]), KINDS[0])
                before = await asyncio.to_thread(_served_serial, port)
                herd.clock.offset_s = 21 * DAY_S
                assert herd.certificate.renew_if_due()
                herd.clock.offset_s = 0
                await _admitted(_open(channel, KINDS[0]), KINDS[0])  # the old connection goes on
            assert await asyncio.to_thread(_served_serial, port) not in (0, before)

    _run(test)


def _served_serial(port: int) -> int:
    import socket
    import ssl

    from cryptography import x509

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with socket.create_connection(("localhost", port), 5) as plain, context.wrap_socket(plain) as secured:
        der = secured.getpeercert(binary_form=True)
        assert der is not None
        return x509.load_der_x509_certificate(der).serial_number

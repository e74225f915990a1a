"""Callers who connect and do nothing, send slowly, or don't take their answer: each is hung up on, and bounded in number."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from pgherd.collector.api.serving import OwnedServer, strangers_server
from pgherd.collector.api.socketpeer import PeerCredentialProtocol
from pgherd.collector.listeners import BoundedListener, ConnectionLimits, Limits, tcp_listener, unix_listener
from pgherd.proto.errors import ConfigError, PreconditionError
from support.identity import Herd, served
from support.waiting import wait_until

pytestmark = pytest.mark.fault

_BIG_BYTES = 64 * 1024 * 1024


class ImpatientProtocol(PeerCredentialProtocol):
    request_timeout_s = 0.3
    exchange_timeout_s = 1.0


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    request = Request(scope, receive)
    body = await request.body()
    answer: Response = PlainTextResponse(b"x" * (_BIG_BYTES if request.url.path == "/big" else len(body)))
    await answer(scope, receive, send)


@pytest.fixture
def address() -> Iterator[tuple[str, int]]:
    config = uvicorn.Config(app, http=ImpatientProtocol, ws="none", lifespan="off", log_config=None, timeout_keep_alive=2)
    with socket.create_server(("127.0.0.1", 0)) as listener, served(OwnedServer(config), listener):
        yield listener.getsockname()


def _is_hung_up_on(connection: socket.socket) -> bool:
    """Waits for the other side's end; False when it doesn't come within ten seconds."""
    connection.settimeout(10)
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


WHOLE = b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx"


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /a HTTP/1.1\r\nHost: x\r\n",
        b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf",
        WHOLE + b"GET /a HTTP/1.1\r\n",
        WHOLE + WHOLE + b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n",
    ],
    ids=["nothing", "half a head", "half a body", "half a second head", "half a pipelined body"],
)
def test_a_request_that_doesn_t_arrive_is_hung_up_on(address: tuple[str, int], sent: bytes) -> None:
    with socket.create_connection(address, 10) as connection:
        connection.sendall(sent)
        assert _is_hung_up_on(connection)


def test_half_a_request_after_an_answer_is_hung_up_on(address: tuple[str, int]) -> None:
    with socket.create_connection(address, 10) as connection:
        connection.sendall(WHOLE)
        answer = b""
        while not answer.endswith(b"\r\n\r\nx"):
            answer += connection.recv(65536)
        connection.sendall(b"GET /a HTTP/1.1\r\n")  # ends uvicorn's keep-alive timer
        assert _is_hung_up_on(connection)


def test_an_answer_that_isn_t_taken_is_hung_up_on(address: tuple[str, int]) -> None:
    with socket.create_connection(address, 10) as connection:
        connection.sendall(b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(12) == b"HTTP/1.1 200"
        local = connection.getsockname()

        def is_gone() -> bool:
            return not any(c.raddr == local for c in psutil.Process().net_connections("tcp") if c.laddr == address)

        wait_until(is_gone, 10, "the collector's side to be gone")


def test_a_connection_in_use_lives_on(address: tuple[str, int]) -> None:
    with socket.create_connection(address, 10) as connection:
        for _ in range(8):  # longer than either timeout, were it the connection's
            connection.sendall(WHOLE)
            answer = b""
            while not answer.endswith(b"\r\n\r\nx"):
                chunk = connection.recv(65536)
                assert chunk
                answer += chunk
            threading.Event().wait(0.2)


def _dial(listener: socket.socket) -> socket.socket:
    family, target = listener.family, listener.getsockname()
    caller = socket.socket(family)
    caller.connect(target)
    return caller


def test_one_connection_too_many_is_closed_and_room_comes_back() -> None:
    listener = BoundedListener(socket.create_server(("127.0.0.1", 0)), ConnectionLimits(total=2, per_source=9))
    with listener:
        callers, accepted = [], []
        for _ in range(2):
            callers.append(_dial(listener))
            accepted.append(listener.accept()[0])
        callers.append(_dial(listener))
        with pytest.raises(ConnectionAbortedError):
            listener.accept()
        assert _is_hung_up_on(callers[-1])
        assert (listener.connections, listener.refused) == (2, 1)
        left = accepted.pop()  # held on to: its end is what counts, not the garbage collector
        left.close()
        callers.append(_dial(listener))
        accepted.append(listener.accept()[0])
        assert listener.connections == 2
        for connection in (*callers, *accepted):
            connection.close()


def test_one_source_can_t_take_all(tmp_path: Path) -> None:
    listener = BoundedListener(socket.create_server(("127.0.0.1", 0)), ConnectionLimits(total=9, per_source=1))
    with listener, _dial(listener) as first, listener.accept()[0], _dial(listener) as second:
        with pytest.raises(ConnectionAbortedError):
            listener.accept()
        with socket.create_connection(listener.getsockname(), source_address=("127.0.0.2", 0)) as other:
            listener.accept()[0].close()
        assert first.fileno() > 0
        assert other.fileno() < 0 < second.fileno()


def test_strangers_without_tls_are_bounded_and_members_still_get_through(tmp_path: Path) -> None:
    """Connections in the TLS handshake aren't the application's yet, but they are descriptors."""
    herd = Herd.create(tmp_path / "herd")
    listener = BoundedListener(socket.create_server(("127.0.0.1", 0)), ConnectionLimits(total=100, per_source=5))
    address = listener.getsockname()

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("ok")(scope, receive, send)

    silent = []
    with listener, served(strangers_server(answer, herd.certificate.ssl_context()), listener):
        for _ in range(20):
            caller = socket.create_connection(address, 10)
            silent.append(caller)
        wait_until(lambda: listener.refused >= 15, 10, "the surplus to be closed")
        assert listener.connections <= 5
        ask = (
            "import socket, ssl, sys; context = ssl.create_default_context(cafile=sys.argv[2]);"
            "raw = socket.create_connection(('127.0.0.1', int(sys.argv[1])), 10, source_address=('127.0.0.2', 0));"
            "tls = context.wrap_socket(raw, server_hostname='localhost');"
            "tls.sendall(b'GET / HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n'); print(tls.recv(99))"
        )
        ca = tmp_path / "ca.crt"
        ca.write_bytes(herd.ca.certificate_pem)
        done = subprocess.run(
            [sys.executable, "-c", ask, str(address[1]), str(ca)], capture_output=True, text=True, timeout=30, check=True
        )
        assert "200 OK" in done.stdout
    for caller in silent:
        caller.close()
    herd.close()


@pytest.mark.parametrize("descriptors", [256, 1024, 4096, 65_536, 1_000_000])
def test_the_shares_leave_descriptors_for_the_collector_s_own_files(descriptors: int) -> None:
    limits = Limits.of(descriptors)
    taken = limits.http.total + limits.local.total + limits.enrol.total + limits.otlp.total + limits.grpc
    assert taken <= descriptors * 15 / 16
    assert min(limits.local.per_source, limits.enrol.per_source) > 0


def test_the_socket_replaces_what_a_killed_collector_left_and_nothing_else(tmp_path: Path) -> None:
    directory = Path(os.path.realpath(f"/tmp/pgherd-sock-{os.getpid()}"))
    directory.mkdir(exist_ok=True)
    path, limits = directory / "c.sock", ConnectionLimits(4, 4)
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(path))
    assert path.exists()
    with unix_listener(path, limits) as listener:
        listener.listen()
        with pytest.raises(PreconditionError) as caught, unix_listener(path, limits):
            pass
        assert caught.value.code == "state.locked"
        assert path.exists()
    assert not path.exists()
    path.write_text("precious")
    with pytest.raises(ConfigError) as refused, unix_listener(path, limits):
        pass
    assert (refused.value.code, path.read_text()) == ("config.invalid", "precious")
    path.unlink()
    directory.rmdir()
    for unusable in (tmp_path / ("long" * 30), tmp_path / "absent" / "c.sock"):
        with pytest.raises(ConfigError), unix_listener(unusable, limits):
            pass


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:1", "example.org:80", "127.0.0.1.example.org:80"])
def test_plain_http_stays_on_loopback(address: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tcp_listener(address, "http.listen", ConnectionLimits(1, 1), loopback_only=True)
    assert caught.value.code == "config.invalid"


def test_answers_don_t_wait_for_nagle() -> None:
    """asyncio sets TCP_NODELAY by the socket's protocol number; without it each answer is 40 ms late."""
    options: list[int] = []

    async def note(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        options.append(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async def story() -> None:
        with tcp_listener("127.0.0.1:0", "x", ConnectionLimits(1, 1)) as listener:
            async with await asyncio.start_server(note, sock=listener):
                reader, writer = await asyncio.open_connection(*listener.getsockname())
                await reader.read()
                writer.close()
                await writer.wait_closed()

    asyncio.run(asyncio.wait_for(story(), 20))
    assert options == [1]


def test_a_taken_port_is_told() -> None:
    with tcp_listener("127.0.0.1:0", "x", ConnectionLimits(1, 1)) as taken:
        taken.listen()
        with pytest.raises(PreconditionError):
            tcp_listener(f"127.0.0.1:{taken.getsockname()[1]}", "x", ConnectionLimits(1, 1))

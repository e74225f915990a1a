"""uvicorn as a part of a process that owns its signals, its sockets and its logging."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Iterator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

_CONNECTION_LIFETIME_S = 60.0
# A request that takes longer to arrive, or an answer that takes longer to make and to be taken, isn't waited for.
REQUEST_TIMEOUT_S = 30.0
EXCHANGE_TIMEOUT_S = 300.0


class OwnedServer(uvicorn.Server):
    """A server that leaves SIGTERM and SIGINT alone (uvicorn's re-raises them before our cleanup).

    Serve with `await server.serve(sockets=[...])`; end it with `server.should_exit = True`.
    """

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class TimedProtocol(H11Protocol):
    """HTTP/1.1 that hangs up on a request that doesn't arrive, and on an answer that isn't taken.

    uvicorn itself only limits the pause after an answer.
    """

    request_timeout_s = REQUEST_TIMEOUT_S
    exchange_timeout_s = EXCHANGE_TIMEOUT_S
    _deadline: asyncio.TimerHandle | None = None
    _is_request_whole = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._hang_up_in(self.request_timeout_s)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        was_whole, self._is_request_whole = self._is_request_whole, self.conn.their_state not in (h11.IDLE, h11.SEND_BODY)
        if self._is_request_whole and not was_whole:
            self._hang_up_in(self.exchange_timeout_s)
        elif self._deadline is None:  # the first bytes of a further request
            self._hang_up_in(self.request_timeout_s)

    def on_response_complete(self) -> None:
        if not self.transport.get_write_buffer_size():  # "complete" is when all is in the buffer, taken or not
            self._forget_deadline()
        self._is_request_whole = False
        super().on_response_complete()  # uvicorn's keep-alive timer takes over, unless a pipelined request waited
        if self.timeout_keep_alive_task is None:
            self._is_request_whole = self.conn.their_state not in (h11.IDLE, h11.SEND_BODY)
            self._hang_up_in(self.exchange_timeout_s if self._is_request_whole else self.request_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_deadline()
        super().connection_lost(exc)

    def _hang_up_in(self, seconds: float) -> None:
        self._forget_deadline()
        self._deadline = self.loop.call_later(seconds, self.transport.abort)

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class BriefProtocol(H11Protocol):
    """HTTP/1.1 for strangers: a connection ends after a minute whatever it does, or doesn't do.

    uvicorn has no timeout for a connection that never sends a request.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadline = self.loop.call_later(_CONNECTION_LIFETIME_S, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)


def strangers_server(app: Any, context: ssl.SSLContext) -> OwnedServer:
    """An HTTPS server for the enrolment port: few connections, short ones, small headers."""
    config = uvicorn.Config(
        app,
        http=BriefProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=512,
        backlog=512,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=16 * 1024,
        ssl_context_factory=lambda _config, _default: context,
    )
    return OwnedServer(config)

"""uvicorn as a part of a process that owns its signals, its sockets and its logging."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

_CONNECTION_LIFETIME_S = 60.0


class OwnedServer(uvicorn.Server):
    """A server that leaves SIGTERM and SIGINT alone (uvicorn's re-raises them before our cleanup).

    Serve with `await server.serve(sockets=[...])`; end it with `server.should_exit = True`.
    """

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


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

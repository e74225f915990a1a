"""A blocking HTTP client of an ASGI application in this process: no port, no server, any number of threads."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import httpx
from anyio.from_thread import BlockingPortal, start_blocking_portal
from fastapi import FastAPI


class AsgiClient:
    """Open while used as a context manager; every request runs on one event loop in a thread of its own."""

    def __init__(self, app: FastAPI) -> None:
        self._client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://collector.test")
        self._portals = start_blocking_portal()
        self._portal: BlockingPortal | None = None

    def __enter__(self) -> AsgiClient:
        self._portal = self._portals.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._portal is not None
        self._portal.call(self._client.aclose)
        self._portals.__exit__(kind, error, trace)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """The answer of one request; options are httpx's."""
        assert self._portal is not None, "use as a context manager"

        async def send() -> httpx.Response:
            return await self._client.request(method, path, **options)

        return self._portal.call(send)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.request("POST", path, **options)

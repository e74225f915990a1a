"""The HTTP application of :7432 and the UNIX socket: routers in front of one authenticator.

Open to everybody who can connect: `/healthz` (the process turns) and `/readyz` (it can take and answer).
All the rest needs a token or the local socket; see auth.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pgherd.collector.api.auth import Actor, Authenticator, require
from pgherd.collector.api.problems import install_problem_handler, problem_response
from pgherd.collector.exposition import CONTENT_TYPE, Family, render
from pgherd.proto.errors import InvariantError
from pgherd.runtime.logging import get_logger
from pgherd.storage.series.batch import ShipmentState

_log = get_logger(__name__)

BODY_BYTES_MAX = 1024 * 1024

Viewer = Annotated[Actor, Depends(require("viewer"))]


class BodyLimit:
    """Answers 413 to a body over the limit: FastAPI reads bodies before it asks who sent them."""

    def __init__(self, app: ASGIApp, bytes_max: int = BODY_BYTES_MAX) -> None:
        self._app = app
        self._bytes_max = bytes_max

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        if not stated.isdigit() or int(stated) > self._bytes_max:
            await _too_large(send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._bytes_max:  # chunked, without a stated length
                return {"type": "http.disconnect"}
            return message

        await self._app(scope, counted, send)


async def _too_large(send: Send) -> None:
    body = json.dumps({"title": "the request's body is too large", "status": 413}).encode()
    headers = [
        (b"content-type", b"application/problem+json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def http_app(
    authenticator: Authenticator,
    routers: Sequence[APIRouter],
    *,
    ready: Callable[[], dict[str, bool]],
    families: Callable[[], list[Family]],
    shipments: Callable[[], list[ShipmentState]],
    notes: Callable[[], list[str]] = list,
) -> FastAPI:
    """The application. `ready` names each part that must work and whether it does, `notes` what somebody should look at."""
    app = FastAPI(title="pgherd collector", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.authenticator = authenticator
    install_problem_handler(app)
    app.add_exception_handler(Exception, _answer_unexpected)
    app.add_exception_handler(StarletteHTTPException, _answer_unrouted)
    app.add_middleware(GZipMiddleware, minimum_size=1024, compresslevel=4)  # 9 takes four times the CPU for 5 % less
    app.add_middleware(BodyLimit)

    @app.get("/healthz", include_in_schema=False)
    async def healthz() -> Response:
        return PlainTextResponse("ok\n")

    @app.get("/readyz", include_in_schema=False)
    async def readyz() -> Response:
        parts, noted = await asyncio.to_thread(lambda: (ready(), notes()))
        body = {"ready": all(parts.values()), "parts": parts, "notes": noted}
        return JSONResponse(body, status_code=200 if all(parts.values()) else 503)

    @app.get("/api/v1/openapi.json", include_in_schema=False)
    async def schema(_actor: Viewer) -> dict[str, Any]:
        return app.openapi()

    @app.get("/metrics", include_in_schema=False)
    async def metrics(_actor: Viewer) -> Response:
        return Response(render(await asyncio.to_thread(families)), media_type=CONTENT_TYPE)

    @app.get("/api/v1/shipments", tags=["ingest"])
    async def list_shipments(_actor: Viewer) -> dict[str, Any]:
        """What is durably stored of each agent's incarnations: the collector's side of the books."""
        items = [
            {name: getattr(state, name) for name in ShipmentState.__dataclass_fields__}
            for state in await asyncio.to_thread(shipments)
        ]
        return {"items": items, "next_cursor": None}

    for router in routers:
        app.include_router(router)
    return app


def _answer_unexpected(request: Request, error: Exception) -> Response:
    """A bug of ours: logged whole, told without details."""
    _log.error("http.unexpected", path=request.url.path, error=repr(error), exc_info=error)
    return problem_response(InvariantError("invariant.broken", "the collector met an unexpected condition", hint="see its log"))


def _answer_unrouted(request: Request, error: Exception) -> Response:
    """An unknown path or method. Grafana tells Prometheus' flavours apart by this very text of Go's."""
    assert isinstance(error, StarletteHTTPException), "registered for this class only"
    if error.status_code == 404 and request.url.path.startswith("/prometheus/"):
        return PlainTextResponse("404 page not found\n", status_code=404)
    body = {"type": "about:blank", "title": str(error.detail), "status": error.status_code}
    return JSONResponse(body, status_code=error.status_code, headers=error.headers, media_type="application/problem+json")

"""Nodes, agents, commands and backups over HTTP: `/api/v1`.

Listings are pages `{"items": [...], "next_cursor": "..." | null}`. Reading needs the scope viewer, issuing
a command operator. A POST answers 202 once the command is durable; what became of it is asked with
`GET /commands/{id}?wait_s=30`, which answers as soon as the command changes state.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Depends, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from pgherd.collector.control.dispatch import Dispatcher
from pgherd.collector.control.ledger import ACCEPT_WITHIN_DEFAULT_S
from pgherd.collector.control.views import PAGE_MAX, Page, Views
from pgherd.proto.commands import verb_from_json
from pgherd.proto.errors import ConfigError
from pgherd.runtime.config import parse_duration_s

WAIT_S_MAX = 60.0
_IDLE_TURN_S = 5.0  # a change that another process made is seen this late


class ActorLike(Protocol):
    """Who asks (pgherd.collector.api.auth.Actor)."""

    @property
    def name(self) -> str: ...
    @property
    def via(self) -> str: ...


Require = Callable[[str], Callable[..., Any]]


class CommandRequest(BaseModel):
    """Body of POST /commands."""

    model_config = ConfigDict(extra="forbid")

    node: str = Field(min_length=1, max_length=255)
    verb: str = Field(max_length=40)
    arguments: dict[str, str] = Field(default_factory=dict, max_length=8)
    idempotency_key: str | None = Field(default=None, min_length=1, max_length=255)
    accept_within: str | None = Field(default=None, max_length=20)

    def accept_within_s(self) -> float:
        """Raises ConfigError usage.invalid."""
        if self.accept_within is None:
            return ACCEPT_WITHIN_DEFAULT_S
        try:
            return parse_duration_s(self.accept_within)
        except ValueError as error:
            raise ConfigError("usage.invalid", f"accept_within: {error}") from error


@dataclass(frozen=True, slots=True)
class _Listing:
    """The parameters that every listing takes."""

    limit: Annotated[int, Query(ge=1, le=PAGE_MAX)] = 100
    cursor: Annotated[str | None, Query(max_length=2048)] = None


Listing = Annotated[_Listing, Depends()]


def _page(page: Page) -> dict[str, Any]:
    return {"items": page.items, "next_cursor": page.next_cursor}


def control_router(dispatcher: Dispatcher, views: Views, require: Require) -> APIRouter:
    """The routes, to be included by the composition root. `require(scope)` makes the dependency that gives the actor."""
    router = APIRouter(prefix="/api/v1", tags=["control"])
    reading = [Depends(require("viewer"))]
    operator = Depends(require("operator"))

    @router.get("/nodes", dependencies=reading)
    async def list_nodes(page: Listing, cluster: str | None = None) -> dict[str, Any]:
        return _page(await asyncio.to_thread(views.nodes, limit=page.limit, cursor=page.cursor, cluster=cluster))

    @router.get("/nodes/{name:path}", dependencies=reading)
    async def show_node(name: str) -> dict[str, Any]:
        return await asyncio.to_thread(views.node, name)

    @router.get("/agents", dependencies=reading)
    async def list_agents(page: Listing) -> dict[str, Any]:
        return _page(await asyncio.to_thread(views.agents, limit=page.limit, cursor=page.cursor))

    @router.get("/backups", dependencies=reading)
    async def list_backups(page: Listing, node: str | None = None) -> dict[str, Any]:
        return _page(await asyncio.to_thread(views.backups, limit=page.limit, cursor=page.cursor, node=node))

    @router.get("/commands", dependencies=reading)
    async def list_commands(
        page: Listing,
        node: str | None = None,
        state: str | None = None,
        open_only: Annotated[bool, Query(alias="open")] = False,
    ) -> dict[str, Any]:
        return _page(
            await asyncio.to_thread(
                views.commands, limit=page.limit, cursor=page.cursor, node=node, state=state, open_only=open_only
            )
        )

    @router.get("/commands/{command_id}", dependencies=reading)
    async def show_command(command_id: str, wait_s: Annotated[float, Query(ge=0, le=WAIT_S_MAX)] = 0.0) -> dict[str, Any]:
        return await _wait_for_change(dispatcher, views, command_id, wait_s)

    @router.get("/commands/{command_id}/events", dependencies=reading)
    async def list_events(command_id: str) -> dict[str, Any]:
        return {"items": await asyncio.to_thread(views.events, command_id), "next_cursor": None}

    @router.post("/commands", status_code=202)
    async def issue(request: CommandRequest, response: Response, actor: Any = operator) -> dict[str, Any]:
        issuer: ActorLike = actor
        submitted = await dispatcher.submit(
            request.node,
            verb_from_json(request.verb, request.arguments),
            actor=issuer.name,
            via=issuer.via,
            idempotency_key=request.idempotency_key,
            accept_within_s=request.accept_within_s(),
        )
        response.headers["Location"] = f"/api/v1/commands/{submitted.command_id}"
        return await asyncio.to_thread(views.command, submitted.command_id) | {"created": submitted.created}

    return router


async def _wait_for_change(dispatcher: Dispatcher, views: Views, command_id: str, wait_s: float) -> dict[str, Any]:
    """The command as soon as its state differs from the one at the call, or it isn't open, or time is up."""
    deadline_s = asyncio.get_running_loop().time() + wait_s
    with dispatcher.watching(command_id) as changed:
        first = shown = await asyncio.to_thread(views.command, command_id)
        while shown["open"] and shown["state"] == first["state"]:
            left_s = deadline_s - asyncio.get_running_loop().time()
            if left_s <= 0:
                break
            try:
                async with asyncio.timeout(min(left_s, _IDLE_TURN_S)):
                    await changed.wait()
            except TimeoutError:
                pass
            changed.clear()
            shown = await asyncio.to_thread(views.command, command_id)
    return shown

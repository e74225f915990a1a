"""Silences and maintenance windows over HTTP: anybody who may read sees them, an operator changes them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field

from pgherd.collector.alerting.silencing import Author, Silencer, start_in_zone
from pgherd.collector.api.auth import Actor
from pgherd.proto.errors import ConfigError

_UNIX_NS_MAX = 1 << 62
_Matchers = Annotated[list[Annotated[str, Field(max_length=4096)]], Field(max_length=32)]
_Time = Annotated[int, Field(ge=0, lt=_UNIX_NS_MAX)]
_Seconds = Annotated[float, Field(gt=0, le=366 * 86_400)]


class NewSilence(BaseModel):
    """Mutes alerts that match, from now or `starts_unix_ns` until `ends_unix_ns` or for `duration_s`."""

    model_config = ConfigDict(extra="forbid")

    matchers: _Matchers
    starts_unix_ns: _Time | None = None
    ends_unix_ns: _Time | None = None
    duration_s: _Seconds | None = None
    comment: str = Field(default="", max_length=4000)


class NewWindow(BaseModel):
    """Mutes alerts that match once, at the wall-clock time `start` of `zone`, or on each of `days` at `at`."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=255)
    matchers: _Matchers
    duration_s: _Seconds
    zone: str = Field(default="UTC", max_length=64)
    start: str | None = Field(default=None, max_length=32)
    days: list[Annotated[str, Field(max_length=3)]] = Field(default_factory=list, max_length=7)
    at: str | None = Field(default=None, max_length=5)
    comment: str = Field(default="", max_length=4000)


def silences_router(
    silencer: Silencer, require: Callable[[str], Callable[..., Any]], changed: Callable[[], None] = lambda: None
) -> APIRouter:
    """Routes under /api/v1. `changed` is called on the event loop after every change (Notifier.wake)."""
    router = APIRouter(prefix="/api/v1", tags=["silences"])
    reads = [Depends(require("viewer"))]
    operator = Depends(require("operator"))

    @router.get("/silences", dependencies=reads)
    async def silences() -> dict[str, Any]:
        """All silences that are active, to come, or ended lately."""
        return {"items": await asyncio.to_thread(silencer.silences), "next_cursor": None}

    @router.post("/silences", status_code=201)
    async def add(body: NewSilence, actor: Actor = operator) -> dict[str, str]:
        """Add a silence."""

        def work() -> str:
            return silencer.add(
                body.matchers,
                starts_unix_ns=body.starts_unix_ns,
                ends_unix_ns=body.ends_unix_ns,
                duration_s=body.duration_s,
                comment=body.comment,
                author=_author(actor),
            )

        id_ = await asyncio.to_thread(work)
        changed()
        return {"id": id_}

    @router.delete("/silences/{silence_id}")
    async def expire(silence_id: str, actor: Actor = operator) -> dict[str, str]:
        """End a silence now: alerts that still fire are told at once."""
        await asyncio.to_thread(silencer.expire, silence_id, _author(actor))
        changed()
        return {"id": silence_id}

    @router.get("/maintenance", dependencies=reads)
    async def windows() -> dict[str, Any]:
        """All recurring windows; windows that come once are silences."""
        return {"items": await asyncio.to_thread(silencer.windows), "next_cursor": None}

    @router.post("/maintenance", status_code=201)
    async def add_window(body: NewWindow, actor: Actor = operator) -> dict[str, str]:
        """Add a window: with `start` it comes once (and is a silence), with `at` it recurs."""
        id_, kind = await asyncio.to_thread(_add_window, silencer, body, _author(actor))
        changed()
        return {"id": id_, "kind": kind}

    @router.delete("/maintenance/{window_id}")
    async def remove_window(window_id: str, actor: Actor = operator) -> dict[str, str]:
        """Delete a recurring window."""
        await asyncio.to_thread(silencer.remove_window, window_id, _author(actor))
        changed()
        return {"id": window_id}

    return router


def _add_window(silencer: Silencer, body: NewWindow, author: Author) -> tuple[str, str]:
    if (body.start is None) == (body.at is None):
        raise ConfigError("usage.invalid", "a window has either start (once) or at (recurring)")
    comment = body.comment or body.name
    if body.start is not None:
        start = start_in_zone(body.start, body.zone)
        id_ = silencer.add(body.matchers, starts_unix_ns=start, duration_s=body.duration_s, comment=comment, author=author)
        return id_, "silence"
    id_ = silencer.add_window(
        body.name,
        body.matchers,
        days=body.days,
        at=body.at or "",
        duration_s=body.duration_s,
        zone=body.zone,
        comment=body.comment,
        author=author,
    )
    return id_, "window"


def _author(actor: Actor) -> Author:
    return Author(actor.name, actor.via)

"""Nodes, agents, commands and backups over HTTP: pages, waiting, scopes, errors as problem+json."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI, Request

from pgherd.collector.api.control import control_router
from pgherd.collector.api.problems import install_problem_handler
from pgherd.proto.commands import Event
from pgherd.proto.errors import DeniedError
from support.control import Plane, add_node, control_plane, enrol


@dataclass(frozen=True)
class Someone:
    name: str
    via: str


def require(scope: str) -> Callable[..., Any]:
    """Stands in for bearer tokens, which other tests are about: the header says the scope."""

    def dependency(request: Request) -> Someone:
        held = request.headers.get("scope", "")
        if scope == "operator" and held != "operator":
            raise DeniedError("auth.scope", "this needs operator")
        return Someone("token:ops", "http")

    return dependency


@contextlib.asynccontextmanager
async def api(directory: Path) -> AsyncIterator[tuple[Plane, httpx.AsyncClient]]:
    async with control_plane(directory) as plane:
        app = FastAPI()
        install_problem_handler(app)
        app.include_router(control_router(plane.dispatcher, plane.views, require))
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers={"scope": "operator"}) as client:
            yield plane, client


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


def test_a_command_is_issued_once_per_key_and_shown(tmp_path: Path) -> None:
    async def story() -> None:
        async with api(tmp_path) as (plane, client):
            agent = enrol(plane.store)
            add_node(plane.store, agent, "db1", "main")
            body = {"node": "main/db1", "verb": "backup.verify", "arguments": {"backup": "b1"}, "idempotency_key": "k"}
            first, again = await client.post("/api/v1/commands", json=body), await client.post("/api/v1/commands", json=body)
            assert (first.status_code, again.status_code) == (202, 202)
            assert (first.json()["created"], again.json()["created"]) == (True, False)
            assert first.json()["id"] == again.json()["id"]
            shown = (await client.get(first.headers["location"])).json()
            assert (shown["node"], shown["verb"], shown["state"], shown["actor"], shown["via"]) == (
                "db1", "backup.verify", "queued", "token:ops", "http",
            )  # fmt: skip
            other = await client.post("/api/v1/commands", json=body | {"verb": "ping", "arguments": {}})
            assert (other.status_code, other.json()["code"]) == (409, "command.conflict")

    run(story())


def test_requests_that_are_refused(tmp_path: Path) -> None:
    async def story() -> None:
        async with api(tmp_path) as (plane, client):
            agent = enrol(plane.store)
            add_node(plane.store, agent, "db1", "main")
            add_node(plane.store, agent, "db1", "other")
            good: dict[str, object] = {"node": "main/db1", "verb": "ping"}
            refusals: list[tuple[dict[str, object], int, str]] = [
                ({"node": "nowhere"}, 404, "node.not_found"),
                ({"node": "db1"}, 400, "usage.invalid"),  # two of that name
                ({"verb": "sh"}, 400, "usage.invalid"),
                ({"arguments": {"command": "rm"}}, 400, "usage.invalid"),
                ({"verb": "restore", "arguments": {"root": "r", "name": "../x"}}, 400, "usage.invalid"),
                ({"verb": "backup.verify", "arguments": {"backup": "../x"}}, 400, "usage.invalid"),
                ({"accept_within": "soon"}, 400, "usage.invalid"),
                ({"accept_within": "9d"}, 400, "usage.invalid"),
                ({"surprise": 1}, 400, "usage.invalid"),
                ({"node": 5}, 400, "usage.invalid"),
            ]
            for change, status, code in refusals:
                answer = await client.post("/api/v1/commands", json=good | change)
                assert (answer.status_code, answer.json()["code"]) == (status, code), change
                assert answer.headers["content-type"] == "application/problem+json"
            denied = await client.post("/api/v1/commands", json=good, headers={"scope": "viewer"})
            assert (denied.status_code, denied.json()["code"]) == (403, "auth.scope")
            beyond = [
                base64.urlsafe_b64encode(text.encode()).decode().rstrip("=") for text in ("9" * 30, "²", "-1", f"{2**63}")
            ]
            for path in (
                *(f"/api/v1/commands?cursor={cursor}" for cursor in beyond),
                "/api/v1/commands?cursor=nonsense",
                "/api/v1/commands?limit=0",
                "/api/v1/commands?state=odd",
            ):
                assert (await client.get(path)).json()["code"] == "usage.invalid", path
            missing = await client.get("/api/v1/commands/none")
            assert (missing.status_code, missing.json()["code"]) == (404, "command.not_found")
            assert (await client.get("/api/v1/commands")).json()["items"] == []

    run(story())


def test_pages_name_every_row_once(tmp_path: Path) -> None:
    async def story() -> None:
        async with api(tmp_path) as (plane, client):
            agent = enrol(plane.store)
            for name in "bca":
                enrol(plane.store, f"agent-{name}")
                node = add_node(plane.store, agent, f"db-{name}", "main")
                await client.post("/api/v1/commands", json={"node": node, "verb": "ping"})
                backup = {
                    "name": f"b-{name}", "node_id": "", "system_identifier": "7", "started_unix_ns": 1, "finished_unix_ns": 2,
                    "stored_bytes": 3, "databases": [], "complete": True, "warnings": [], "grade": "unproven",
                }  # fmt: skip
                own = (await client.post("/api/v1/commands", json={"node": node, "verb": "backup.run"})).json()["id"]
                await plane.dispatcher.record(agent, Event(own, 1, 1, "succeeded", backup))
            listings: list[tuple[str, dict[str, str], str, int]] = [
                ("/api/v1/nodes", {}, "id", 3),
                ("/api/v1/agents", {}, "id", 4),
                ("/api/v1/commands", {}, "id", 6),
                ("/api/v1/commands", {"open": "true"}, "id", 3),
                ("/api/v1/backups", {}, "name", 3),
            ]
            for path, asked, key, count in listings:
                seen: list[str] = []
                cursor: str | None = ""
                while cursor is not None:
                    at = {"cursor": cursor} if cursor else {}
                    page = (await client.get(path, params={"limit": "1"} | asked | at)).json()
                    seen += [row[key] for row in page["items"]]
                    cursor = page["next_cursor"]
                assert (len(seen), len(set(seen))) == (count, count), path
            assert [row["alias"] for row in (await client.get("/api/v1/nodes")).json()["items"]] == ["db-a", "db-b", "db-c"]
            assert (await client.get("/api/v1/nodes/main/db-a")).json()["alias"] == "db-a"

    run(story())


def test_waiting_answers_at_the_change_and_not_before(tmp_path: Path) -> None:
    async def story() -> None:
        async with api(tmp_path) as (plane, client):
            agent = enrol(plane.store)
            node = add_node(plane.store, agent)
            command_id = (await client.post("/api/v1/commands", json={"node": node, "verb": "ping"})).json()["id"]
            waiting = asyncio.create_task(client.get(f"/api/v1/commands/{command_id}?wait_s=30"))
            done, _ = await asyncio.wait([waiting], timeout=0.2)
            assert not done
            await plane.dispatcher.record(agent, Event(command_id, 1, 1, "accepted"))
            assert (await asyncio.wait_for(waiting, 5)).json()["state"] == "accepted"
            assert (await client.get(f"/api/v1/commands/{command_id}?wait_s=0.05")).json()["state"] == "accepted"
            await plane.dispatcher.record(agent, Event(command_id, 2, 2, "succeeded", {"agent_unix_ns": 9}))
            over = await asyncio.wait_for(client.get(f"/api/v1/commands/{command_id}?wait_s=30"), 5)
            assert over.json()["result"] == {"agent_unix_ns": 9}
            events = (await client.get(f"/api/v1/commands/{command_id}/events")).json()["items"]
            assert [(one["sequence"], one["kind"]) for one in events] == [(1, "accepted"), (2, "succeeded")]
            too_long = await client.get(f"/api/v1/commands/{command_id}?wait_s=9999")
            assert too_long.json()["code"] == "usage.invalid"

    run(story())

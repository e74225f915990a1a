"""The HTTP application's frame: who may read what, limits, readiness, metrics, and bugs told without details."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import APIRouter

from pgherd.collector.api.app import BODY_BYTES_MAX, http_app
from pgherd.collector.api.auth import Authenticator
from pgherd.collector.exposition import Family, render, single
from pgherd.collector.identity.apitokens import Scope, create_api_token
from pgherd.runtime.clock import SystemClock
from pgherd.runtime.logging import configure
from pgherd.storage.control.store import ControlStore

FAMILIES = [
    single("pgherd_x", "gauge", "Help.", 2.5),
    Family("pgherd_y_total", "counter", "Help.", {(("code", 'a"b\\c\n'),): 3.0}),
]


class Harness:
    """The application over a real control store, called without a network."""

    def __init__(self, directory: Path) -> None:
        self.store = ControlStore.open(directory / "control.db")
        self.ready = {"series store": True}
        router = APIRouter()

        @router.get("/broken")
        async def broken() -> None:
            raise RuntimeError("secret detail")

        @router.post("/echo")
        async def echo(body: dict[str, Any]) -> int:
            return len(body["text"])

        authenticator = Authenticator(self.store, SystemClock())
        self.app = http_app(authenticator, [router], ready=lambda: self.ready, families=lambda: FAMILIES, shipments=list)

    def token(self, scope: Scope) -> dict[str, str]:
        now_unix_ns = SystemClock().wall_unix_ns()
        with self.store.begin() as connection:
            _, text = create_api_token(
                connection, name="t", scope=scope, lifetime_s=60, now_unix_ns=now_unix_ns, actor="test", via="test"
            )
        return {"Authorization": f"Bearer {text}"}

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://collector") as client:
                return await client.request(method, path, **options)

        return asyncio.run(ask())


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    return Harness(tmp_path)


def test_health_and_readiness_need_no_token(harness: Harness) -> None:
    assert harness.call("GET", "/healthz").status_code == 200
    assert harness.call("GET", "/readyz").json() == {"ready": True, "parts": {"series store": True}, "notes": []}
    harness.ready["series store"] = False
    assert harness.call("GET", "/readyz").status_code == 503


@pytest.mark.parametrize("path", ["/metrics", "/api/v1/shipments", "/api/v1/openapi.json"])
def test_everything_else_needs_one(harness: Harness, path: str) -> None:
    refused = harness.call("GET", path)
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"].startswith("Bearer")
    assert refused.json()["code"] == "auth.required"
    assert harness.call("GET", path, headers=harness.token(Scope.VIEWER)).status_code == 200


def test_metrics_are_prometheus_text(harness: Harness) -> None:
    text = harness.call("GET", "/metrics", headers=harness.token(Scope.VIEWER)).text
    assert text == render(FAMILIES)
    assert "pgherd_x 2.5\n" in text
    assert 'pgherd_y_total{code="a\\"b\\\\c\\n"} 3\n' in text


def test_a_bug_is_told_without_details(harness: Harness, capfd: pytest.CaptureFixture[str]) -> None:
    configure(json=True)  # as the collector does; structlog's own default draws tracebacks with all locals, for seconds
    answer = harness.call("GET", "/broken")
    assert answer.status_code == 500
    assert answer.json()["code"] == "invariant.broken"
    assert "secret detail" not in answer.text
    assert "secret detail" in capfd.readouterr().err


def test_unknown_paths_are_told_in_the_callers_language(harness: Harness) -> None:
    """Grafana probes a path that Prometheus doesn't have and looks for Go's own words."""
    probe = harness.call("GET", "/prometheus/api/v1/rules/test/test")
    assert (probe.status_code, probe.text) == (404, "404 page not found\n")
    own = harness.call("GET", "/api/v1/nothing")
    assert (own.status_code, own.headers["content-type"]) == (404, "application/problem+json")
    assert harness.call("DELETE", "/healthz").status_code == 405


def test_a_body_over_the_limit_is_refused_unread(harness: Harness) -> None:
    assert harness.call("POST", "/echo", json={"text": "x" * 1000}).json() == 1000
    assert harness.call("POST", "/echo", json={"text": "x" * BODY_BYTES_MAX}).status_code == 413


def test_a_chunked_body_is_counted_too(harness: Harness) -> None:
    taken = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal taken
        yield b'{"text": "'
        while True:
            taken += 65536
            yield b"x" * 65536
            if taken > 64 * BODY_BYTES_MAX:
                return

    assert harness.call("POST", "/echo", content=chunks()).status_code >= 400
    assert taken <= 2 * BODY_BYTES_MAX


def test_the_schema_lists_the_routes(harness: Harness) -> None:
    schema = harness.call("GET", "/api/v1/openapi.json", headers=harness.token(Scope.VIEWER)).json()
    assert "/api/v1/shipments" in schema["paths"]

"""Alerts over HTTP: pgherd's own list and Prometheus' shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, HTTPException

from pgherd.alerts.knowledge import Knowledge, Watched
from pgherd.collector.alerting.evaluation import Evaluator
from pgherd.collector.alerting.silencing import Silencer
from pgherd.collector.api.alerts import alerts_router, prometheus_alerts_router
from pgherd.storage.control.store import ControlStore
from support.alerts import SECOND_NS, START_UNIX_NS, Answers, TestClock, group, rule
from support.asgi import AsgiClient

WATCHED = (Watched("c:5432", "c", "main", "agent", "id"),)


def _require(scope: str) -> Callable[..., Any]:
    def dependency(token: str = "viewer") -> str:
        if token != scope:
            raise HTTPException(403)
        return token

    return dependency


@pytest.fixture
def client(tmp_path: Path) -> Iterator[AsgiClient]:
    """Instance a fires, b is pending, c is unknown, d is resolved; a second rule fails."""
    store = ControlStore.open(tmp_path / "control.sqlite")
    clock, query = TestClock(), Answers()
    high = rule(for_s=15, keep_firing_for_s=0, labels={"severity": "page"}, annotations={"summary": "{{ $labels.instance }}"})
    evaluator = Evaluator(
        groups=[group(high, rule("Broken", expr="broken"), limit=9)],
        store=store,
        query=query,
        facts=lambda _at_ms: Knowledge(WATCHED, frozenset(), frozenset()),
        clock=clock,
    )
    query.vectors["broken"] = ZeroDivisionError("bug")
    for instances in ("acd", "acd", "ab"):
        query.vectors["x > 1"] = [({"instance": f"{name}:5432"}, 2.0) for name in instances]
        clock.advance(15)
        for evaluation in evaluator._evaluations:
            evaluation.evaluate(clock.wall_unix_ns(), clock.mono_s(), clock)
    app = FastAPI()
    app.include_router(alerts_router(evaluator, Silencer(store, clock), clock, _require))
    app.include_router(prometheus_alerts_router(evaluator, _require))
    with AsgiClient(app) as opened:
        yield opened
    store.close()


def test_own_list_shows_every_state_and_pages(client: AsgiClient) -> None:
    page = client.get("/api/v1/alerts").json()
    assert page["next_cursor"] is None
    shown = {item["labels"]["instance"]: item for item in page["items"]}
    assert {name: item["state"] for name, item in shown.items()} == {
        "a:5432": "firing",
        "b:5432": "pending",
        "c:5432": "unknown",
        "d:5432": "resolved",
    }
    firing = shown["a:5432"]
    assert {key: firing[key] for key in ("rule", "group", "value", "labels", "annotations", "active_unix_ns")} == {
        "rule": "High",
        "group": "g",
        "value": 2.0,
        "labels": {"alertname": "High", "instance": "a:5432", "severity": "page"},
        "annotations": {"summary": "a:5432"},
        "active_unix_ns": START_UNIX_NS + 15 * SECOND_NS,
    }
    first = client.get("/api/v1/alerts?limit=3").json()
    rest = client.get("/api/v1/alerts", params={"limit": 3, "cursor": first["next_cursor"]}).json()
    assert first["items"] + rest["items"] == page["items"]
    assert rest["next_cursor"] is None
    narrowed = client.get("/api/v1/alerts?state=firing&state=unknown").json()["items"]
    assert sorted(item["state"] for item in narrowed) == ["firing", "unknown"]


def test_prometheus_alerts_are_pending_and_firing_only(client: AsgiClient) -> None:
    answer = client.get("/prometheus/api/v1/alerts").json()
    assert answer["status"] == "success"
    assert sorted(answer["data"]["alerts"], key=lambda alert: str(alert["labels"]["instance"])) == [
        {
            "labels": {"alertname": "High", "instance": "a:5432", "severity": "page"},
            "annotations": {"summary": "a:5432"},
            "state": "firing",
            "activeAt": "2025-10-09T08:53:35Z",
            "value": "2e+00",
        },
        {
            "labels": {"alertname": "High", "instance": "b:5432", "severity": "page"},
            "annotations": {"summary": "b:5432"},
            "state": "pending",
            "activeAt": "2025-10-09T08:54:05Z",
            "value": "2e+00",
        },
    ]


def test_prometheus_rules_have_its_shape(client: AsgiClient) -> None:
    (shown,) = client.get("/prometheus/api/v1/rules").json()["data"]["groups"]
    high, broken = shown["rules"]
    assert {key: shown[key] for key in ("name", "file", "interval", "limit", "lastEvaluation")} == {
        "name": "g",
        "file": "rules.yaml",
        "interval": 15.0,
        "limit": 9,
        "lastEvaluation": "2025-10-09T08:54:05Z",
    }
    assert len(high.pop("alerts")) == 2
    assert high.pop("evaluationTime") >= 0
    assert high == {
        "type": "alerting",
        "name": "High",
        "state": "firing",
        "query": "x > 1",
        "duration": 15.0,
        "keepFiringFor": 0.0,
        "labels": {"severity": "page"},
        "annotations": {"summary": "{{ $labels.instance }}"},
        "health": "ok",
        "lastEvaluation": "2025-10-09T08:54:05Z",
    }
    assert (broken["health"], broken["lastError"], broken["state"]) == ("err", "ZeroDivisionError: bug", "inactive")


@pytest.mark.parametrize(
    ("parameters", "names"),
    [
        ("type=alert", ["High", "Broken"]),
        ("type=record", None),
        ("rule_name[]=High", ["High"]),
        ("rule_name[]=None", None),
        ("rule_group[]=other", None),
        ("file[]=rules.yaml&rule_group[]=g", ["High", "Broken"]),
    ],
)
def test_rules_can_be_narrowed(client: AsgiClient, parameters: str, names: list[str] | None) -> None:
    groups = client.get(f"/prometheus/api/v1/rules?{parameters}").json()["data"]["groups"]
    assert [rule["name"] for shown in groups for rule in shown["rules"]] == (names or [])
    assert len(groups) == (1 if names else 0)
    excluded = client.get("/prometheus/api/v1/rules?exclude_alerts=true").json()["data"]["groups"]
    assert all(rule["alerts"] == [] for rule in excluded[0]["rules"])


@pytest.mark.parametrize("path", ["/api/v1/alerts", "/prometheus/api/v1/alerts", "/prometheus/api/v1/rules"])
def test_every_route_asks_who_is_there(client: AsgiClient, path: str) -> None:
    assert client.get(f"{path}?token=nobody").status_code == 403

"""Silences, maintenance windows and matchers: when they mute what, durable and audited, over HTTP too."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import structlog
from fastapi import FastAPI
from sqlalchemy import event, select, update

from pgherd.alerts.matchers import matches, parse_matcher
from pgherd.alerts.silence import weekly
from pgherd.collector.alerting.silencing import Author, Silencer, full_match, start_in_zone
from pgherd.collector.api.auth import Actor
from pgherd.collector.api.problems import install_problem_handler
from pgherd.collector.api.silences import silences_router
from pgherd.collector.identity.apitokens import Scope
from pgherd.proto.errors import ConfigError, DeniedError, PgherdError, PreconditionError
from pgherd.storage.control.schema import audit, maintenance_windows
from pgherd.storage.control.store import ControlStore
from support.alerts import SECOND_NS, START_UNIX_NS, TestClock
from support.asgi import AsgiClient

AUTHOR = Author("uid:ops", "socket")
ZURICH = ZoneInfo("Europe/Zurich")


def _ns(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp()) * SECOND_NS


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ControlStore]:
    opened = ControlStore.open(tmp_path / "control.sqlite")
    yield opened
    opened.close()


@pytest.mark.parametrize(
    ("text", "labels", "expected"),
    [
        ('node="a"', {"node": "a"}, True),
        ("node=a", {"node": "b"}, False),
        ('node!=""', {}, False),
        ('node=""', {}, True),
        ('node=~"a|b"', {"node": "b"}, True),
        ('node=~"a"', {"node": "ab"}, False),
        ('node!~"a.*"', {"node": "b"}, True),
        ('node="say \\"hi\\""', {"node": 'say "hi"'}, True),
    ],
)
def test_matchers(text: str, labels: dict[str, str], expected: bool) -> None:
    assert matches([parse_matcher(text)], labels, full_match) is expected


@pytest.mark.parametrize("text", ["", "node", "no-de=a", 'node="a', "node==a", 'a="b",c="d"'])
def test_what_isnt_a_matcher(text: str) -> None:
    with pytest.raises(ConfigError, match="isn't a matcher"):
        parse_matcher(text)


@pytest.mark.parametrize(
    ("moment", "active"),
    [
        ("2026-11-28T00:59:59Z", False),  # Saturday, 01:59:59 in Zurich
        ("2026-11-28T01:00:00Z", True),
        ("2026-11-28T02:59:59Z", True),
        ("2026-11-28T03:00:00Z", False),
        ("2026-11-27T01:30:00Z", False),  # Friday
        # The clocks jump from 02:00 to 03:00 on 2026-03-29 (a Sunday): 02:00 never happens, 03:00 does.
        ("2026-03-29T00:59:59Z", False),
        ("2026-03-29T01:00:00Z", True),
        ("2026-03-29T03:00:00Z", False),
        # They go back from 03:00 to 02:00 on 2026-10-25: the first 02:00 counts, for two hours of real time.
        ("2026-10-25T00:00:00Z", True),
        ("2026-10-25T01:59:59Z", True),
        ("2026-10-25T02:00:00Z", False),
    ],
)
def test_a_weekly_window_keeps_its_wall_clock_through_daylight_saving(moment: str, active: bool) -> None:
    window = weekly(["sat", "sun"], "02:00", 7200, ZURICH)
    assert window.is_active(_ns(moment)) is active


def test_a_window_reaches_over_midnight_and_knows_when_it_comes_next() -> None:
    window = weekly(["fri"], "23:00", 3 * 86_400, UTC)
    assert window.is_active(_ns("2026-11-30T22:59:00Z"))
    assert not window.is_active(_ns("2026-11-30T23:00:00Z"))
    assert window.next_start_unix_ns(_ns("2026-11-27T23:00:00Z")) == _ns("2026-12-04T23:00:00Z")


@pytest.mark.parametrize(
    ("days", "at", "duration_s"), [(["so"], "02:00", 3600), ([], "25:00", 3600), ([], "2", 3600), ([], "02:00", 8 * 86_400)]
)
def test_windows_that_arent(days: list[str], at: str, duration_s: float) -> None:
    with pytest.raises(ConfigError):
        weekly(days, at, duration_s, UTC)


def test_a_start_on_the_wall_clocks_of_a_zone() -> None:
    assert start_in_zone("2026-12-24T22:00", "Europe/Zurich") == _ns("2026-12-24T21:00:00Z")
    assert start_in_zone("2026-12-24T22:00+00:00", "Europe/Zurich") == _ns("2026-12-24T22:00:00Z")
    for local, zone in (("tomorrow", "UTC"), ("2026-12-24T22:00", "Europe/Nowhere"), ("2026-12-24T22:00", "../etc/passwd")):
        with pytest.raises(ConfigError):
            start_in_zone(local, zone)


def test_a_silence_is_durable_audited_and_ends(store: ControlStore) -> None:
    clock = TestClock()
    silencer = Silencer(store, clock)
    id_ = silencer.add(['node="a"'], duration_s=60, comment="disk swap", author=AUTHOR)
    again = Silencer(store, clock)
    again.load()
    for one in (silencer, again):
        assert one.silenced_by("f", {"node": "a"}, clock.wall_unix_ns()) == (id_,)
        assert one.silenced_by("g", {"node": "b"}, clock.wall_unix_ns()) == ()
    assert again.silenced_by("f", {"node": "a"}, clock.wall_unix_ns() + 60 * SECOND_NS) == ()
    clock.advance(30)
    silencer.expire(id_, AUTHOR)
    assert silencer.silenced_by("f", {"node": "a"}, clock.wall_unix_ns()) == ()
    assert [row["state"] for row in silencer.silences()] == ["expired"]
    silencer.expire(id_, AUTHOR)
    with store.read() as connection:
        assert [(row.actor, row.action) for row in connection.execute(select(audit))] == [
            ("uid:ops", "silence.added"),
            ("uid:ops", "silence.expired"),
        ]
    clock.advance(6 * 86_400)
    again.load()
    assert again.silences() == [], "and is forgotten"
    with pytest.raises(PreconditionError):
        silencer.expire(id_, AUTHOR)


def test_a_window_whose_time_zone_is_gone_mutes_nobody_and_stops_nothing(store: ControlStore) -> None:
    """The collector didn't start: an update had taken the zone's old name away."""
    clock = TestClock()
    silencer = Silencer(store, clock)
    windows: dict[str, Any] = {"days": [], "at": "00:00", "duration_s": 86_400, "zone": "UTC", "comment": "", "author": AUTHOR}
    lost, kept = (silencer.add_window(name, [f'node="{name}"'], **windows) for name in ("lost", "kept"))
    with store.begin() as connection:
        connection.execute(update(maintenance_windows).where(maintenance_windows.c.id == lost).values(zone="Europe/Gone"))
    again = Silencer(store, clock)
    with structlog.testing.capture_logs() as said:
        again.load()
    assert [(one["event"], one["log_level"], one["window"]) for one in said] == [("maintenance.unusable", "error", lost)]
    assert again.silenced_by("f", {"node": "lost"}, clock.wall_unix_ns()) == ()
    assert again.silenced_by("g", {"node": "kept"}, clock.wall_unix_ns()) == (kept,)
    assert {row["id"]: row["state"] for row in again.windows()} == {lost: "unusable", kept: "active"}
    again.remove_window(lost, AUTHOR)
    assert [row["id"] for row in again.windows()] == [kept]


def test_a_silence_to_come_is_pending_and_can_be_withdrawn(store: ControlStore) -> None:
    clock = TestClock()
    silencer = Silencer(store, clock)
    start = clock.wall_unix_ns() + 60 * SECOND_NS
    id_ = silencer.add(['node="a"'], starts_unix_ns=start, ends_unix_ns=start + SECOND_NS, author=AUTHOR)
    assert silencer.silences()[0]["state"] == "pending"
    assert silencer.silenced_by("f", {"node": "a"}, clock.wall_unix_ns()) == ()
    assert silencer.silenced_by("f", {"node": "a"}, start) == (id_,)
    silencer.expire(id_, AUTHOR)
    assert silencer.silences() == []


@pytest.mark.parametrize(
    "body",
    [
        {"matchers": [], "duration_s": 60},
        {"matchers": ["a=b"]},
        {"matchers": ["a=b"], "duration_s": 60, "ends_unix_ns": 1},
        {"matchers": ["a=b"], "ends_unix_ns": 1},
        {"matchers": ["a=~("], "duration_s": 60},
        {"matchers": ["a"], "duration_s": 60},
        {"matchers": ["a=b"], "duration_s": -1},
        {"matchers": ["a=b"], "duration_s": 60, "until": "x"},
        {"matchers": ["a=b"] * 33, "duration_s": 60},
    ],
)
def test_silences_over_http_refuse_what_they_cant_mean(client: AsgiClient, body: dict[str, Any]) -> None:
    assert client.post("/api/v1/silences?scope=operator", json=body).status_code in (400, 422)
    assert client.get("/api/v1/silences").json()["items"] == []


class _Scoped:
    """`require` of a test: the caller says its scope in the query."""

    def __call__(self, wanted: str) -> Any:
        async def dependency(scope: str = "viewer") -> Actor:
            if not Scope(scope).covers(Scope(wanted)):
                raise DeniedError("auth.scope", "no")
            return Actor("token:ops", Scope(scope), "http")

        return dependency


@pytest.fixture
def client(store: ControlStore) -> Iterator[AsgiClient]:
    app = FastAPI()
    app.include_router(silences_router(Silencer(store, TestClock()), _Scoped()))
    install_problem_handler(app)
    with AsgiClient(app) as opened:
        yield opened


def test_silences_over_http(client: AsgiClient) -> None:
    body = {"matchers": ['node="a"'], "duration_s": 60, "comment": "swap"}
    assert client.post("/api/v1/silences", json=body).status_code == 403
    id_ = client.post("/api/v1/silences?scope=operator", json=body).json()["id"]
    (shown,) = client.get("/api/v1/silences").json()["items"]
    assert {key: shown[key] for key in ("id", "state", "matchers", "actor", "comment", "ends_unix_ns")} == {
        "id": id_,
        "state": "active",
        "matchers": ['node="a"'],
        "actor": "token:ops",
        "comment": "swap",
        "ends_unix_ns": START_UNIX_NS + 60 * SECOND_NS,
    }
    assert client.request("DELETE", f"/api/v1/silences/{id_}").status_code == 403
    assert client.request("DELETE", f"/api/v1/silences/{id_}?scope=operator").status_code == 200
    assert client.request("DELETE", "/api/v1/silences/nobody?scope=operator").status_code == 404


def test_maintenance_over_http(client: AsgiClient) -> None:
    weekly_body = {"name": "patches", "matchers": ['cluster="m"'], "days": ["sun"], "at": "02:00", "duration_s": 7200}
    made = client.post("/api/v1/maintenance?scope=operator", json={**weekly_body, "zone": "Europe/Zurich"}).json()
    assert made["kind"] == "window"
    (shown,) = client.get("/api/v1/maintenance").json()["items"]
    assert (shown["name"], shown["days"], shown["at"], shown["state"]) == ("patches", ["sun"], "02:00", "waiting")
    once = {"name": "move", "matchers": ['node="a"'], "start": "2035-01-01T00:00", "duration_s": 60}
    assert client.post("/api/v1/maintenance?scope=operator", json=once).json()["kind"] == "silence"
    assert client.get("/api/v1/silences").json()["items"][0]["comment"] == "move"
    assert client.post("/api/v1/maintenance?scope=operator", json={**once, "at": "02:00"}).status_code == 400
    for start in ("9999-12-31T23:59", "0001-01-01T00:00", "9999-12-31T23:59-14:00", "2035-W01-1"):
        answer = client.post("/api/v1/maintenance?scope=operator", json={**once, "start": start, "zone": "Europe/Zurich"})
        assert answer.status_code == (201 if start.startswith("2035") else 400), start
    assert client.post("/api/v1/maintenance?scope=operator", json={**weekly_body, "zone": "Mars"}).status_code == 400
    assert client.request("DELETE", f"/api/v1/maintenance/{made['id']}?scope=operator").status_code == 200
    assert client.request("DELETE", f"/api/v1/maintenance/{made['id']}?scope=operator").status_code == 404


def test_a_change_that_isnt_committed_isnt_in_force(store: ControlStore) -> None:
    """A full disk refuses the COMMIT: nobody may be muted by what nobody can see, or heard again for want of it."""
    clock = TestClock()
    silencer = Silencer(store, clock)
    kept = silencer.add(['node="kept"'], duration_s=60, author=AUTHOR)

    def refuse(_connection: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    event.listen(store._engine, "commit", refuse)
    for change in (
        lambda: silencer.add(['node="phantom"'], duration_s=60, author=AUTHOR),
        lambda: silencer.expire(kept, AUTHOR),
    ):
        with pytest.raises((sqlite3.OperationalError, PgherdError)):
            change()
    event.remove(store._engine, "commit", refuse)
    assert silencer.silenced_by("f", {"node": "phantom"}, clock.wall_unix_ns()) == ()
    assert silencer.silenced_by("g", {"node": "kept"}, clock.wall_unix_ns()) == (kept,)

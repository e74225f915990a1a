"""The demo's story: named steps, each a real command or query whose answer decides whether it happened.

Every figure is measured while the step runs. A step that fails keeps its reason; the story goes on as far as
it makes sense and the demo exits with 1.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import psycopg
from commands import CommandError
from herd import Herd
from thresholds import CROSSED, crossed, note


@dataclass
class Step:
    """One step: whether it happened, how long it took, what was seen."""

    name: str
    ok: bool | None = None  # None while it runs
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        document = {"name": self.name, "ok": bool(self.ok), "seconds": round(self.seconds, 3), "figures": self.figures}
        if self.note:
            document["note"] = self.note
        if self.error:
            document["error"] = self.error
        return document


class NotSoError(Exception):
    """What a step promises isn't the case; the message says what was seen."""


def require(condition: object, seen: object) -> None:
    if not condition:
        raise NotSoError(str(seen))


def until(ask: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """Ask until the answer is true; commands that fail meanwhile count as not yet."""
    deadline = time.monotonic() + timeout_s
    last: object = "no answer"
    while time.monotonic() < deadline:
        try:
            last = ask()
            if last:
                return last
        except CommandError as error:
            last = error
        time.sleep(0.2)
    raise NotSoError(f"{what}: not within {timeout_s:g} s; last seen: {last}")


class Story:
    """Runs the steps and keeps their record; the view reads `steps` while it goes on."""

    def __init__(self, herd: Herd, at_the_worst: Callable[[], None] = lambda: None) -> None:
        """`at_the_worst` is called once, while all four thresholds are crossed and their alerts fire."""
        self.herd = herd
        self._at_the_worst = at_the_worst
        self.steps: list[Step] = []
        self._backup = ""

    @property
    def ok(self) -> bool:
        return bool(self.steps) and all(step.ok for step in self.steps)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[Step]:
        step = Step(name)
        self.steps.append(step)
        started = time.monotonic()
        try:
            yield step
            step.ok = True
        except (NotSoError, CommandError, psycopg.Error, OSError, KeyError, TypeError, ValueError) as error:
            step.ok = False
            step.error = f"{type(error).__name__}: {error}"
        finally:
            step.seconds = time.monotonic() - started

    def begin(self) -> None:
        """Until two agents are joined and report their nodes."""
        herd = self.herd
        with self.step("replication streams") as step, psycopg.connect(herd.pair.primary.conninfo()) as connection:
            version = connection.execute("SHOW server_version").fetchone()
            rows = until(
                lambda: connection.execute(
                    "SELECT application_name, state FROM pg_stat_replication WHERE state = 'streaming'"
                ).fetchall(),
                20,
                "a streaming standby",
            )
            step.figures = {
                "server_version": version[0] if version else None,
                "streaming_standbys": len(rows),
                "load": herd.pair.load,
            }
        with self.step("collector runs"):
            herd.start_collector()
        with self.step("agents joined with tokens over mTLS") as step:
            joined = [herd.join(server) for server in (herd.pair.primary, herd.pair.standby)]
            nodes = until(
                lambda: (
                    (rows := herd.pgherd("nodes", "ls"))
                    and all(row["condition"] == "up" for row in rows)
                    and len(rows) == 2
                    and rows
                ),
                30,
                "two nodes up",
            )
            step.figures = {
                "agents": [row["agent_id"] for row in joined],
                "roles": {row["alias"]: row["role"] for row in nodes},
            }
            require({row["role"] for row in nodes} == {"primary", "standby"}, nodes)

    def tell(self) -> None:
        """The main job, step by step."""
        for chapter in (self._samples, self._thresholds, self._backups, self._crash):
            chapter()

    def _instant(self, expression: str) -> list[dict[str, Any]]:
        answer: list[dict[str, Any]] = self.herd.pgherd("query", expression)["data"]["result"]
        return answer

    def _stored_points(self) -> int:
        return sum(agent["stored_points"] for agent in self.herd.pgherd("agents", "ls"))

    def _samples(self) -> None:
        with self.step("samples are ingested") as step:
            until(lambda: self._stored_points() > 1000, 20, "1000 stored points")
            first = self._stored_points()
            started = time.monotonic()
            second = until(lambda: (now := self._stored_points()) > first and now, 20, "more stored points")
            up = self._instant("pg_up == 1")
            step.figures = {
                "points_stored": second,
                "points_per_second": round((second - first) / (time.monotonic() - started), 1),
                "nodes_up": sorted(row["metric"]["node"] for row in up),
            }
            require(len(up) == 2, up)
        with self.step("series are there") as step:
            series = {
                row["metric"]["node"]: int(row["value"][1])
                for row in self._instant('count by (node) ({job="pgherd",node!=""})')
            }
            step.figures = {"series": series}
            require(set(series) == {"primary", "standby"} and min(series.values()) > 50, series)
        with self.step("a range query answers") as step:
            expression = 'sum(rate(pg_stat_database_xact_commit{node="primary",datname="shop"}[10s]))'
            time.sleep(max(0.0, 10 - step.seconds))  # two agents' ten seconds of load are worth a graph
            started = time.monotonic()
            answer = self.herd.pgherd("query", expression, "--range", "15s", "--step", "1s")
            points = [float(value) for _, value in answer["data"]["result"][0]["values"]]
            step.figures = {
                "expression": expression,
                "points": len(points),
                "commits_per_second_last": round(points[-1], 1),
                "seconds_with_command": round(time.monotonic() - started, 3),
            }
            require(len(points) >= 3 and points[-1] > 1, points)

    def _thresholds(self) -> None:
        """All four are crossed at once; each has to be notified as firing, and as resolved afterwards."""
        pair, webhook = self.herd.pair, self.herd.webhook
        with contextlib.ExitStack() as faults:
            began = time.monotonic()
            faults.enter_context(crossed(pair))
            for alert, what in CROSSED.items():
                with self.step(f"{what}: an alert fires") as step:
                    step.note = note(alert, pair.volume)
                    until(partial(webhook.alerts, alert, "firing"), 60, f"{alert} firing at the webhook")
                    firing = [row for row in self.herd.pgherd("alerts", "ls") if row["labels"]["alertname"] == alert]
                    step.figures = {
                        "alert": alert,
                        "node": [row["labels"]["node"] for row in firing],
                        "summary": [row["annotations"]["summary"] for row in firing],
                        "state": [row["state"] for row in firing],
                        "seconds_since_the_faults": round(time.monotonic() - began, 2),
                    }
                    require(step.figures["state"] == ["firing"], firing)
            self._at_the_worst()
        with self.step("the four alerts resolve") as step:
            began = time.monotonic()
            for alert in CROSSED:
                until(partial(webhook.alerts, alert, "resolved"), 60, f"{alert} resolved at the webhook")
                step.figures[alert] = {"seconds_until_notified": round(time.monotonic() - began, 2)}

    def _backups(self) -> None:
        with self.step("a backup is commanded and taken") as step:
            command = self.herd.pgherd("backups", "run", "primary", "--wait", timeout_s=300)
            require(command["state"] == "succeeded", command)
            result = command["result"]
            self._backup = result["name"]
            step.figures = {key: result[key] for key in ("name", "stored_bytes", "databases", "complete", "warnings", "grade")}
            step.figures["command"] = command["id"]
            require(result["complete"] and "shop" in result["databases"], result)
        with self.step("the backup is verified") as step:
            command = self.herd.pgherd("backups", "verify", "primary", self._backup, "--wait", timeout_s=300)
            require(command["state"] == "succeeded", command)
            step.figures = command["result"]
            require(step.figures["grade"] == "read back" and step.figures["read_bytes"] > 0, command)
        with self.step("it is restored and its content is equal") as step:
            command = self.herd.pgherd("backups", "restore", "primary", self._backup, "--wait", timeout_s=300)
            require(command["state"] == "succeeded", command)
            step.figures = command["result"]
            require(step.figures["grade"] == "content-equal" and step.figures["rows_compared"] > 0, command)
        with self.step("the backup is listed with its grade") as step:
            rows = [row for row in self.herd.pgherd("backups", "ls") if row["name"] == self._backup]
            step.figures = {"grade": [row["grade"] for row in rows]}
            require(step.figures["grade"] == ["content-equal"], rows)

    def _crash(self) -> None:
        herd = self.herd
        with self.step("the collector is killed with -9 and comes back") as step:
            before = self._stored_points()
            herd.collector.kill()
            killed = time.monotonic()
            sampled = self._sampled_points()
            until(lambda: self._sampled_points() > sampled, 15, "sampling without a collector")
            away = time.monotonic() - killed
            herd.start_collector()
            ready = time.monotonic() - killed - away
            after = until(lambda: (now := self._stored_points()) > before and now, 40, "shipping resumed")
            step.figures = {
                "points_stored_before": before,
                "points_stored_after": after,
                "seconds_away": round(away, 2),
                "seconds_until_ready": round(ready, 2),
            }
        with self.step("samples counted = samples stored") as step:
            until(lambda: all(agent["connected"] for agent in herd.pgherd("agents", "ls")), 40, "both agents connected again")
            until(lambda: not any(self._waiting_points(name) for name in ("primary", "standby")), 60, "empty spools")
            for agent in herd.agents:  # a herd that stands still can be counted exactly; an agent drains its spool as it stops
                agent.stop()
            books = {name: herd.agent_call(name, "status")["spool"] for name in ("primary", "standby")}
            stored = {agent["name"]: agent for agent in herd.pgherd("agents", "ls")}
            step.figures = {
                name: {
                    "sampled": book["sampled_points"],
                    "dropped": book["dropped_points"],
                    "still_in_spool": book["waiting_points"],
                    "stored": stored[name]["stored_points"],
                    "gaps": stored[name]["gaps"],
                }
                for name, book in books.items()
            }
            for name, count in step.figures.items():
                require(count["sampled"] == count["stored"] > 0 and not count["dropped"], f"{name}: {count}")
        with self.step("the herd goes on"):
            for agent in herd.agents:
                agent.start()
            until(lambda: all(node["condition"] == "up" for node in herd.pgherd("nodes", "ls")), 40, "both nodes up again")

    def _waiting_points(self, name: str) -> int:
        return int(self.herd.agent_call(name, "status")["spool"]["waiting_points"])

    def _sampled_points(self) -> int:
        return int(self.herd.agent_call("primary", "status")["spool"]["sampled_points"])

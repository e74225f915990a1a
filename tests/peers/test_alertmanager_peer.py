"""Debian's Alertmanager as the other side: it takes what we push, ends what we end, and its webhook looks like ours."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pgherd.alerts.notification import webhook_payload
from pgherd.collector.alerting.alertmanager import AlertmanagerPush
from pgherd.collector.alerting.evaluation import Evaluator
from pgherd.collector.alerting.silencing import Author, Silencer
from pgherd.runtime.clock import SystemClock
from pgherd.storage.control.store import ControlStore
from support.alerts import Answers, group, no_facts, rule
from support.notifying import notifier, routing
from support.waiting import wait_until
from support.webhook import Webhook, webhook

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus-alertmanager") is None, reason="needs Debian's prometheus-alertmanager"),
]

CONFIG = """
route: {{receiver: hook, group_by: [alertname], group_wait: 10ms, group_interval: 200ms, repeat_interval: 1h}}
receivers:
- name: hook
  webhook_configs: [{{url: 'http://127.0.0.1:{port}/hook', send_resolved: true}}]
"""


@contextlib.contextmanager
def _alertmanager(directory: Path, hook: Webhook) -> Iterator[str]:
    """The base URL of one that is ready; ended by its pid."""
    (directory / "am.yaml").write_text(CONFIG.format(port=hook.port))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [
        "prometheus-alertmanager",
        f"--config.file={directory / 'am.yaml'}",
        f"--storage.path={directory / 'am'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--cluster.listen-address=",
    ]
    url = f"http://127.0.0.1:{port}"
    with (directory / "am.log").open("wb") as log, subprocess.Popen(argv, stdout=log, stderr=log) as process:
        try:
            wait_until(lambda: _ready(url), 30, "Alertmanager to be ready")
            yield url
        finally:
            process.terminate()
            process.wait(20)


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


class World:
    """An evaluator whose truth is set by hand, and its push."""

    def __init__(self, store: ControlStore, url: str) -> None:
        self.clock, self.query = SystemClock(), Answers()
        high = rule(labels={"severity": "page"}, annotations={"summary": "{{ $labels.node }} is high"})
        self.evaluator = Evaluator(groups=[group(high)], store=store, query=self.query, facts=no_facts, clock=self.clock)
        self.evaluator.restore()
        self.silencer = Silencer(store, self.clock)
        self.url = url

    def turn(self, *nodes: str) -> None:
        self.query.vectors["x > 1"] = [({"node": node}, 2.0) for node in nodes]
        for evaluation in self.evaluator._evaluations:
            evaluation.evaluate(self.clock.wall_unix_ns(), self.clock.mono_s(), self.clock)

    def push(self) -> None:
        async def run() -> None:
            push = AlertmanagerPush(
                "am", self.url, status=self.evaluator.status, silencer=self.silencer, clock=self.clock, timeout_s=5
            )
            try:
                await push.push()
            finally:
                await push._client.aclose()

        asyncio.run(run())

    def known(self) -> dict[str, Any]:
        """What Alertmanager holds active: node → alert."""
        alerts = httpx.get(f"{self.url}/api/v2/alerts", trust_env=False).json()
        return {alert["labels"]["node"]: alert for alert in alerts}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ControlStore]:
    opened = ControlStore.open(tmp_path / "control.sqlite")
    yield opened
    opened.close()


def test_alertmanager_takes_and_ends_what_we_push(store: ControlStore, tmp_path: Path) -> None:
    with webhook() as hook, _alertmanager(tmp_path, hook) as url:
        world = World(store, url)
        world.turn("a", "b")
        world.push()
        assert sorted(world.known()) == ["a", "b"]
        ours = next(iter(world.evaluator.status()[0].alerting[0].instances))
        assert ours in {alert["fingerprint"] for alert in world.known().values()}, "fingerprints are computed alike"
        told = subprocess.run(
            ["amtool", f"--alertmanager.url={url}", "alert", "query", "-o", "json"], capture_output=True, timeout=20, check=True
        )
        assert sorted(alert["labels"]["node"] for alert in json.loads(told.stdout)) == ["a", "b"]
        wait_until(lambda: _told(hook) >= {("a", "firing"), ("b", "firing")}, 20, "its notification")
        world.silencer.add(['node="b"'], duration_s=60, author=Author("t", "socket"))
        world.push()  # another process of ours, which has to ask what is known there
        assert sorted(world.known()) == ["a", "b"], "silenced here, still alive there"
        world.turn("b")
        world.push()
        wait_until(lambda: ("a", "resolved") in _told(hook), 20, "the end of a")
        assert sorted(world.known()) == ["b"]


def test_our_webhook_speaks_as_alertmanagers_does(store: ControlStore, tmp_path: Path) -> None:
    """The same members of the same types, in group and alerts; values as far as both know them."""
    with webhook() as hook, _alertmanager(tmp_path, hook) as url:
        world = World(store, url)
        told = notifier(store, world.evaluator, world.clock, routes=routing(group_by=("alertname",)))
        for nodes in (("a", "b"), ("b",)):
            world.turn(*nodes)
            world.push()
            status = "firing" if len(nodes) == 2 else "resolved"
            wait_until(lambda status=status: ("a", status) in _told(hook), 20, f"a {status}")  # type: ignore[misc]
            told.turn()
        theirs = hook.calls[-1].payload
    ours = webhook_payload(_last_message(store), receiver="hook", external_url="http://x")
    assert _shape(theirs) == _shape(ours)
    for member in ("version", "status", "receiver", "groupLabels", "commonLabels"):
        assert ours[member] == theirs[member], member
    for mine, other in zip(_alerts(ours), _alerts(theirs), strict=True):
        for member in ("status", "labels", "annotations", "fingerprint"):
            assert mine[member] == other[member], member


def _last_message(store: ControlStore) -> Any:
    from sqlalchemy import select

    from pgherd.alerts.notification import from_document
    from pgherd.storage.control.schema import outbox

    with store.read() as connection:
        return from_document(connection.execute(select(outbox.c.payload).order_by(outbox.c.id.desc())).scalars().first() or {})


def _told(hook: Webhook) -> set[tuple[str, str]]:
    return {(alert["labels"]["node"], alert["status"]) for call in hook.calls for alert in call.payload["alerts"]}


def _alerts(payload: dict[str, Any]) -> list[Any]:
    key: Callable[[Any], Any] = lambda alert: alert["labels"]["node"]  # noqa: E731
    return sorted(payload["alerts"], key=key)


def _shape(value: Any) -> Any:
    if isinstance(value, dict) and set(value) >= {"alerts", "version"}:
        return {key: [_shape(one) for one in part][:1] if key == "alerts" else _shape(part) for key, part in value.items()}
    if isinstance(value, dict) and "startsAt" in value:
        return {key: type(part).__name__ for key, part in value.items()}
    return type(value).__name__

"""The proof of an alert rule: a real herd in which a fault is made, the rule seen firing and, after the fault, resolved.

Everything is the product's own: PostgreSQL servers, `pgherd-agent run`, `pgherd collector run` with the shipped rule
files. Only time is shorter, and only as said here: agents sample every second instead of every ten, rules are evaluated
every second instead of every 15, `for` is a thirtieth of what is shipped (one evaluation to ten seconds), windows of latency
are 5 s long instead of 60, and sampling ten times as often may cost the servers more than the default budget. Whatever a proof shortens
beyond that (a range, an age that nobody waits for) it states itself as a replacement in the rule's text, and each must match.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from pgherd.alerts.load import builtin_files, parse_duration_ns
from pgherd.postgres.scratch import workspace
from support.collector import Collector, collector
from support.postgres import PARENT, Server
from support.waiting import wait_until

FOR_DIVISOR = 30
INTERVAL_S = 1.0
_POLL_S = 0.2
_PATIENCE_S = 90.0  # only a failure takes so long

# alert → text of its expression → what stands there in the proof.
Shortened = Mapping[str, Mapping[str, str]]

_SAMPLING = """\
state_directory = "{state}"
[sampling]
live_interval = "500ms"
interval = "1s"
slow_interval = "1s"
rare_interval = "2s"
server_share_max = 1.0
latency_window = "5s"
[backup]
enabled = {backups}
repository = "{state}-repository"
scratch_directory = "{scratch}"
interval = "{backup_interval}"
free_min = "16MiB"
"""
_NODE = """\
[[nodes]]
alias = "{alias}"
cluster = "{cluster}"
instance = "{instance}"
conninfo = "{conninfo}"
bin_directory = "{bin_directory}"
"""


def shortened_rules(shortened: Shortened) -> str:
    """All shipped rules as one file for a proof. Each replacement has to match a rule of its alert."""
    groups: list[dict[str, Any]] = []
    unused = {(alert, text) for alert, texts in shortened.items() for text in texts}
    for content in builtin_files().values():
        for group in yaml.safe_load(content)["groups"]:
            group["interval"] = f"{INTERVAL_S:g}s"
            for rule in group["rules"]:
                if "for" in rule:
                    ms = min(max(parse_duration_ns(rule["for"]) / 1e6 / FOR_DIVISOR, INTERVAL_S * 1000), 10_000)
                    rule["for"] = f"{ms:.0f}ms"
                name = rule.get("alert", rule.get("record"))
                for text, replacement in shortened.get(name, {}).items():
                    if text in rule["expr"]:
                        rule["expr"] = rule["expr"].replace(text, replacement)
                        unused.discard((name, text))
            groups.append(group)
    assert not unused, f"no shipped rule contains {unused}"
    return yaml.safe_dump({"groups": groups}, sort_keys=False, width=1000)


@dataclass
class Node:
    """A server as an agent knows it."""

    alias: str
    cluster: str
    server: Server
    role: str = "postgres"
    instance: str = ""  # of its own where two agents watch one server


@dataclass
class Agent:
    """One `pgherd-agent run`, on any number of nodes. `launcher` starts it some other way (another clock)."""

    name: str
    config: Path
    state: Path
    launcher: Sequence[str] = (sys.executable, "-m", "pgherd.agent.main")
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        log = self.config.with_suffix(".log")
        with log.open("ab") as out:
            self.process = subprocess.Popen([*self.launcher, "--config", str(self.config), "run"], stdout=out, stderr=out)

    def stop(self) -> None:
        """SIGTERM; kill -9 when that doesn't help."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(20)

    def freeze(self) -> None:
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGCONT)


@dataclass
class Proving:
    """A running herd to prove rules in. `seen` holds what each proof measured."""

    collector: Collector
    client: httpx.Client
    stack: ExitStack
    agents: dict[str, Agent] = field(default_factory=dict)
    seen: list[dict[str, Any]] = field(default_factory=list)

    def agent(
        self,
        name: str,
        nodes: Sequence[Node],
        *,
        backups: bool = False,
        backup_interval: str = "1h",
        launcher: Sequence[str] | None = None,
        start: bool = True,
    ) -> Agent:
        """Join an agent with these nodes and start it."""
        directory = self.collector.directory
        config, state = directory / f"{name}.toml", directory / name
        scratch = self.stack.enter_context(workspace(PARENT)) if backups else state  # scratch servers' user passes through it
        text = _SAMPLING.format(state=state, scratch=scratch, backups=str(backups).lower(), backup_interval=backup_interval)
        for node in nodes:
            text += _NODE.format(
                alias=node.alias,
                cluster=node.cluster,
                instance=node.instance,
                conninfo=node.server.conninfo(node.role),
                bin_directory=node.server.binaries.bin_directory,
            )
        config.write_text(text)
        token = self.collector.ask("agents", "add", "--name", name)["token"]
        argv = [sys.executable, "-m", "pgherd.agent.main", "--config", str(config), "join", "--token-file", "-"]
        joined = subprocess.run(argv, input=token + "\n", capture_output=True, text=True, timeout=60)
        assert joined.returncode == 0, joined.stderr
        made = Agent(name, config, state, launcher or Agent.launcher)
        self.agents[name] = made
        self.stack.callback(made.stop)
        if start:
            made.start()
            aliases = {node.alias for node in nodes}
            wait_until(lambda: aliases <= self.up(), 40, f"the nodes of agent {name} to be up", _POLL_S)
        return made

    def get(self, path: str, **parameters: Any) -> Any:
        """A read over the local socket."""
        answer = self.client.get(path, params=parameters)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """An instant vector, now."""
        rows = self.get("/prometheus/api/v1/query", query=expression)["data"]["result"]
        return [(row["metric"], float(row["value"][1])) for row in rows]

    def up(self) -> set[str]:
        return {labels["node"] for labels, value in self.query("pg_up") if value == 1}

    def alerts(self, alert: str = "", **labels: str) -> list[dict[str, Any]]:
        """Instances of an alert with these labels, in any state."""
        rows = self.get("/api/v1/alerts", limit=1000)["items"]
        return [row for row in rows if alert in ("", row["rule"]) and labels.items() <= row["labels"].items()]

    def state(self, alert: str, **labels: str) -> str:
        """Its state; "" when inactive."""
        found = self.alerts(alert, **labels)
        assert len(found) <= 1, f"{alert}{labels} isn't one alert: {[row['labels'] for row in found]}"
        return found[0]["state"] if found else ""

    def fires(self, alert: str, **labels: str) -> dict[str, Any]:
        """Wait until it fires; its row. Every placeholder of its texts must have become something."""
        began = time.monotonic()
        try:
            wait_until(lambda: self.state(alert, **labels) == "firing", _PATIENCE_S, f"{alert}{labels} to fire", _POLL_S)
        except AssertionError as error:
            raise AssertionError(f"{error}; alerts: {self._summary()}; rule errors: {self.errors()}") from error
        (row,) = self.alerts(alert, **labels)
        waited_ns = row["fired_unix_ns"] - row["active_unix_ns"]
        self.seen.append({"alert": alert, **labels, "seconds": time.monotonic() - began, "pending_s": waited_ns / 1e9})
        assert "<no value>" not in json.dumps(row["annotations"]), row["annotations"]
        return row

    def resolves(self, alert: str, **labels: str) -> None:
        """Wait until it is over."""
        try:
            wait_until(
                lambda: self.state(alert, **labels) in ("resolved", ""), _PATIENCE_S, f"{alert}{labels} to resolve", _POLL_S
            )
        except AssertionError as error:
            raise AssertionError(f"{error}; alerts: {self._summary()}; rule errors: {self.errors()}") from error

    def errors(self) -> list[str]:
        """What rules complain about."""
        groups = self.get("/prometheus/api/v1/rules")["data"]["groups"]
        return [f"{rule['name']}: {rule['lastError']}" for group in groups for rule in group["rules"] if rule.get("lastError")]

    def active(self) -> set[str]:
        """The names of all alerts that aren't over."""
        return {row["rule"] for row in self.alerts() if row["state"] != "resolved"}

    def _summary(self) -> list[str]:
        return [f"{row['rule']} {row['state']} {row['labels'].get('node', '')}" for row in self.alerts()]


@contextmanager
def proving(shortened: Shortened | None = None) -> Iterator[Proving]:
    """A collector with the shipped rules, shortened; agents and servers are added by the caller."""
    with ExitStack() as stack:
        made = stack.enter_context(collector())
        rules = made.directory / "rules.yaml"
        rules.write_text(shortened_rules(shortened or {}))
        config = made.directory / "c.toml"
        text = config.read_text().replace("[grpc]\n", '[grpc]\nheartbeat_interval = "1s"\n')
        alerts = f'[alerts]\nbuiltin_rules = false\nrule_files = ["{rules}"]\ninterval = "{INTERVAL_S:g}s"\n'
        config.write_text(text + alerts)
        made.start()
        transport = httpx.HTTPTransport(uds=str(made.socket))
        client = stack.enter_context(httpx.Client(transport=transport, base_url="http://collector", timeout=20))
        herd = Proving(made, client, stack)
        try:
            yield herd
            assert not herd.errors(), herd.errors()
        finally:
            for row in herd.seen:
                print("proof", json.dumps(row))


@contextmanager
def small_volume(path: Path, options: str) -> Iterator[None]:
    """A tmpfs of its own at `path`. Raises PermissionError where this user may not mount."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True, text=True)
    if mounted.returncode != 0:
        raise PermissionError(mounted.stderr.strip())
    try:
        yield
    finally:
        for flags in ([], ["-l"]):  # busy for a moment after the server's end
            with suppress(subprocess.CalledProcessError):
                subprocess.run(["umount", *flags, str(path)], check=True, capture_output=True)
                break

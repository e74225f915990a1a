"""The demo's herd: PostgreSQL pair, collector and two agents, wired as on real hosts, in one workspace."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from commands import BIN, CommandError, Service, call
from servers import Pair, Server
from thresholds import rules

_COLLECTOR = """\
state_directory = "{directory}/collector"
[http]
listen = "127.0.0.1:{http}"
anonymous_read = true
[grpc]
listen = "127.0.0.1:{grpc}"
heartbeat_interval = "1s"
[otlp]
listen = ""
[enrol]
listen = "127.0.0.1:{enrol}"
[alerts]
rule_files = ["{directory}/rules.yaml"]
interval = "2s"
[[alerts.receivers]]
name = "demo"
kind = "webhook"
url = "http://127.0.0.1:{webhook}/"
"""
_AGENT = """\
state_directory = "{directory}/agent-{name}"
[sampling]
interval = "1s"
slow_interval = "5s"
server_share_max = 0.2
latency_window = "5s"
[backup]
enabled = {backups}
repository = "{directory}/repository"
scratch_directory = "{directory}/scratch"
[[nodes]]
alias = "{name}"
cluster = "demo"
conninfo = "host={host} port={port} user=postgres dbname=postgres"
instance = "127.0.0.1:{port}"
bin_directory = "{bin_directory}"
"""


class Webhook:
    """A receiver that counts what arrives: the far end of a notification."""

    def __init__(self) -> None:
        self.received: list[dict[str, Any]] = []
        received = self.received

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - the base class names it
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, name="webhook", daemon=True).start()

    def alerts(self, name: str, status: str) -> int:
        """How many alerts called `name` arrived as firing or resolved."""
        return sum(
            alert["labels"]["alertname"] == name and alert["status"] == status
            for body in self.received
            for alert in body["alerts"]
        )

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@dataclass
class Herd:
    """Everything that runs, and the ways the story and the view look at it."""

    directory: Path
    pair: Pair
    webhook: Webhook
    ports: dict[str, int]
    collector: Service
    agents: list[Service] = field(default_factory=list)

    @property
    def services(self) -> list[Service]:
        return [self.collector, *self.agents]

    @property
    def socket(self) -> Path:
        return self.directory / "collector" / "collector.sock"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports['http']}"

    @property
    def query_url(self) -> str:
        """A page to look at: reads on loopback need no token here (`anonymous_read`)."""
        return f"{self.url}/prometheus/api/v1/query?query=pg_up"

    def pgherd(self, *arguments: str, timeout_s: float = 120.0) -> Any:
        """`pgherd --json …` over the local socket."""
        return call(["pgherd", "--socket", self.socket, "--json", *arguments], timeout_s=timeout_s)

    def agent_call(self, name: str, *arguments: str, stdin: str | None = None) -> Any:
        """`pgherd-agent --json …` with an agent's configuration."""
        return call(["pgherd-agent", "--config", self.agent_file(name), "--json", *arguments], stdin=stdin)

    def agent_file(self, name: str) -> Path:
        return self.directory / f"agent-{name}.toml"

    def start_collector(self, timeout_s: float = 30.0) -> None:
        """Start (or restart) it and wait until it says that it is ready."""
        self.collector.start()
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(CommandError):
                self.pgherd("agents", "ls")
                return
            if not self.collector.running or time.monotonic() > deadline:
                raise CommandError(f"the collector isn't ready:\n{self.collector.tail()}")
            time.sleep(0.1)

    def join(self, server: Server) -> dict[str, Any]:
        """Join an agent with a token, as `agents add` tells a person to do it, and start it."""
        added = self.pgherd("agents", "add", "--name", server.name)
        joined: dict[str, Any] = self.agent_call(server.name, "join", "--token-file", "-", stdin=added["token"] + "\n")
        service = Service(
            f"agent {server.name}",
            [str(BIN / "pgherd-agent"), "--config", str(self.agent_file(server.name)), "run"],
            self.directory / f"agent-{server.name}.log",
        )
        service.start()
        self.agents.append(service)
        return joined


def _ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


@contextlib.contextmanager
def herd(directory: Path, pair: Pair) -> Iterator[Herd]:
    """A configured herd with nothing of ours started yet; on leaving, everything that runs is stopped."""
    webhook = Webhook()
    ports = dict(zip(("http", "grpc", "enrol"), _ports(3), strict=True))
    (directory / "rules.yaml").write_text(rules(pair.volume), encoding="utf-8")
    collector_file = directory / "collector.toml"
    collector_file.write_text(_COLLECTOR.format(directory=directory, webhook=webhook.port, **ports), encoding="utf-8")
    for server in (pair.primary, pair.standby):
        text = _AGENT.format(
            directory=directory,
            name=server.name,
            host=server.host,
            port=server.port,
            bin_directory=pair.binaries.bin_directory,
            backups="true" if server is pair.primary else "false",
        )
        (directory / f"agent-{server.name}.toml").write_text(text, encoding="utf-8")
    argv = [str(BIN / "pgherd"), "collector", "--config", str(collector_file), "run"]
    herd = Herd(directory, pair, webhook, ports, Service("collector", argv, directory / "collector.log"))
    try:
        call(["pgherd", "collector", "--config", collector_file, "init", "--json"])
        yield herd
    finally:
        for service in reversed(herd.services):
            service.stop()
        webhook.close()

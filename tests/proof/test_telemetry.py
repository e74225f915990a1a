"""Proofs of the rules about pgherd's own eyes: samples that don't arrive, a clock that is off."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.postgres import Fleet, Server
from support.proving import Node, Proving, proving
from support.waiting import wait_until

pytestmark = [pytest.mark.pg, pytest.mark.fault, pytest.mark.slow, pytest.mark.peers, pytest.mark.timeout(180)]

SKEWED = Path(__file__).resolve().parents[1] / "support" / "skewed_agent.py"


@pytest.fixture(scope="module")
def server(postgres_fleet: Fleet) -> Iterator[Server]:
    made = postgres_fleet.server()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def herd() -> Iterator[Proving]:
    with proving({"TelemetryGap": {"> 300": "> 3"}}) as made:
        yield made


class BlackHole:
    """A link whose path MTU is too small while `on`: a connection that once sends a large packet gets nothing through any more.

    Heartbeats pass, batches of samples don't: the fault of firewalls that drop "fragmentation needed".
    """

    def __init__(self, target_port: int) -> None:
        self.on = threading.Event()
        self._target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._closed = threading.Event()
        threading.Thread(target=self._accept, name="black hole", daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target_port), timeout=5)
            except OSError:
                return
            far.settimeout(None)
            for source, sink, drops in ((near, far, True), (far, near, False)):
                threading.Thread(target=self._pump, args=(source, sink, drops), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, drops: bool) -> None:
        sent = 0
        try:
            while data := source.recv(65_536):
                sent += len(data)
                if drops and self.on.is_set() and (len(data) > 1400 or sent > 100_000):
                    continue  # lost, and TCP's repetitions are as large
                sink.sendall(data)
        except OSError:
            pass
        finally:
            source.close()
            sink.close()

    def close(self) -> None:
        self._listener.close()


def test_telemetry_gap(herd: Proving, server: Server) -> None:
    """Large packets vanish between agent and collector, small ones pass: heartbeats arrive, samples don't."""
    hole = BlackHole(herd.collector.ports["grpc"])
    agent = herd.agent("behind", [Node("behind", "c1", server)], start=False)
    identity_file = agent.state / "identity.json"
    identity = json.loads(identity_file.read_text())
    identity["grpc_address"] = f"localhost:{hole.port}"
    identity_file.write_text(json.dumps(identity))
    agent.start()
    try:
        wait_until(lambda: "behind" in herd.up(), 40, "the node behind the link to be up", 0.2)
        hole.on.set()
        herd.fires("TelemetryGap", agent="behind", severity="warning", job="pgherd")
        assert herd.state("AgentSilent", agent="behind") == ""
        hole.on.clear()
        herd.resolves("TelemetryGap", agent="behind")
    finally:
        hole.close()


def test_clock_skew(herd: Proving, server: Server) -> None:
    """An agent whose wall clock is two seconds ahead; then its clock is set right."""
    labels = {"agent": "ahead", "severity": "warning", "job": "pgherd"}
    launcher = (sys.executable, str(SKEWED), "2.0")
    agent = herd.agent("ahead", [Node("ahead", "c2", server, instance="ahead:5432")], launcher=launcher)
    row = herd.fires("ClockSkew", **labels)
    assert 1.5 < row["value"] < 2.5
    agent.stop()
    agent.launcher = type(agent).launcher
    agent.start()
    herd.resolves("ClockSkew", **labels)

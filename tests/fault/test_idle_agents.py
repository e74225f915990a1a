"""Many agents at one collector, and peers that vanish without a word.

PGHERD_NIGHTLY=1 takes a thousand agents, and waits for keepalive. Figures: tests/perf/bench_idle_agents.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from support.collector import Collector, collector
from support.idle_herd import prepare, running
from support.link import Link
from support.waiting import wait_until

pytestmark = pytest.mark.fault

NIGHTLY = bool(os.environ.get("PGHERD_NIGHTLY"))
AGENTS = 1000 if NIGHTLY else 100


@pytest.fixture
def herd() -> Iterator[Collector]:
    with collector() as made:
        config = made.directory / "c.toml"
        config.write_text(config.read_text().replace("[grpc]\n", '[grpc]\nheartbeat_interval = "1s"\n'))
        yield made


def connected(herd: Collector, headers: dict[str, str]) -> int:
    with herd.http(headers=headers) as http:
        lines = http.get("/metrics").text.splitlines()
    return int(next(line for line in lines if line.startswith("pgherd_collector_agents_connected ")).split()[-1])


def grpc_connections(herd: Collector) -> int:
    assert herd.process is not None
    found = psutil.Process(herd.process.pid).net_connections("tcp")
    return sum(one.status == psutil.CONN_ESTABLISHED and one.laddr.port == herd.ports["grpc"] for one in found)


@pytest.mark.timeout(600)
def test_a_herd_of_idle_agents_is_held_and_comes_back_after_a_crash_of_the_collector(herd: Collector, tmp_path: Path) -> None:
    prepare(herd.state, AGENTS, tmp_path / "members.json")
    herd.start()
    headers = herd.token("viewer")
    with running(tmp_path / "members.json", herd.ports["grpc"], AGENTS, processes=2):
        wait_until(lambda: connected(herd, headers) == AGENTS, 120, "every session")
        assert grpc_connections(herd) == AGENTS
        herd.kill()
        herd.start()
        wait_until(lambda: connected(herd, headers) == AGENTS, 120, "every session again")
    wait_until(lambda: connected(herd, headers) == 0, 60, "the collector to notice that they left")
    wait_until(lambda: grpc_connections(herd) == 0, 60, "their connections to be closed")
    assert "Traceback" not in herd.log


@pytest.mark.timeout(180)
def test_a_peer_that_vanishes_loses_its_session_and_its_connection(herd: Collector, tmp_path: Path) -> None:
    """The link goes deaf: nothing is closed, nothing arrives. Three heartbeats later the agent is silent; keepalive ends the
    connection itself. When the link is mended, the agent is back."""
    prepare(herd.state, 1, tmp_path / "members.json")
    herd.start()
    headers = herd.token("viewer")
    with Link(herd.ports["grpc"]) as link, running(tmp_path / "members.json", link.port, 1, processes=1):
        wait_until(lambda: connected(herd, headers) == 1, 30, "the session")
        link.deaf()
        wait_until(lambda: connected(herd, headers) == 0, 30, "the silent agent to be unknown")
        wait_until(lambda: "control.session_ended" in herd.log, 30, "its session to end")
        if NIGHTLY:  # keepalive takes its half minute
            wait_until(lambda: grpc_connections(herd) == 0, 90, "keepalive to end the half-open connection")
        link.mend()
        wait_until(lambda: connected(herd, headers) == 1, 90, "the agent to come back")

"""Proofs of the availability rules: a server that is gone, an agent that is silent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from support.postgres import Fleet, Server
from support.proving import Agent, Node, Proving, proving

pytestmark = [pytest.mark.pg, pytest.mark.fault, pytest.mark.slow, pytest.mark.peers, pytest.mark.timeout(180)]


@dataclass
class Site:
    herd: Proving
    server: Server
    agent: Agent


@pytest.fixture(scope="module")
def site(postgres_fleet: Fleet) -> Iterator[Site]:
    server = postgres_fleet.server()
    with proving({"AgentSilent": {"> 30": "> 3"}}) as herd:
        yield Site(herd, server, herd.agent("watcher", [Node("lonely", "c1", server)]))
    server.stop()


def test_instance_down(site: Site) -> None:
    """The postmaster is killed with -9."""
    site.server.kill()
    row = site.herd.fires("InstanceDown", node="lonely", cluster="c1", severity="critical", job="pgherd")
    assert row["labels"]["instance"] in row["annotations"]["summary"]
    site.server.start()
    site.herd.resolves("InstanceDown", node="lonely")


def test_agent_silent(site: Site) -> None:
    """The agent is killed with -9; its server lives, and nobody says that it is down."""
    site.agent.kill()
    site.herd.fires("AgentSilent", agent="watcher", severity="critical", job="pgherd")
    assert site.herd.state("InstanceDown", node="lonely") in ("", "resolved")
    site.agent.start()
    site.herd.resolves("AgentSilent", agent="watcher")

"""Kill -9 of either side, again and again: every sampled point is stored once, every command ends once."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from commands import Service
from herd import Herd, herd
from servers import pair
from story import until

from pgherd.postgres.scratch import sweep, workspace
from support.waiting import wait_until

pytestmark = [pytest.mark.pg, pytest.mark.fault, pytest.mark.slow]


@pytest.fixture
def running_herd() -> Iterator[Herd]:
    from demo import PARENT

    sweep(PARENT)
    with workspace(PARENT) as directory, pair(directory) as servers, herd(directory, servers) as running:
        running.start_collector()
        for server in (servers.primary, servers.standby):
            running.join(server)
        until(lambda: len(running.pgherd("nodes", "ls")) == 2, 30, "two nodes")
        yield running


def kill_and_restart(running: Herd, service: Service) -> None:
    service.kill()
    if service is running.collector:
        running.start_collector()
    else:
        service.start()


def books(running: Herd, name: str) -> tuple[int, int, int]:
    """(sampled at the agent, dropped there, stored at the collector)."""
    spool = running.agent_call(name, "status")["spool"]
    stored = {agent["name"]: agent["stored_points"] for agent in running.pgherd("agents", "ls")}[name]
    return spool["sampled_points"], spool["dropped_points"], stored


@pytest.mark.timeout(240)
def test_kills_lose_and_repeat_nothing(running_herd: Herd) -> None:
    """Two kills of each of the three processes in a seeded order, a backup running meanwhile."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    running = running_herd
    command = running.pgherd("backups", "run", "primary")
    victims = [service for service in running.services for _ in range(2)]
    dice.shuffle(victims)
    for victim in victims:
        kill_and_restart(running, victim)
        before = running.agent_call("primary", "status")["spool"]["sampled_points"]
        wait_until(
            lambda before=before: running.agent_call("primary", "status")["spool"]["sampled_points"] > before,  # type: ignore[misc]
            30,
            "sampling to go on",
        )
    until(lambda: all(agent["connected"] for agent in running.pgherd("agents", "ls")), 60, "both agents connected")
    ended = until(
        lambda: (shown := running.pgherd("commands", "show", command["id"])) and not shown["open"] and shown,
        60,
        "the command's end",
    )
    assert ended["state"] in ("succeeded", "failed"), ended
    finals = [event for event in ended["events"] if event["kind"] in ("succeeded", "failed", "indeterminate", "rejected")]
    assert len(finals) == 1, ended["events"]
    until(
        lambda: not any(running.agent_call(n, "status")["spool"]["waiting_points"] for n in ("primary", "standby")),
        60,
        "empty spools",
    )
    for service in running.agents:
        service.stop()
    for name in ("primary", "standby"):
        sampled, dropped, stored = books(running, name)
        assert dropped == 0
        assert sampled == stored > 0, f"seed {seed}"

"""Proof of the backup rules, as one story: no backup, a failing one, a good one, an old one, and its restore."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from support.postgres import Fleet, Server
from support.proving import Agent, Node, Proving, proving

pytestmark = [pytest.mark.pg, pytest.mark.fault, pytest.mark.slow, pytest.mark.peers, pytest.mark.timeout(280)]

# 1.25 hours and an hour become a minute, 30 days half a minute.
SHORTENED = {
    "BackupStale": {"* pgherd_backup_interval_seconds + 3600": "* pgherd_backup_interval_seconds - 4470"},
    "RestoreUntested": {"30 * 86400": "30"},
}


@dataclass
class Site:
    herd: Proving
    server: Server
    agent: Agent

    def command(self, *arguments: str) -> str:
        """`pgherd backups …` with --wait; the state in which the command ended."""
        self.herd.collector.cli("backups", *arguments, "--wait")
        return str(self.herd.collector.ask("commands", "ls")[0]["state"])


@pytest.fixture(scope="module")
def site(postgres_fleet: Fleet) -> Iterator[Site]:
    server = postgres_fleet.server()
    server.create_role("pgherd", member_of=["pg_monitor"])
    server.execute("CREATE TABLE precious AS SELECT g FROM generate_series(1, 1000) AS g")
    with proving(SHORTENED) as herd:
        agent = herd.agent("keeper", [Node("kept", "c1", server, role="pgherd")], backups=True)
        yield Site(herd, server, agent)
    server.stop()


def test_from_no_backup_to_a_proven_one(site: Site) -> None:
    """The agent's role may not read tables at first; then it may, and a backup is taken, gets old, is restored."""
    herd, labels = site.herd, {"node": "kept", "cluster": "c1"}
    herd.fires("BackupStale", reason="none", severity="critical", **labels)
    site.command("run", "kept")
    herd.fires("BackupFailed", verb="run", severity="warning", **labels)

    site.server.execute("ALTER ROLE pgherd SUPERUSER")
    assert site.command("run", "kept") == "succeeded"
    herd.resolves("BackupStale", reason="none", **labels)
    herd.resolves("BackupFailed", verb="run", **labels)
    herd.fires("RestoreUntested", reason="never", severity="warning", **labels)

    (backup,) = {row["name"] for row in herd.collector.ask("backups", "ls")}
    assert site.command("restore", "kept", backup) == "succeeded"
    herd.resolves("RestoreUntested", reason="never", **labels)
    herd.fires("RestoreUntested", reason="old", severity="warning", **labels)
    herd.fires("BackupStale", reason="old", severity="critical", **labels)

    assert site.command("run", "kept") == "succeeded"
    assert site.command("restore", "kept", backup) == "succeeded"
    herd.resolves("BackupStale", reason="old", **labels)
    herd.resolves("RestoreUntested", reason="old", **labels)

"""The main job over the real parts: the ledger commands, the agent's own CLI does it, the ledger knows what it proves."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from pgherd.agent.command.epochs import SeenEpochs
from pgherd.agent.command.executor import Executor, ExecutorSettings, cli_argv
from pgherd.agent.command.journal import Journal
from pgherd.agent.command.outlet import Outlet
from pgherd.agent.command.policy import policy_of
from pgherd.agent.command.session import ControlClient, SessionSettings, SpoolState
from pgherd.agent.node import NodeStatus
from pgherd.agent.nodes import node_ids
from pgherd.proto.commands import BackupRun, BackupVerify, Diagnostics, Ping, Restore, Verb
from pgherd.runtime.clock import SystemClock
from pgherd.runtime.process import clean_environment
from support.backup import BackupNode, backup_node
from support.control import Caller, control_plane, enrol, until
from support.postgres import Server
from support.tiny_agent import AgentParts, running

pytestmark = [pytest.mark.pg, pytest.mark.slow]


def parts_of(node: BackupNode, config_file: Path, agent_id: str, node_id: str, target: str) -> AgentParts:
    """The command side of the resident, as it wires itself, without TLS."""
    state, clock, outlet = node.config.state_directory, SystemClock(), Outlet()
    policy, journal = policy_of(node.config.policy), Journal.open(state / "commands", clock)
    executor = Executor(
        journal=journal,
        policy=policy,
        epochs=SeenEpochs.open(state / "epochs.json"),
        nodes={node_id: node.node.alias},
        argv=cli_argv((sys.executable, "-m", "pgherd.agent.main"), config_file),
        environment=clean_environment({"PYTHONPATH": os.environ.get("PYTHONPATH", "")}),
        outlet=outlet,
        clock=clock,
        settings=ExecutorSettings(),
    )
    client = ControlClient(
        settings=SessionSettings(agent_id, "test", "host"),
        dial=lambda: grpc.aio.insecure_channel(target),
        identity_mark=lambda: 1,
        nodes=lambda: [NodeStatus(node_id, node.node.alias, node.node.cluster, "h:1", condition="up", role="primary")],
        spool=lambda: SpoolState(0, 0),
        policy=policy,
        journal=journal,
        executor=executor,
        outlet=outlet,
        clock=clock,
    )
    return AgentParts(journal, executor, client, outlet, [1])


def test_ping_backup_verify_restore_and_diagnostics_by_command(postgres: Server, home: Path) -> None:
    async def story() -> None:
        async with control_plane(tmp, peer=lambda _: Caller(agent)) as plane:
            agent = enrol(plane.store)
            async with running(parts_of(node, config_file, agent, node_id, plane.target)):
                await until(lambda: plane.herd.heard(agent), "the session")

                async def done(verb: Verb) -> dict[str, Any]:
                    submitted = await plane.dispatcher.submit("shop/n1", verb, actor="uid:root", via="test")

                    def outcome() -> dict[str, Any]:
                        one = plane.views.command(submitted.command_id)
                        return {} if one["open"] else one

                    shown = await until(outcome, f"the end of {verb}", 100)
                    assert shown["state"] == "succeeded", shown["error"]
                    return dict(shown["result"])

                await done(Ping())
                backup = await done(BackupRun())
                assert (backup["complete"], "accounts" in backup["databases"]) == (True, True)
                assert plane.views.backups().items[0]["name"] == backup["name"]
                assert (await done(BackupVerify()))["backup"] == backup["name"]
                restored = await done(Restore(backup["name"]))
                assert (restored["grade"], restored["tables_compared"] >= 1, restored["rows_compared"] >= 500) == (
                    "content-equal", True, True,
                )  # fmt: skip
                known = plane.views.backups().items[0]
                assert known["grade"] == "content-equal"
                assert known["restore_duration_s"] > 0
                assert (await done(Diagnostics()))["findings"]

    node = backup_node(postgres, home)
    tmp = home / "collector"
    tmp.mkdir()
    config_file = node.config_file()
    node.config.state_directory.mkdir(exist_ok=True)
    node_id = node_ids(node.config.state_directory, ["n1"])["n1"]
    postgres.create_database("accounts")
    postgres.execute("CREATE TABLE t AS SELECT g AS id, md5(g::text) AS text FROM generate_series(1, 500) g", dbname="accounts")
    try:
        asyncio.run(asyncio.wait_for(story(), 110))
    finally:
        postgres.drop_database("accounts")

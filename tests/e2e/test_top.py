"""`pgherd top` over a whole line: a server in trouble, its agent, the collector, and what a DBA would ask at 3 a.m."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgherd.cli.top.questions import FLEET, NODE
from support.collector import Collector, collector
from support.postgres import Fleet, Server
from support.waiting import wait_until

pytestmark = [pytest.mark.pg, pytest.mark.slow]

METRICS = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
# Made by the collector; the reference lists what agents emit.
COLLECTORS_OWN = {"pgherd_replication_lag_seconds", "pgherd_replication_lag_bytes", "pgherd_replication_lag_unknown"}

CONFIG = """\
state_directory = "{home}/state"
[sampling]
interval = "1s"
slow_interval = "2s"
latency_window = "5s"
server_share_max = 0.5
[backup]
repository = "{home}/repository"
[[nodes]]
alias = "n1"
cluster = "c1"
conninfo = "{conninfo}"
bin_directory = "{bin_directory}"
"""


@pytest.mark.parametrize("questions", [FLEET, NODE], ids=["fleet", "node"])
def test_every_question_reads_series_that_are_emitted(questions: dict[str, str]) -> None:
    """A renamed metric would show as unknown for ever; here it fails."""
    for name, expression in questions.items():
        for metric in re.findall(r"\b(pg_\w+|pgherd_\w+)\{", expression):
            assert metric in COLLECTORS_OWN or f"`{metric}`" in METRICS, f"{name} reads {metric}, which nobody emits"


@pytest.fixture
def herd(postgres_fleet: Fleet, home: Path) -> Iterator[tuple[Collector, Server]]:
    """A collector and one joined agent on a server with pg_stat_statements."""
    server = postgres_fleet.server(settings={"shared_preload_libraries": "pg_stat_statements", "compute_query_id": "on"})
    config = home / "agent.toml"
    config.write_text(CONFIG.format(home=home, conninfo=server.conninfo(), bin_directory=server.binaries.bin_directory))
    argv = [sys.executable, "-m", "pgherd.agent.main", "--config", str(config)]
    with collector() as running:
        running.start()
        token = running.ask("agents", "add", "--name", "a1")["token"]
        subprocess.run([*argv, "join", "--token-file", "-"], input=token + "\n", text=True, check=True, capture_output=True)
        with subprocess.Popen([*argv, "run"], stderr=subprocess.DEVNULL) as agent:
            try:
                wait_until(lambda: running.ask("nodes", "ls"), 30, "the node")
                yield running, server
            finally:
                agent.terminate()
                agent.wait(30)
        running.stop()
    server.stop()


def load(server: Server, stop: threading.Event) -> None:
    """A slow statement, again and again."""
    with server.connect() as connection:
        while not stop.is_set():
            connection.execute(
                "SELECT /* the slow one */ count(*), pg_sleep(0.05) FROM generate_series(1, 20000) AS g(i) WHERE i % 7 = 3"
            )


@pytest.mark.timeout(180)
def test_what_is_slow_who_blocks_how_far_behind_when_is_it_full_is_the_backup_good(herd: tuple[Collector, Server]) -> None:
    running, server = herd
    server.execute("CREATE TABLE accounts AS SELECT 1 AS id, 0 AS balance")
    stop = threading.Event()
    thread = threading.Thread(target=load, args=(server, stop))
    thread.start()
    with psycopg.connect(server.conninfo()) as blocker, psycopg.connect(server.conninfo()) as waiter:
        blocker.execute("UPDATE accounts SET balance = balance + 1 WHERE id = 1")
        blocked = threading.Thread(target=lambda: waiter.execute("UPDATE accounts SET balance = balance - 17 WHERE id = 1"))
        blocked.start()
        pids = (blocker.info.backend_pid, waiter.info.backend_pid)

        def node() -> dict[str, Any]:
            sections: dict[str, Any] = running.ask("top", "n1", "--once")["sections"]
            return sections

        def rows(key: str) -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = node()[key]["rows"]
            return found

        try:
            slow = wait_until(
                lambda: [row for row in rows("slow") if "generate_series" in str(row["query"]["query"])],
                60,
                "the slow statement",
            )
            assert "20000" not in slow[0]["query"]["query"], "literals are removed"
            assert slow[0]["mean"] == pytest.approx(0.06, rel=0.9)
            wait_until(
                lambda: any((row["blocker"], row["blocked"]) == pids for row in rows("blocking")), 30, "the blocking pair"
            )
            wait_until(lambda: [row for row in rows("backups") if row["grade"] == "read back"], 60, "a backup with its grade")
            page = node()
        finally:
            stop.set()
            thread.join()
            blocker.rollback()
            blocked.join()
            waiter.rollback()
    volumes = {row["path_kind"]: row for row in page["disk"]["rows"]}
    assert 0 < volumes["data_directory"]["used"] <= 1
    assert volumes["pg_wal"]["avail"] > 0
    assert page["connections"]["rows"][0]["total"] >= 4
    assert page["transactions"]["rows"][0]["commits"] > 0
    wait_until(
        lambda: node()["replication"]["notes"][:1] == ["no standby is connected and there are no slots"], 20, "no standby"
    )
    text = running.cli("top", "--once", "--plain").stdout
    assert "n1" in text
    assert "\x1b" not in text
    herd_page = running.ask("top", "--once")
    assert [row["node"] for row in herd_page["sections"]["nodes"]["rows"]] == ["n1"]
    missing = running.cli("--json", "top", "nobody", "--once")
    assert json.loads(missing.stderr)["error"]["code"] == "node.not_found"

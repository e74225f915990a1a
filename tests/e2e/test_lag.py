"""Replication lag over the whole line: a pair of servers, a real agent, the collector, and what PromQL answers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.collector import Collector, collector
from support.postgres import Fleet, Pair
from support.waiting import wait_until

pytestmark = [pytest.mark.pg, pytest.mark.slow]

_NODE = """
[[nodes]]
alias = "{alias}"
cluster = "c1"
conninfo = "{conninfo}"
bin_directory = "{bin_directory}"
"""


@pytest.fixture
def herd(postgres_fleet: Fleet, home: Path) -> Iterator[tuple[Collector, Pair]]:
    """A collector and one joined agent that serves both servers."""
    primary = postgres_fleet.server(own_identifier=True)
    pair = Pair(primary, postgres_fleet.standby(primary))
    config = home / "agent.toml"
    text = f'state_directory = "{home}/state"\n[backup]\nrepository = "{home}/repository"\n'
    for alias, server in (("p", pair.primary), ("s", pair.standby)):
        text += _NODE.format(alias=alias, conninfo=server.conninfo(), bin_directory=server.binaries.bin_directory)
    config.write_text(text)
    argv = [sys.executable, "-m", "pgherd.agent.main", "--config", str(config)]
    with collector() as running:
        running.start()
        token = running.ask("agents", "add")["token"]
        subprocess.run([*argv, "join"], input=token, text=True, check=True, capture_output=True, timeout=60)
        with (home / "agent.log").open("wb") as log, subprocess.Popen([*argv, "run"], stdout=log, stderr=log) as agent:
            yield running, pair
            agent.terminate()
            agent.wait(30)
    pair.standby.stop()
    pair.primary.stop()


@pytest.mark.timeout(180)
def test_lag_as_promql_sees_it(herd: tuple[Collector, Pair]) -> None:
    running, pair = herd

    def value(expression: str) -> float | None:
        rows = running.ask("query", expression)["data"]["result"]
        return float(rows[0]["value"][1]) if rows else None

    lag = 'pgherd_replication_lag_seconds{node="s",cluster="c1"}'
    wait_until(lambda: value(lag) == 0, 60, "a lag of 0 on an idle pair")
    assert value("pgherd_cluster_primaries") == 1
    assert value('pgherd_replication_broken{node="s"}') == 0
    # A standby paused at a position from before the first look at the primary lags by "at least": it has to move on once.
    pair.primary.execute("CREATE TABLE seen (x int)")
    written = float(pair.primary.execute("SELECT pg_current_wal_lsn() - '0/0'")[0][0])
    for node, position in (("p", "flush"), ("s", "replay")):
        at = f'pgherd_wal_position_bytes{{node="{node}",position="{position}"}}'
        wait_until(lambda at=at: (value(at) or 0) >= written, 30, f"a look at {node} after the write")  # type: ignore[misc]
    pair.standby.execute("SELECT pg_wal_replay_pause()")
    pair.primary.execute("CREATE TABLE written (x int)")
    wait_until(lambda: (value(lag) or 0) > 3, 30, "a lag that grows while replay is paused")
    assert (value('pgherd_replication_lag_bytes{node="s"}') or 0) > 0
    pair.standby.execute("SELECT pg_wal_replay_resume()")
    wait_until(lambda: value(lag) == 0, 30, "a standby that caught up")
    pair.primary.kill()
    wait_until(lambda: value('pgherd_replication_lag_unknown{node="s",reason="primary_silent"}') == 1, 30, "unknown")
    assert value(lag) is None
    wait_until(lambda: value("pgherd_cluster_primaries") == 0, 30, "no primary")
    wait_until(lambda: value('pgherd_replication_broken{node="s"}') == 1, 30, "a standby without its primary")
    pair.standby.promote()
    wait_until(lambda: value("pgherd_cluster_primaries") == 1, 30, "the next primary")
    wait_until(lambda: value('pgherd_replication_lag_unknown{node="s"}') is None, 30, "a primary has no lag")

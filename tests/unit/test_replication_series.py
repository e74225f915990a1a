"""Lag as series: markers, restarts, late samples, clocks and clusters, on real stores under a clock that the test moves."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import update

from pgherd.collector.control.herd import Herd, NodeReport
from pgherd.collector.replication.series import LagSeries
from pgherd.proto.samples import STALE_NAN
from pgherd.storage.control.schema import agents
from pgherd.storage.control.store import ControlStore
from pgherd.storage.series.batch import Batch, layout_of
from pgherd.storage.series.store import SeriesStore
from support.control import ManualClock, enrol
from support.series import name_is, open_store

START_S = 1_795_000_000.0
IDENTIFIER = "7000000000000000001"


class Bench:
    """Agents whose ticks the test writes; `turn` lets the collector judge."""

    def __init__(self, directory: Path) -> None:
        self.clock = ManualClock(int(START_S * 1e9))
        self.control = ControlStore.open(directory / "control.db")
        self.series: SeriesStore = open_store(directory)
        self.herd = Herd(self.control, self.clock, heartbeat_interval_s=3600)
        self.agents: dict[str, tuple[str, NodeReport]] = {}
        self.lag = self.restart()

    def restart(self) -> LagSeries:
        self.lag = LagSeries(self.control, self.herd, self.series, self.clock)
        return self.lag

    def node(self, alias: str, cluster: str = "c", identifier: str = IDENTIFIER, skew_s: float = 0.0) -> None:
        agent_id = enrol(self.control, f"agent-{alias}")
        number = len(self.agents)
        report = NodeReport(
            f"00000000-0000-4000-8000-{number:012}", alias, cluster, identifier, f"{alias}:5432", 150000, "unknown", "up"
        )
        self.herd.claim(agent_id, (report,), {})
        self.herd.arrive(agent_id, (report,), {"skew_ns": int(skew_s * 1e9)})
        self.agents[alias] = (agent_id, report)

    def says(self, alias: str, condition: str) -> None:
        """What the next heartbeat of its agent says of the server."""
        agent_id, report = self.agents[alias]
        self.herd.heartbeat(agent_id, (replace(report, condition=condition),), {})

    def silence(self, alias: str) -> None:
        """Its agent isn't heard any more."""
        self.herd.depart(self.agents[alias][0])

    def tick(self, alias: str, at_s: float, *, written: int | None = None, replayed: int | None = None, **more: float) -> None:
        """What the agent of `alias` sampled `at_s` seconds after the start by its own clock."""
        values = {"pg_replication_is_replica": float(written is None), "pgherd_timeline": 1.0}
        if written is None:
            values |= {"pgherd_wal_receiver_streaming": 1.0, "pgherd_recovery_min_apply_delay_seconds": 0.0}
        self.points(alias, at_s, values | more, {"flush": written, "replay": replayed})

    def points(self, alias: str, at_s: float, values: dict[str, float], positions: dict[str, int | None] | None = None) -> None:
        report = self.agents[alias][1]
        labels = {"job": "pgherd", "instance": report.instance, "cluster": report.cluster, "node": alias}
        series = [{**labels, "__name__": name} for name in values]
        numbers = list(values.values())
        for position, lsn in (positions or {}).items():
            if lsn is not None:
                series.append({**labels, "__name__": "pgherd_wal_position_bytes", "position": position})
                numbers.append(float(lsn))
        at_ms = round((START_S + at_s) * 1000)
        batch = Batch(
            layout_of(series),
            np.arange(len(series), dtype=np.int32),
            np.full(len(series), at_ms, np.int64),
            np.array(numbers, np.float64),
        )
        self.series.append(batch).result(10)

    def turn(self, at_s: float) -> None:
        """The collector judges at that time."""
        self.clock.advance(START_S + at_s - self.clock.unix_ns / 1e9)
        asyncio.run(self.lag.write())

    def all(self, name: str) -> dict[tuple[tuple[str, str], ...], list[tuple[float, float]]]:
        """Every series of a name by its labels but for job, instance and cluster: (seconds since the start, value)."""
        hidden = {"__name__", "job", "instance"}
        return {
            tuple(sorted((k, v) for k, v in window.labels.items() if k not in hidden)): [
                (round(ms / 1000 - START_S, 3), value)
                for ms, value in zip(window.times_ms.tolist(), window.values.tolist(), strict=True)
            ]
            for window in self.series.select([name_is(name)], 0, 1 << 60)
        }

    def now(self, name: str) -> dict[tuple[tuple[str, str], ...], float]:
        """The series that have a value, with their newest."""
        return {labels: points[-1][1] for labels, points in self.all(name).items() if not math.isnan(points[-1][1])}


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.series.close()
    made.control.close()


def key(**labels: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(labels.items()))


S = key(cluster="c", node="s")


def test_values_are_stamped_with_the_standbys_samples_and_end_with_markers(bench: Bench) -> None:
    bench.node("p")
    bench.node("s")
    for second in range(6):
        bench.tick("p", second, written=1000 + 100 * second)
        bench.tick("s", second - 0.25, replayed=1000)
    bench.turn(5)
    assert bench.all("pgherd_replication_lag_seconds") == {S: [(4.75, 4.25)]}
    assert bench.all("pgherd_replication_lag_bytes") == {S: [(4.75, 400.0)]}
    assert bench.now("pgherd_replication_broken") == {S: 0.0}
    assert bench.now("pgherd_cluster_primaries") == {key(cluster="c"): 1.0}
    bench.turn(6)  # nothing new: what was said stands
    assert len(bench.all("pgherd_replication_lag_seconds")[S]) == 1
    bench.points("p", 7, {"pg_replication_is_replica": STALE_NAN})
    bench.tick("s", 7, replayed=1000)
    bench.turn(7)
    assert bench.now("pgherd_replication_lag_seconds") == {}
    assert bench.all("pgherd_replication_lag_seconds")[S][-1][0] == 4.751
    assert bench.now("pgherd_replication_lag_unknown") == {key(cluster="c", node="s", reason="primary_silent"): 1.0}
    assert bench.now("pgherd_replication_lag_at_least_seconds") == {S: 6.0}
    for second in (8, 9):
        bench.tick("p", second, written=2000)
        bench.tick("s", second - 0.5, replayed=2000)
    bench.turn(9)
    assert bench.now("pgherd_replication_lag_seconds") == {S: 0.0}
    assert bench.now("pgherd_replication_lag_unknown") == {}
    assert bench.now("pgherd_replication_lag_at_least_seconds") == {}


def test_a_restart_reads_its_past_from_the_store(bench: Bench) -> None:
    """Two hours of a cut link, a new process, and it says the same; a standby that went away meanwhile is still expected."""
    bench.node("p")
    bench.node("s")
    bench.node("gone")
    for second in range(0, 7200, 15):
        bench.tick("p", second, written=1000 + second)
        bench.tick("s", second, replayed=1001)
        if second < 60:
            bench.tick("gone", second, replayed=1000 + second)
        if second in (15, 7185):
            bench.turn(second)
    before = bench.now("pgherd_replication_lag_seconds")
    assert before[S] == pytest.approx(7178, rel=0.01)
    agent_id, report = bench.agents["gone"]
    down = NodeReport(report.id, "gone", "c", IDENTIFIER, report.instance, 150000, "unknown", "down")
    bench.herd.heartbeat(agent_id, (down,), {})
    bench.restart()
    bench.tick("p", 7200, written=9000)
    bench.tick("s", 7200, replayed=1001)
    bench.turn(7200)
    after = bench.now("pgherd_replication_lag_seconds")
    assert after[S] == pytest.approx(7193, rel=0.01)
    gone = key(cluster="c", node="gone")
    assert bench.now("pgherd_replication_broken") == {S: 0.0, gone: 1.0}
    assert gone not in after


def test_a_promotion_while_the_collector_was_away_ends_the_old_standbys_series(bench: Bench) -> None:
    bench.node("p")
    bench.node("s")
    for second in range(3):
        bench.tick("p", second, written=1000)
        bench.tick("s", second, replayed=1000)
    bench.turn(2)
    assert bench.now("pgherd_replication_lag_seconds") == {S: 0.0}
    bench.restart()
    bench.tick("s", 60, written=1200, pgherd_timeline=2)
    bench.turn(60)
    assert bench.now("pgherd_replication_lag_seconds") == {}
    assert bench.now("pgherd_replication_broken") == {}
    assert bench.now("pgherd_cluster_primaries") == {key(cluster="c"): 1.0}


def test_what_arrives_late_fills_the_history_and_rewrites_nothing(bench: Bench) -> None:
    bench.node("p")
    bench.node("s")
    for second in range(5):
        bench.tick("p", second, written=1000 + second)
        bench.tick("s", second, replayed=1000 + second)
    bench.turn(4)
    for second in range(5, 95):  # the primary's agent is cut off from the collector
        bench.tick("s", second, replayed=1030 if second > 30 else 1000 + second)
        if second % 10 == 0:
            bench.turn(second)
    assert bench.now("pgherd_replication_lag_unknown") == {key(cluster="c", node="s", reason="primary_silent"): 1.0}
    said = bench.all("pgherd_replication_lag_seconds")[S]
    for second in range(5, 96):  # it is back, and delivers its spool
        bench.tick("p", second, written=1000 + second)
    bench.tick("s", 95, replayed=1030)
    bench.turn(95)
    assert bench.now("pgherd_replication_lag_seconds")[S] == pytest.approx(64.5, abs=0.5)
    after = bench.all("pgherd_replication_lag_seconds")[S]
    assert repr(after[:-1]) == repr(said)  # the marker included


@pytest.mark.parametrize("skew_s", [-40.0, 40.0])
def test_clocks_that_differ_are_corrected_by_their_measured_skew(bench: Bench, skew_s: float) -> None:
    bench.node("p", skew_s=skew_s)  # the collector's clock minus the agent's
    bench.node("s")
    for second in range(20):
        bench.tick("p", second - skew_s, written=1000 + second)
        bench.tick("s", second, replayed=1004)
    bench.turn(19)
    assert bench.now("pgherd_replication_lag_seconds")[S] == pytest.approx(14.5, abs=0.5)


def test_a_clock_that_is_minutes_off_makes_its_lag_unknown(bench: Bench) -> None:
    bench.node("p")
    bench.node("s")
    for second in range(3):
        bench.tick("p", second, written=1000)
        bench.tick("s", second, replayed=1000)
    bench.turn(2)
    agent_id, report = bench.agents["s"]
    bench.herd.heartbeat(agent_id, (report,), {"skew_ns": 300 * 10**9})
    bench.turn(3)
    assert bench.now("pgherd_replication_lag_seconds") == {}
    assert bench.now("pgherd_replication_lag_unknown") == {key(cluster="c", node="s", reason="clock_skew"): 1.0}


def test_two_clusters_under_one_label_arent_mixed(bench: Bench) -> None:
    bench.node("p")
    bench.node("s")
    bench.node("q", identifier="7000000000000000002")
    for second in range(3):
        bench.tick("p", second, written=1000)
        bench.tick("s", second, replayed=1000)
        bench.tick("q", second, written=50_000)
    bench.turn(2)
    assert bench.now("pgherd_replication_lag_seconds") == {S: 0.0}
    assert bench.now("pgherd_cluster_primaries") == {
        key(cluster="c", system_identifier=IDENTIFIER): 1.0,
        key(cluster="c", system_identifier="7000000000000000002"): 1.0,
    }


def test_no_primary_is_zero_only_once_agents_had_time_to_come_back(bench: Bench) -> None:
    bench.node("p")
    bench.node("s")
    for second in range(3):
        bench.tick("p", second, written=1000)
        bench.tick("s", second, replayed=1000)
    bench.turn(2)
    bench.restart()
    bench.silence("p")
    bench.tick("s", 40, replayed=1000)
    bench.turn(40)
    assert bench.now("pgherd_cluster_primaries") == {key(cluster="c"): 1.0}  # said by the process before, not ended
    bench.tick("s", 110, replayed=1000)
    bench.turn(110)
    assert bench.now("pgherd_cluster_primaries") == {key(cluster="c"): 0.0}


PRIMARIES = "pgherd_cluster_primaries"


def led(bench: Bench) -> None:
    """A primary and its standby, seen and old enough for a verdict."""
    bench.node("p")
    bench.node("s")
    bench.turn(0)
    for second in range(98, 101):
        bench.tick("p", second, written=1000)
        bench.tick("s", second, replayed=1000)
    bench.turn(100)
    assert bench.now(PRIMARIES) == {key(cluster="c"): 1.0}


@pytest.mark.parametrize("condition", ["up", "saturated", "auth_failed", "unknown"])
def test_a_primary_whose_samples_are_late_is_never_a_lost_one(bench: Bench, condition: str) -> None:
    """Its agent is heard but starved of CPU, or may not ask: doubt, however long, and 1 again with the first sample."""
    led(bench)
    bench.says("p", condition)
    for second in (116, 130, 170, 300):
        bench.tick("s", second, replayed=1000)
        bench.turn(second)
        assert bench.now(PRIMARIES) == {}
    assert 0.0 not in [value for points in bench.all(PRIMARIES).values() for _, value in points]
    bench.tick("p", 301, written=1000)
    bench.turn(301)
    assert bench.now(PRIMARIES) == {key(cluster="c"): 1.0}


def test_one_failed_question_about_the_role_is_doubt_and_a_server_that_is_down_is_certainty(bench: Bench) -> None:
    led(bench)
    bench.points("p", 101, {"pg_replication_is_replica": STALE_NAN})
    bench.turn(101)
    assert bench.now(PRIMARIES) == {}
    bench.says("p", "down")
    bench.turn(103)
    assert bench.now(PRIMARIES) == {key(cluster="c"): 0.0}


@pytest.mark.parametrize("hung", [False, True])
def test_a_host_that_vanishes_and_a_server_that_hangs_are_doubt_for_the_hold_and_then_gone(bench: Bench, hung: bool) -> None:
    led(bench)
    if hung:
        bench.says("p", "hung")
    else:
        bench.silence("p")
    for second, expected in ((117, {}), (159, {}), (160, {key(cluster="c"): 0.0})):
        bench.turn(second)
        assert bench.now(PRIMARIES) == expected


def test_every_former_primary_must_be_known_not_to_write(bench: Bench) -> None:
    """The next primary dies while the one before it can't be told: doubt, until that one is back as a standby."""
    led(bench)
    bench.says("p", "auth_failed")
    for second in range(120, 123):
        bench.tick("s", second, written=2000)
    bench.turn(122)
    assert bench.now(PRIMARIES) == {key(cluster="c"): 1.0}
    bench.says("s", "down")
    bench.turn(140)
    assert bench.now(PRIMARIES) == {}
    bench.tick("p", 141, replayed=2000)
    bench.turn(141)
    assert bench.now(PRIMARIES) == {key(cluster="c"): 0.0}


def test_a_forgotten_node_and_a_foreign_job_leave_nothing(bench: Bench) -> None:
    bench.node("p")
    bench.node("s")
    for second in range(3):
        bench.tick("p", second, written=1000)
        bench.tick("s", second, replayed=1000)
    bench.turn(2)
    with bench.control.begin() as connection:
        connection.execute(update(agents).where(agents.c.id == bench.agents["s"][0]).values(status="revoked"))
    bench.turn(3)
    for name in ("lag_seconds", "lag_bytes", "lag_unknown", "broken"):
        assert bench.now(f"pgherd_replication_{name}") == {}, name

"""Public dashboards work as they are: every panel's question gets an answer, from the server through agent and store to PromQL."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import psycopg
import pytest

from pgherd.agent.telemetry.ship import Shipper
from pgherd.collector.ingest.service import MetricsService, ServiceSettings
from pgherd.promql.engine import evaluate_instant, evaluate_range
from pgherd.promql.values import Matrix, Vector
from pgherd.runtime.clock import SystemClock
from pgherd.storage.series.store import SeriesStore
from support.dashboards import ALERT_SERIES, VARIABLES, panels, ratios
from support.postgres import Fleet, Server
from support.sampling import AGENT_ID, SAMPLING, sampling
from support.series import open_store
from support.waiting import wait_until

pytestmark = pytest.mark.pg

SECONDS = 150


class HurriedClock(SystemClock):
    """The system's clock and as many seconds as the test has left out."""

    ahead_s = 0.0

    def mono_s(self) -> float:
        return super().mono_s() + self.ahead_s

    def wall_unix_ns(self) -> int:
        return super().wall_unix_ns() + int(self.ahead_s * 1e9)


@dataclass(frozen=True, slots=True)
class Sampled:
    """A store with two and a half minutes of a working server."""

    store: SeriesStore
    instance: str
    end_ms: int

    def answers(self, question: str) -> bool:
        """Whether the question has an answer now, and over the last half minute: as a stat and as a graph ask."""
        now = evaluate_instant(question, self.end_ms, self.store)
        graph = evaluate_range(question, self.end_ms - 30_000, self.end_ms, 15_000, self.store)
        assert isinstance(now, Vector)
        assert isinstance(graph, Matrix)
        return bool(now.samples) and bool(graph.series)


@pytest.fixture(scope="module", params=[15, 17, 18])
def sampled(
    request: pytest.FixtureRequest, postgres_fleet: Fleet, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sampled]:
    directory = tmp_path_factory.mktemp("dashboards")
    server = postgres_fleet.server(request.param, settings={"archive_mode": "on", "archive_command": "true"})
    server.create_role("monitor", member_of=["pg_monitor"])
    server.execute("SELECT pg_create_physical_replication_slot('a_slot', true)")
    store = open_store(directory)
    try:
        with at_work(server):
            instance, end_ms = asyncio.run(two_and_a_half_minutes(server, store, directory / "spool"))
        yield Sampled(store, instance, end_ms)
    finally:
        store.close()
        server.stop()


@contextlib.contextmanager
def at_work(server: Server) -> Iterator[None]:
    """Rows written and read, a lock held, a session that works and one that idles in its transaction."""
    server.execute(
        "CREATE TABLE t AS SELECT generate_series(1, 100) AS id; UPDATE t SET id = id + 1; DELETE FROM t WHERE id < 5"
    )
    server.execute("SELECT count(*) FROM t")
    server.execute("SELECT pg_switch_wal()")
    wait_until(
        lambda: server.execute("SELECT archived_count > 0 FROM pg_stat_archiver") == [(True,)], 30, "an archived segment"
    )
    with psycopg.connect(server.conninfo()) as idle, psycopg.connect(server.conninfo()) as active:
        idle.execute("INSERT INTO t VALUES (0)")
        thread = threading.Thread(target=until_cancelled, args=(active, "SELECT pg_sleep(300) FROM t"))
        thread.start()
        try:
            yield
        finally:
            active.cancel()
            thread.join(10)


def until_cancelled(link: psycopg.Connection[object], statement: str) -> None:
    with contextlib.suppress(psycopg.errors.QueryCanceled):
        link.execute(statement.encode())


async def two_and_a_half_minutes(server: Server, store: SeriesStore, directory: Path) -> tuple[str, int]:
    """Tick every second at the real intervals, without waiting for them; what is spooled goes into the store as it would."""
    clock = HurriedClock()
    service = MetricsService(
        store, current_peer=lambda _: Agent(), owns=lambda *_: True, clock=clock, settings=ServiceSettings()
    )
    collector = grpc.aio.server()
    collector.add_generic_rpc_handlers((service.handler(),))
    port = collector.add_insecure_port("127.0.0.1:0")
    await collector.start()
    try:
        async with sampling(directory, server.conninfo("monitor"), settings=SAMPLING, clock=clock) as bench:
            for _ in range(SECONDS):
                report = await bench.sampler.tick()
                assert report.condition == "up"
                clock.ahead_s += 1.0
            shipper = Shipper(bench.spool, lambda: grpc.aio.insecure_channel(f"127.0.0.1:{port}"), clock)
            while await shipper.ship_next() is not None:
                pass
            await shipper.reconnect()
            assert bench.spool.status.counts.acked_points == store.counters.points_stored > 0
            return bench.sampler.status.instance, report.unix_ns // 1_000_000
    finally:
        await collector.stop(None)
        service.close()


class Agent:
    """Who the collector takes the sender for."""

    kind = "agent"
    id = AGENT_ID


def test_every_panel_gets_an_answer(sampled: Sampled) -> None:
    asked = list(panels())
    assert len({panel.series for panel in asked if panel.dashboard == 9628}) >= 37
    unanswered = [
        f"{panel.dashboard} {panel.title}: {panel.promql(sampled.instance)}"
        for panel in asked
        if not sampled.answers(panel.promql(sampled.instance))
    ]
    assert unanswered == []
    for question in ratios(sampled.instance):
        assert sampled.answers(question)


def test_the_variables_find_something_to_choose(sampled: Sampled) -> None:
    for question in VARIABLES:
        assert sampled.answers(question)
    assert "postgres" in sampled.store.label_values("datname", [], 0, sampled.end_ms)
    assert "accesssharelock" in sampled.store.label_values("mode", [], 0, sampled.end_ms)


def test_rules_written_for_postgres_exporter_find_their_series(sampled: Sampled) -> None:
    assert [name for name in ALERT_SERIES if not sampled.answers(name)] == []

"""What was sampled is stored, once: after an hour without a collector, ten kills of the agent, on a link that loses a fifth.

PGHERD_NIGHTLY=1 takes longer runs. Seeds are printed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import grpc.aio
import pytest

from pgherd.agent.config import SpoolConfig
from pgherd.agent.identity.join import join_herd
from pgherd.agent.telemetry.convert import Source
from pgherd.agent.telemetry.emit import Emitter
from pgherd.agent.telemetry.ship import Shipper, ShipSettings
from pgherd.collector.ingest.service import MetricsService, ServiceSettings
from pgherd.proto.enrolment import JoinToken
from pgherd.proto.samples import Metric, MetricKind, Sample
from pgherd.runtime.queue.spool import Spool
from pgherd.storage.series.store import SeriesStore
from support.collector import Collector, collector
from support.lossy_proxy import lossy_proxy
from support.otlp import AGENT
from support.sampling import until
from support.series import HandClock, open_store, quiet
from support.shipping_agent import LIVE_SERIES, points_of
from support.waiting import wait_until

pytestmark = [pytest.mark.fault, pytest.mark.slow]

NIGHTLY = bool(os.environ.get("PGHERD_NIGHTLY"))
AGENT_PROCESS = Path(__file__).resolve().parents[1] / "support" / "shipping_agent.py"

# --- an hour without a collector ------------------------------------------------------------------

HOUR_S = 3600
LIVE_SERIES_A_SECOND, CYCLE_SERIES, SLOW_SERIES = 12, 400 if NIGHTLY else 150, 300


def tick(second: int) -> dict[str, list[Sample]]:
    """One second's batch: the live tier each second, the cycle each ten, the slow tier each minute, as the agent's rates are."""
    tiers = [("live", 1, LIVE_SERIES_A_SECOND), ("cycle", 10, CYCLE_SERIES), ("slow", 60, SLOW_SERIES)]
    return {
        tier: [Sample(Metric(f"test_{tier}", MetricKind.GAUGE, "h"), {"i": str(i)}, second + i / 1000) for i in range(count)]
        for tier, every, count in tiers
        if second % every == 0
    }


@dataclass
class Hour:
    """What the books say at the end of it."""

    counts: Any
    status: Any
    requests: int
    drained_s: float
    batches: int


async def hour_without_a_collector(directory: Path, store: SeriesStore, clock: HandClock, size_max: int) -> Hour:
    spool = Spool.open(directory / "spool", SpoolConfig(size_max=size_max), clock)
    emitter = Emitter(Source(AGENT, "", "", "", "h:1"), spool)
    for second in range(HOUR_S):
        clock.unix_ms += 1000
        await emitter.emit(tick(second), clock.wall_unix_ns())
    batches = spool.status.pending_batches
    async with serving(store, clock) as (service, port):
        shipper = Shipper(spool, lambda: grpc.aio.insecure_channel(f"127.0.0.1:{port}"), clock, ShipSettings())
        began = time.monotonic()
        task = asyncio.create_task(shipper.run())
        await until(lambda: spool.status.pending_batches == 0, 90, "the backlog to be shipped")
        drained_s = time.monotonic() - began
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        requests = service.counters.requests
    counts = spool.status.counts
    spool.close()
    return Hour(counts, shipper.status, requests, drained_s, batches)


class OneAgent:
    kind, id = "agent", AGENT


@contextlib.asynccontextmanager
async def serving(store: SeriesStore, clock: HandClock) -> AsyncIterator[tuple[MetricsService, int]]:
    service = MetricsService(
        store, current_peer=lambda _: OneAgent(), owns=lambda _a, _n: True, clock=clock, settings=ServiceSettings()
    )
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((service.handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield service, port
    finally:
        await server.stop(1.0)
        service.close()


def rows(path: Path) -> tuple[int, int]:
    """(samples stored, distinct ones) of a closed store, as DuckDB itself sees it."""
    with duckdb.connect(str(path), read_only=True) as connection:
        found = connection.execute("SELECT count(*), count(DISTINCT (series_id, ts_ms)) FROM samples").fetchone()
    assert found is not None
    return int(found[0]), int(found[1])


SAMPLED = sum(len(samples) for second in range(HOUR_S) for samples in tick(second).values())


@pytest.mark.parametrize(("size_max", "has_room"), [(256 * 1024 * 1024, True), (1024 * 1024, False)])
def test_an_hour_without_a_collector(tmp_path: Path, size_max: int, has_room: bool) -> None:
    clock = HandClock()
    store = open_store(tmp_path, quiet(), clock)
    hour = asyncio.run(hour_without_a_collector(tmp_path, store, clock, size_max))
    (shipped,) = store.shipments()
    store.close()
    counts = hour.counts
    assert counts.sampled_points == SAMPLED
    assert counts.acked_points == shipped.stored_points == SAMPLED - counts.evicted_points
    assert (counts.refused_points, counts.poisoned_points, counts.lost_points, counts.pending_points) == (0, 0, 0, 0)
    assert rows(tmp_path / "series.duckdb") == (counts.acked_points, counts.acked_points)
    assert (counts.evicted_points == 0) == has_room
    assert shipped.gaps == HOUR_S - counts.acked_batches
    assert hour.status.rejected_points == 0
    print(
        f"an hour: {HOUR_S} batches, {SAMPLED} points; evicted {counts.evicted_points}; {counts.acked_batches} batches shipped in"
        f" {hour.requests} requests and {hour.drained_s:.1f} s"
    )
    assert hour.requests < counts.acked_batches / 4, "a backlog goes in groups"


# --- a real collector, an agent's process ---------------------------------------------------------


@dataclass
class Joined:
    """A running collector and the state directory of an agent that joined it."""

    herd: Collector
    state: Path

    @contextlib.contextmanager
    def agent(self, port: int, rate: float) -> Iterator[subprocess.Popen[bytes]]:
        with (self.state / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, str(AGENT_PROCESS), str(self.state), str(port), str(rate)], stdout=log, stderr=log
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait(20)

    def finish(self, process: subprocess.Popen[bytes]) -> None:
        """Let it end by itself once all is shipped."""
        process.send_signal(signal.SIGTERM)
        assert process.wait(90) == 0, (self.state / "log").read_text()

    def sampled(self) -> list[int]:
        path = self.state / "sampled"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def stored_points(self) -> int:
        with self.herd.http(headers=self.herd.token("viewer")) as http:
            (state,) = http.get("/api/v1/shipments").json()["items"]
        return int(state["stored_points"])

    def stored_cycles(self) -> dict[int, int]:
        """Cycle → samples of it; the collector must have been stopped."""
        with duckdb.connect(str(self.herd.state / "series.duckdb"), read_only=True) as connection:
            query = (
                "SELECT value::BIGINT, count(*) FROM samples JOIN series ON id = series_id WHERE name LIKE 'test_%' AND NOT isnan(value)"
                " GROUP BY 1"
            )
            return dict(connection.execute(query).fetchall())

    def counts(self) -> Any:
        spool = Spool.open(self.state / "spool", SpoolConfig(), HandClock())
        counts = spool.status.counts
        spool.close()
        return counts


@pytest.fixture
def joined() -> Iterator[Joined]:
    with collector() as herd:
        herd.start()
        state = herd.directory / "agent"
        join_herd(state, JoinToken.parse(herd.ask("agents", "add")["token"]))
        yield Joined(herd, state)


def check_cycles(joined: Joined, seed: int, *, unspooled_max: int) -> None:
    """Each sampled cycle is stored whole and once; a kill may cost the one that it fell into."""
    assert joined.herd.stop() == 0
    sampled, stored, counts = joined.sampled(), joined.stored_cycles(), joined.counts()
    assert len(sampled) == len(set(sampled)) == sampled[-1]
    missing = [number for number in sampled if number not in stored]
    print(f"seed {seed}: {len(sampled)} cycles sampled, {len(stored)} stored, never spooled {missing}")
    assert len(missing) <= unspooled_max
    assert stored == {number: points_of(number) for number in sampled if number not in missing}
    assert counts.sampled_points == counts.acked_points
    assert counts.dropped_points == 0


@pytest.mark.timeout(240)
def test_ten_kills_of_the_agent_cost_at_most_the_cycle_they_fall_into(joined: Joined) -> None:
    seed = random.randrange(1 << 32)
    dice, kills = random.Random(seed), 40 if NIGHTLY else 10
    print(f"seed {seed}")
    for kill in range(kills + 1):
        before = len(joined.sampled())
        with joined.agent(joined.herd.ports["grpc"], 100.0) as process:
            wanted = before + dice.randrange(1, 40)
            wait_until(lambda wanted=wanted: len(joined.sampled()) >= wanted, 30, "some cycles")  # type: ignore[misc]
            if kill == kills:
                joined.finish(process)
            else:
                process.send_signal(signal.SIGKILL)
    points = joined.counts().acked_points
    assert joined.stored_points() == points
    check_cycles(joined, seed, unspooled_max=kills)


@pytest.mark.timeout(240)
def test_a_link_that_loses_a_fifth_loses_and_repeats_nothing(joined: Joined) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    cycles = 3000 if NIGHTLY else 80
    with lossy_proxy(joined.herd.ports["grpc"], seed, 0.2) as proxy, joined.agent(proxy.port, 100.0) as process:
        wait_until(
            lambda: len(joined.sampled()) >= cycles and proxy.cut_requests and proxy.cut_answers, 120, "cycles and losses"
        )
        joined.finish(process)
        print(f"{proxy.forwarded} pieces passed, {proxy.cut_requests} requests and {proxy.cut_answers} answers were lost")
    points = joined.counts().acked_points
    assert joined.stored_points() == points
    check_cycles(joined, seed, unspooled_max=0)


def test_the_numbers_of_the_test_add_up() -> None:
    assert [points_of(n) for n in (1, 10)] == [LIVE_SERIES, 105]
    assert SAMPLED == HOUR_S * LIVE_SERIES_A_SECOND + HOUR_S // 10 * CYCLE_SERIES + HOUR_S // 60 * SLOW_SERIES
    assert list(itertools.islice(tick(60), 3)) == ["live", "cycle", "slow"]

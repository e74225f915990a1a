"""Forwarding to Debian's Prometheus, which isn't there at first: it ends up with every sample and every stale marker."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import httpx
import numpy as np
import pytest

from pgherd.collector.config import ForwardConfig, RemoteWriteConfig
from pgherd.collector.forward.forwarder import Forwarder, Pace
from pgherd.proto.samples import STALE_NAN, Metric, MetricKind
from pgherd.runtime.clock import SystemClock
from pgherd.storage.series.batch import Batch, layout_of
from pgherd.storage.series.store import SeriesStore
from support.postgres import free_port
from support.sampling import until
from support.series import HandClock, quiet
from support.waiting import wait_until

pytestmark = pytest.mark.peers

CYCLES, SERIES = 60, 200


def test_prometheus_has_what_we_have_after_an_outage_of_both(tmp_path: Path) -> None:
    port, clock = free_port(), HandClock(SystemClock().wall_unix_ns() // 1_000_000 - CYCLES * 10_000 - 60_000)
    config = ForwardConfig(remote_write=(RemoteWriteConfig("prom", f"http://127.0.0.1:{port}/api/v1/write"),))
    pace = Pace(backoff_min_s=0.05, backoff_max_s=0.2)
    layout = layout_of(
        [{"__name__": "pg_stat_x_total", "job": "pgherd", "i": str(i), "A": "sorted first"} for i in range(SERIES)],
        [Metric("pg_stat_x_total", MetricKind.COUNTER, "help", "By")],
    )
    rng = np.random.default_rng(7)
    sent = rng.random((CYCLES, SERIES)).cumsum(axis=0)

    def put(store: SeriesStore, cycles: range) -> None:
        for cycle in cycles:
            clock.unix_ms += 10_000
            values = sent[cycle].copy()
            if cycle == CYCLES - 1:
                values[0] = STALE_NAN
            columns = np.arange(SERIES, dtype=np.int32), np.full(SERIES, clock.unix_ms, np.int64), values
            store.append(Batch(layout, *columns)).result(10)

    def open_both() -> tuple[Forwarder, SeriesStore]:
        forwarder = Forwarder.open(tmp_path / "forward", config, SystemClock(), pace)
        return forwarder, SeriesStore.open(tmp_path / "series.duckdb", quiet(), clock, forwarder.tap)

    async def send(forwarder: Forwarder, points: int) -> None:
        task = asyncio.create_task(forwarder.run())
        await until(lambda: forwarder.status()[0].sent_points >= points, 30, "everything to be sent")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    forwarder, store = open_both()
    put(store, range(CYCLES // 2))  # Prometheus is down
    store.close()
    forwarder.close()
    (tmp_path / "prometheus.yml").write_text("global:\n  scrape_interval: 1h\n")
    argv = [
        "prometheus", f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}", "--web.enable-remote-write-receiver", "--log.level=warn",
    ]  # fmt: skip
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(argv, stdout=log, stderr=log) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20, trust_env=False) as client:

                def is_ready() -> bool:
                    try:
                        return client.get("/-/ready").status_code == 200
                    except httpx.TransportError:
                        return False

                wait_until(is_ready, 30, "Prometheus to be ready")
                forwarder, store = open_both()
                put(store, range(CYCLES // 2, CYCLES))
                asyncio.run(send(forwarder, CYCLES * SERIES))
                (status,) = forwarder.status()
                assert (status.sent_points, status.dropped_points, status.failed_points) == (CYCLES * SERIES, 0, 0)
                at_s = clock.unix_ms / 1000
                found = client.get("/api/v1/query", params={"query": "pg_stat_x_total[2h]", "time": at_s}).json()["data"][
                    "result"
                ]
                now = client.get("/api/v1/query", params={"query": "count(pg_stat_x_total)", "time": at_s}).json()["data"][
                    "result"
                ]
                assert now[0]["value"][1] == str(SERIES - 1), "the stale marker arrived as one"
                assert len(found) == SERIES
                for one in found:
                    place = int(one["metric"]["i"])
                    values = [float(value) for _, value in one["values"]]
                    assert values == sent[: CYCLES - (place == 0), place].tolist()
                store.close()
                forwarder.close()
        finally:
            process.terminate()
            process.wait(20)

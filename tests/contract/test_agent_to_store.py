"""The first flow with real parts: server → sampler → spool → shipper → gRPC → ingest → series store, point for point."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc.aio
import pytest

from pgherd.agent.telemetry.ship import Shipper
from pgherd.collector.ingest.service import MetricsService, ServiceSettings
from pgherd.proto.selectors import Matcher, MatchOp
from pgherd.runtime.clock import SystemClock
from pgherd.storage.series.store import SeriesSettings, SeriesStore
from support.postgres import Server
from support.sampling import AGENT_ID, sampling

pytestmark = pytest.mark.pg


class _Agent:
    kind = "agent"
    id = AGENT_ID


def test_points_sampled_are_points_stored(private_postgres: Server, tmp_path: Path) -> None:
    private_postgres.create_role("monitor", member_of=["pg_monitor"])
    store = SeriesStore.open(tmp_path / "series.duckdb", SeriesSettings(), SystemClock())
    service = MetricsService(
        store, current_peer=lambda _: _Agent(), owns=lambda *_: True, clock=SystemClock(), settings=ServiceSettings()
    )

    async def work() -> None:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((service.handler(),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with sampling(tmp_path / "spool", private_postgres.conninfo("monitor")) as bench:
            await bench.sampler.cycle()
            await bench.sampler.cycle()
            private_postgres.stop()
            await bench.sampler.cycle()  # ends every series of the server
            shipper = Shipper(bench.spool, lambda: grpc.aio.insecure_channel(f"127.0.0.1:{port}"), SystemClock())
            first = await asyncio.to_thread(bench.spool.head)
            assert first is not None
            await shipper._send([first])  # its ack gets lost: the shipper sends it once more below
            while await shipper.ship_next() is not None:
                pass
            await shipper.reconnect()
            counts = bench.spool.status.counts
            assert counts.acked_points == counts.sampled_points == store.counters.points_stored
            assert shipper.status.failures == shipper.status.rejected_points == 0
        await server.stop(None)

    try:
        asyncio.run(work())
        up = store.select([Matcher("__name__", MatchOp.EQUAL, "pg_up")], 0, 1 << 52)
        assert [list(window.values) for window in up] == [[1.0, 1.0, 0.0]]
        labels = up[0].labels
        assert (labels["job"], labels["node"], labels["cluster"]) == ("pgherd", "n1", "c1")
        assert labels["instance"].endswith(f":{private_postgres.port}")
    finally:
        store.close()
        service.close()

"""Ingest: data points a second with durable ack over loopback gRPC, and what the collector's side weighs.

`python tests/perf/bench_ingest.py [--agents 16] [--points 1000] [--seconds 5]` prints one JSON object. The server runs in a
process of its own, with the real service and a real store, without TLS; the load generator shares the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
import tempfile
import time
import uuid
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import numpy as np

from pgherd.collector.ingest.admit import AdmitLimits
from pgherd.collector.ingest.quota import Quota
from pgherd.collector.ingest.service import SERVICE, MetricsService, ServiceSettings
from pgherd.collector.ingest.shape import scan
from pgherd.runtime.clock import SystemClock
from pgherd.storage.series.store import SeriesSettings, SeriesStore
from support.otlp import simple


class _Agent:
    """Stands in for the identity gate: the incarnation names the caller."""

    kind = "agent"

    def __init__(self, agent_id: str) -> None:
        self.id = agent_id


def serve(directory: str, pipe: Connection) -> None:
    """The collector's side, until told to stop; then its figures."""
    import grpc.aio
    import psutil

    async def main() -> None:
        store = SeriesStore.open(Path(directory) / "series.duckdb", SeriesSettings(), SystemClock())
        service = MetricsService(
            store,
            current_peer=lambda context: _Agent(dict(context.invocation_metadata())["pgherd-incarnation"]),
            owns=lambda _agent, _node: True,
            clock=SystemClock(),
            settings=ServiceSettings(limits=AdmitLimits(request_bytes_max=64 * 1024 * 1024), quota=Quota(1e9, 1e12)),
        )
        server = grpc.aio.server(options=[("grpc.max_receive_message_length", 64 * 1024 * 1024)])
        server.add_generic_rpc_handlers((service.handler(),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        pipe.send(port)
        await asyncio.to_thread(pipe.recv)
        await server.stop(1.0)
        process, shapes, counters = psutil.Process(), service.shapes, store.counters
        pipe.send(
            {
                "collector_rss_bytes": process.memory_info().rss,
                "collector_cpu_s": sum(process.cpu_times()[:2]),
                "points_stored": counters.points_stored,
                "series": store.gauges().series,
                "commits": counters.commits,
                "commit_s_mean": counters.commit_seconds / max(counters.commits, 1),
                "shape_hits": shapes.hits,
                "shape_misses": shapes.misses,
            }
        )
        store.close()
        service.close()

    asyncio.run(main())


async def load(port: int, agents: int, points: int, seconds: float) -> dict[str, float]:
    """Every agent ships its next batch when the last was acknowledged, as ours do."""
    import grpc.aio

    latencies: list[float] = []
    deadline = time.monotonic() + seconds

    async def agent() -> None:
        agent_id = str(uuid.uuid4())
        body = bytearray(simple([1.5] * points, 1, agent=agent_id, node=agent_id, instance=agent_id))
        words = np.ndarray((len(body) - 7,), np.dtype("<u8"), body, 0, (1,))
        times = np.array([point.time for point in scan(bytes(body)) or ()])
        sequence = 0
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            export: Any = channel.unary_unary(f"/{SERVICE}/Export", None, None)
            while time.monotonic() < deadline:
                sequence += 1
                words[times] = SystemClock().wall_unix_ns()
                began = time.monotonic()
                metadata = (("pgherd-incarnation", agent_id), ("pgherd-sequence", str(sequence)))
                await export(bytes(body), timeout=30, metadata=metadata)
                latencies.append(time.monotonic() - began)

    began = time.monotonic()
    await asyncio.gather(*(agent() for _ in range(agents)))
    elapsed = time.monotonic() - began
    latencies.sort()
    return {
        "points_per_s": len(latencies) * points / elapsed,
        "requests_per_s": len(latencies) / elapsed,
        "ack_p50_s": latencies[len(latencies) // 2],
        "ack_p99_s": latencies[int(len(latencies) * 0.99)],
        "points_acknowledged": len(latencies) * points,
    }


def bench(agents: int, points: int, seconds: float) -> dict[str, object]:
    """One measurement; the figures of both sides."""
    directory = tempfile.mkdtemp(prefix="pgherd-bench-")
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(directory, theirs))
    server.start()
    try:
        if not ours.poll(60):
            raise RuntimeError("the server didn't start within 60 s")
        figures: dict[str, object] = {
            "agents": agents,
            "points_per_request": points,
            **asyncio.run(load(ours.recv(), agents, points, seconds)),
        }
        ours.send("stop")
        if not ours.poll(60):
            raise RuntimeError("the server didn't stop within 60 s")
        figures |= ours.recv()
        server.join(60)
        figures["file_bytes"] = sum(path.stat().st_size for path in Path(directory).glob("series.duckdb*"))
        return figures
    finally:
        if server.is_alive():
            server.kill()
        server.join(10)
        shutil.rmtree(directory, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--agents", type=int, default=16)
    parser.add_argument("--points", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    print(json.dumps(bench(arguments.agents, arguments.points, arguments.seconds), indent=2))


if __name__ == "__main__":
    main()

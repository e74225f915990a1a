"""What sampling costs: cycle time, agent CPU and memory, spooled bytes. Prints JSON; asserts nothing about time.

    python tests/perf/bench_sampling.py [--cycles 200] [--major 15]

The sampler runs in a child with the resident's imports only, on a real server with light load and a
role that has pg_monitor. `resident_imports` is the memory of those imports alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

_IMPORTS = """
import pgherd.agent.lean
import json, os, psutil
base = psutil.Process().memory_full_info()
import asyncio, grpc.aio, structlog
import pgherd.agent.sampler, pgherd.agent.telemetry.ship
info = psutil.Process().memory_full_info()
print(json.dumps({"rss_bytes": info.rss, "private_bytes": info.uss, "before_bytes": base.rss}))
"""

_SAMPLER = """
import pgherd.agent.lean
import asyncio, json, sys, time
from pathlib import Path
import psutil
from pgherd.agent.config import NodeConfig, SamplingConfig, SpoolConfig
from pgherd.agent.probes.catalog import load_catalog
from pgherd.agent.sampler import NodeSampler
from pgherd.agent.telemetry import ship
from pgherd.runtime.queue.spool import Spool
from pgherd.runtime.clock import SystemClock
from pgherd.runtime.logging import configure
conninfo, directory, cycles = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
configure(level="warning")
async def main():
    clock = SystemClock()
    spool = Spool.open(directory, SpoolConfig(), clock)
    sampler = NodeSampler(agent_id="a", node_id="n", node=NodeConfig("n", "c", conninfo), sampling=SamplingConfig(),
                          catalog=load_catalog(), spool=spool, clock=clock)
    first = await sampler.cycle()
    process, walls, points = psutil.Process(), [], []
    cpu = process.cpu_times()
    for _ in range(cycles):
        started = time.perf_counter()
        report = await sampler.cycle()
        walls.append(time.perf_counter() - started)
        points.append(report.points)
    spent = process.cpu_times()
    info = process.memory_full_info()
    print(json.dumps({"walls_s": walls, "points_first_cycle": first.points, "points_per_cycle": points[-1],
        "cpu_s": spent.user + spent.system - cpu.user - cpu.system, "rss_bytes": info.rss, "private_bytes": info.uss,
        "spool_bytes": spool.status.size_bytes, "condition": first.condition}))
    await sampler.close()
    spool.close()
asyncio.run(main())
"""


def _child(*argv: str) -> dict[str, object]:
    done = subprocess.run([sys.executable, "-c", *argv], capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from support.postgres import default_major, fleet

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--major", type=int, default=default_major())
    options = parser.parse_args()
    imports = _child(_IMPORTS)
    with fleet() as servers, tempfile.TemporaryDirectory() as directory:
        server = servers.server(options.major)
        server.create_role("monitor", member_of=["pg_monitor"])
        measured = _child(_SAMPLER, server.conninfo("monitor"), str(Path(directory) / "spool"), str(options.cycles))
    walls = measured.pop("walls_s")
    assert isinstance(walls, list)
    cpu_s = measured.pop("cpu_s")
    assert isinstance(cpu_s, float)
    quantiles = statistics.quantiles(walls, n=100)
    result = {
        "bench": "sampling",
        "major": options.major,
        "cycles": options.cycles,
        "cycle_p50_ms": round(quantiles[49] * 1000, 2),
        "cycle_p95_ms": round(quantiles[94] * 1000, 2),
        "cpu_per_cycle_ms": round(cpu_s / options.cycles * 1000, 2),
        "cpu_share_at_10s": round(cpu_s / options.cycles / 10.0, 5),
        "spool_bytes_per_cycle": round(float(str(measured["spool_bytes"])) / (options.cycles + 1)),
        **measured,
        "resident_imports": imports,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

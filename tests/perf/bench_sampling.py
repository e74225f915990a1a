"""What sampling costs: the server, the agent, and beside them Debian's postgres_exporter. Prints JSON; asserts nothing about time.

    python tests/perf/bench_sampling.py [--cycles 200] [--seconds 60] [--databases 53] [--tables 1000] [--major 15]

The sampler runs in a child with the resident's imports only, on a real server with many databases, and a role that
has pg_monitor: first `cycles` cycles one after the other (cycle time), then `seconds` at its own intervals (what it costs a
server and a host). Then the exporter is scraped every 10 s for as long. The server's side is the CPU of the backends that
served each, from the kernel (/proc/<pid>/schedstat). The walk over tables and pg_stat_statements have their own bench.
`resident_imports` is the memory of the imports alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from pgherd.agent.probes.meter import Meter
from support.postgres import Server, default_major, fleet, free_port
from support.waiting import wait_until

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
from pgherd.agent.probes.budget import SHED_ORDER
from pgherd.agent.probes.catalog import load_catalog
from pgherd.agent.sampler import NodeSampler
from pgherd.agent.telemetry import ship
from pgherd.runtime.queue.spool import Spool
from pgherd.runtime.clock import SystemClock
from pgherd.runtime.logging import configure
conninfo, directory, cycles, seconds = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
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
    spent, spool_bytes = process.cpu_times(), spool.status.size_bytes
    # Anew, at its own pace: the first cycle asked everything.
    before, server_s, booked = process.cpu_times(), sampler.connection.cpu_s, {t: sampler.budget.spent_s(t) for t in SHED_ORDER}
    task = asyncio.create_task(sampler.run())
    await asyncio.sleep(seconds)
    at_pace = process.cpu_times()
    server_s = sampler.connection.cpu_s - server_s
    booked = {t: round(sampler.budget.spent_s(t) - booked[t], 4) for t in SHED_ORDER}
    shed, ratio = sampler.budget.shed, sampler.budget.ratio
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    info = process.memory_full_info()
    print(json.dumps({"server_cpu_s": server_s, "agent_cpu_s": at_pace.user + at_pace.system - before.user - before.system,
        "server_booked_s": booked, "shed": shed, "budget_ratio": round(ratio, 3),"walls_s": walls, "points_first_cycle": first.points, "points_per_cycle": points[-1],
        "cpu_s": spent.user + spent.system - cpu.user - cpu.system, "rss_bytes": info.rss, "private_bytes": info.uss,
        "spool_bytes": spool_bytes, "condition": first.condition}))
    spool.close()
asyncio.run(main())
"""


def _child(*argv: str) -> dict[str, object]:
    done = subprocess.run([sys.executable, "-c", *argv], capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def _beside(server: Server, seconds: float) -> dict[str, object] | None:
    """Debian's exporter under the same load: scraped every 10 s. None where it isn't installed."""
    program = shutil.which("prometheus-postgres-exporter")
    if program is None:
        return None
    port = free_port()
    environment = {
        "DATA_SOURCE_NAME": f"host={server.socket_directory} port={server.port} user=exporter dbname=postgres sslmode=disable"
    }
    exporter = subprocess.Popen(
        [program, f"--web.listen-address=127.0.0.1:{port}"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}/metrics"
        wait_until(lambda: _answers(url), 20, "the exporter")
        process = psutil.Process(exporter.pid)
        meters: dict[int, Meter] = {}
        walls, series, started = [], 0, time.monotonic()
        _scrape(url)
        before = process.cpu_times()
        first = _backends_cpu_s(server, meters)
        for number in range(1, max(2, round(seconds / 10) + 1)):
            time.sleep(max(0.0, started + 10 * number - time.monotonic()))
            asked = time.perf_counter()
            series = sum(not line.startswith("#") for line in _scrape(url).splitlines())
            walls.append(time.perf_counter() - asked)
        took_s = time.monotonic() - started
        after = process.cpu_times()
        return {
            "scrape_p50_ms": round(statistics.median(walls) * 1000, 1),
            "series": series,
            "server_cpu_share": round((_backends_cpu_s(server, meters) - first) / took_s, 5),
            "cpu_share": round((after.user + after.system - before.user - before.system) / took_s, 5),
            "rss_mib": round(process.memory_info().rss / 2**20, 1),
        }
    finally:
        exporter.terminate()
        exporter.wait(10)


def _answers(url: str) -> bool:
    try:
        return bool(_scrape(url))
    except OSError:
        return False


def _scrape(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        text: str = answer.read().decode()
        return text


def _backends_cpu_s(server: Server, meters: dict[int, Meter]) -> float:
    """CPU of the exporter's backends so far; it keeps its connections."""
    for pid in (pid for (pid,) in server.execute("SELECT pid FROM pg_stat_activity WHERE usename = 'exporter'")):
        if pid not in meters and (meter := Meter.of_backend(pid)) is not None:
            meters[pid] = meter
    return sum(usage.cpu_s for meter in meters.values() if (usage := meter.read()) is not None)


def _fill(server: Server, databases: int, tables: int) -> None:
    for number in range(databases - 1):
        server.execute(
            f"CREATE DATABASE db_{number} STRATEGY file_copy" if server.major >= 15 else f"CREATE DATABASE db_{number}"
        )
    for first in range(0, tables, 100):
        batch = "; ".join(
            f"CREATE TABLE t_{number} (id int PRIMARY KEY, v text)" for number in range(first, min(tables, first + 100))
        )
        server.execute(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--databases", type=int, default=53)
    parser.add_argument("--tables", type=int, default=1000)
    parser.add_argument("--major", type=int, default=default_major())
    options = parser.parse_args()
    imports = _child(_IMPORTS)
    with fleet() as servers, tempfile.TemporaryDirectory() as directory:
        server = servers.server(options.major)
        server.create_role("monitor", member_of=["pg_monitor"])
        server.create_role("exporter", member_of=["pg_monitor"])
        _fill(server, options.databases, options.tables)
        measured = _child(
            _SAMPLER, server.conninfo("monitor"), str(Path(directory) / "spool"), str(options.cycles), str(options.seconds)
        )
        beside = _beside(server, options.seconds)
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
        "cpu_share": round(float(str(measured.pop("agent_cpu_s"))) / options.seconds, 5),
        "server_cpu_share": round(float(str(measured.pop("server_cpu_s"))) / options.seconds, 5),
        "spool_bytes_per_cycle": round(float(str(measured["spool_bytes"])) / (options.cycles + 1)),
        **measured,
        "postgres_exporter": beside,
        "resident_imports": imports,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

"""What a wide server costs: 53 databases × 1 000 tables, 5 000 statements. Prints JSON; asserts nothing about time.

    python tests/perf/bench_wide.py [--databases 53] [--tables 1000] [--statements 5000] [--major 15]

Everything that samples one node runs in a child with the resident's imports: ticks, walks, readings of
pg_stat_statements. Server time is the backends' own CPU where /proc tells it (probes/meter.py).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

_SAMPLER = """
import pgherd.agent.lean
import asyncio, dataclasses, json, sys, time
from pathlib import Path
import psutil
import pgherd.agent.resident
from pgherd.agent.config import NodeConfig, RoundsConfig, SamplingConfig, SpoolConfig, StatementsConfig
from pgherd.agent.probes.catalog import load_catalog
from pgherd.agent.rounds.walk import Rounds
from pgherd.agent.sampler import NodeSampler
from pgherd.agent.statements.reader import StatementReader
from pgherd.runtime.queue.spool import Spool
from pgherd.runtime.clock import SystemClock
from pgherd.runtime.logging import configure
conninfo, directory, cycles, databases = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
configure(level="warning")
async def main():
    clock, process = SystemClock(), psutil.Process()
    rss_imports = process.memory_info().rss
    spool = Spool.open(directory, SpoolConfig(), clock)
    node, sampling = NodeConfig("n", "c", conninfo), SamplingConfig()
    sampler = NodeSampler(agent_id="a", node_id="n", node=node, sampling=sampling, catalog=load_catalog(), spool=spool, clock=clock)
    shared = dict(connection=sampler.connection, emitter=sampler.emitter, budget=sampler.budget, status=lambda: sampler.status, clock=clock)
    rounds = Rounds(node, sampling, RoundsConfig(), **shared)
    statements = StatementReader(StatementsConfig(), sampling.slow_interval, **shared)
    await sampler.cycle()
    walls, walks, readings = [], [], []
    cpu = process.cpu_times()
    for number in range(cycles):
        started = time.perf_counter()
        await sampler.cycle()
        walls.append(time.perf_counter() - started)
    rss_cycles = process.memory_info().rss
    while sum(walk["reached"] for walk in walks) < databases and len(walks) < 100:
        before = process.cpu_times()
        report = await rounds.walk()
        after = process.cpu_times()
        walks.append({**dataclasses.asdict(report), "agent_cpu_s": after.user + after.system - before.user - before.system})
    rss_walks = process.memory_info().rss
    for _ in range(5):
        before, spent, started = process.cpu_times(), sampler.budget.spent_s("statements"), time.perf_counter()
        await statements.read()
        after = process.cpu_times()
        readings.append({"wall_s": time.perf_counter() - started, "server_s": sampler.budget.spent_s("statements") - spent,
                         "agent_cpu_s": after.user + after.system - before.user - before.system})
    print(json.dumps({"walls_s": walls, "walks": walks, "readings": readings, "rss_imports_bytes": rss_imports,
        "rss_after_cycles_bytes": rss_cycles, "rss_after_walks_bytes": rss_walks, "rss_bytes": process.memory_info().rss,
        "spool_bytes": spool.status.size_bytes}))
    await sampler.close()
    spool.close()
asyncio.run(main())
"""


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from support.postgres import default_major, fleet

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--databases", type=int, default=53)
    parser.add_argument("--tables", type=int, default=1000)
    parser.add_argument("--statements", type=int, default=5000)
    parser.add_argument("--cycles", type=int, default=30)
    parser.add_argument("--major", type=int, default=default_major())
    options = parser.parse_args()
    with fleet() as servers, tempfile.TemporaryDirectory() as directory:
        server = servers.server(options.major, settings={"max_locks_per_transaction": "1024", "max_connections": "60"})
        server.create_role("monitor", member_of=["pg_monitor"])
        server.create_database("d0")
        made = "DO $$ BEGIN FOR i IN 1..{} LOOP EXECUTE format('CREATE TABLE t%s (id int PRIMARY KEY)', i); END LOOP; END $$"
        server.execute(made.format(options.tables), dbname="d0")
        with server.connect() as connection:
            for number in range(1, options.databases):
                connection.execute(f"CREATE DATABASE d{number} TEMPLATE d0 STRATEGY file_copy".encode())
        asked = 0
        for number in range(options.databases):
            with server.connect(f"d{number}") as connection:
                for table in range(1, options.tables + 1):
                    if asked < options.statements:
                        connection.execute(f"SELECT id FROM t{table}".encode())
                        asked += 1
            if asked >= options.statements:
                break
        server.execute("CHECKPOINT")
        argv = [sys.executable, "-c", _SAMPLER, server.conninfo("monitor"), str(Path(directory) / "spool")]
        argv += [str(options.cycles), str(options.databases)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=900)
        if done.returncode != 0:
            raise SystemExit(done.stderr)
        measured = json.loads(done.stdout)
        server.stop()
    walks, readings = measured["walks"], measured["readings"][1:]
    reached = sum(walk["reached"] for walk in walks)
    quantiles = statistics.quantiles(measured["walls_s"], n=100)
    print(
        json.dumps(
            {
                "bench": "wide",
                "major": options.major,
                "databases": options.databases,
                "tables": options.databases * options.tables,
                "statements": options.statements,
                "cycle_p50_ms": round(quantiles[49] * 1000, 2),
                "cycle_p95_ms": round(quantiles[94] * 1000, 2),
                "walks_for_a_whole_round": len(walks),
                "databases_reached": reached,
                "visit_server_ms": round(sum(walk["cost_s"] for walk in walks) / reached * 1000, 2),
                "visit_wall_ms": round(sum(walk["duration_s"] for walk in walks) / reached * 1000, 2),
                "visit_agent_cpu_ms": round(sum(walk["agent_cpu_s"] for walk in walks) / reached * 1000, 2),
                "statements_server_ms": round(statistics.median(one["server_s"] for one in readings) * 1000, 2),
                "statements_agent_cpu_ms": round(statistics.median(one["agent_cpu_s"] for one in readings) * 1000, 2),
                **{key: value for key, value in measured.items() if key.startswith(("rss_", "spool_"))},
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()

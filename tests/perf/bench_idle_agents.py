"""One collector and many agents: memory, CPU and descriptors with idle ones, memory with agents that ship at the default rates.

    python tests/perf/bench_idle_agents.py [--idle 1000] [--shipping 100] [--seconds 60]

Real mTLS control sessions with heartbeats from a few processes (tests/support/idle_herd.py). What is shipped are the samples of
a real PostgreSQL by tier, at the agents' default rhythms. `back_s` is how long the whole herd takes to come back after kill -9 of
the collector and its restart. Prints JSON; asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

_WAIT_S = 300.0


def tiers(major: int) -> list[dict[str, Any]]:
    """What the probes of each tier say of a real server, and how often they are asked."""
    import psycopg
    from psycopg.rows import dict_row

    from pgherd.agent.config import SamplingConfig
    from pgherd.agent.probes.catalog import load_catalog
    from pgherd.agent.probes.rows import samples_of
    from support.postgres import fleet

    sampling = SamplingConfig()
    rhythm = {"live": sampling.live_interval, "cycle": sampling.interval, "slow": sampling.slow_interval}
    found: dict[str, list[Any]] = {tier: [] for tier in rhythm}
    with fleet() as servers, servers.server(major).connect() as connection:
        for probe in load_catalog().for_major(major):
            try:
                rows = connection.cursor(row_factory=dict_row).execute(probe.sql).fetchall()
            except psycopg.Error:
                continue
            for sample in samples_of(probe, rows):
                metric = sample.metric
                found.get(probe.tier, []).append(
                    (metric.name, metric.kind.value, metric.help, metric.unit, dict(sample.labels), sample.value)
                )
    return [{"interval_s": rhythm[tier], "samples": samples} for tier, samples in found.items() if samples]


def measure(agents: int, seconds: float, ship: list[dict[str, Any]], processes: int) -> dict[str, Any]:
    from support.collector import collector
    from support.idle_herd import prepare, running
    from support.waiting import wait_until

    with tempfile.TemporaryDirectory() as directory, collector() as herd:
        file = Path(directory) / "members.json"
        prepare(herd.state, agents, file, ship)
        herd.start()
        assert herd.process is not None
        headers = herd.token("viewer")

        def figure(name: str) -> float:
            with herd.http(headers=headers) as http:
                lines = http.get("/metrics").text.splitlines()
            return float(next(line for line in lines if line.startswith(f"{name} ")).rsplit(" ", 1)[1])

        def all_connected() -> bool:
            return figure("pgherd_collector_agents_connected") == agents

        bare = psutil.Process(herd.process.pid).memory_info().rss
        started = time.monotonic()
        with running(file, herd.ports["grpc"], agents, processes):
            wait_until(all_connected, _WAIT_S, f"{agents} sessions")
            connected_s = time.monotonic() - started
            process = psutil.Process(herd.process.pid)
            cpu, points, begun = process.cpu_times(), figure("pgherd_collector_points_stored_total"), time.monotonic()
            peak = 0
            while time.monotonic() - begun < seconds:
                peak = max(peak, process.memory_info().rss)
                time.sleep(1)
            elapsed, spent = time.monotonic() - begun, process.cpu_times()
            stored = figure("pgherd_collector_points_stored_total") - points
            result = {
                "agents": agents,
                "connected_s": round(connected_s, 1),
                "still_connected": int(figure("pgherd_collector_agents_connected")),
                "rss_without_agents_bytes": bare,
                "rss_peak_bytes": peak,
                "rss_per_agent_bytes": round((peak - bare) / agents),
                "cpu_share_of_one_core": round((spent.user + spent.system - cpu.user - cpu.system) / elapsed, 3),
                "descriptors": process.num_fds(),
                "threads": process.num_threads(),
                "points_per_s": round(stored / elapsed),
            }
            herd.kill()
            herd.start()
            again = time.monotonic()
            wait_until(all_connected, _WAIT_S, "the herd to come back")
            result["back_s"] = round(time.monotonic() - again, 1)
        herd.stop()
    return result


def main() -> None:
    from support.postgres import default_major

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--idle", type=int, default=1000)
    parser.add_argument("--shipping", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--processes", type=int, default=4)
    options = parser.parse_args()
    result: dict[str, Any] = {"bench": "agents"}
    if options.idle:
        result["idle"] = measure(options.idle, options.seconds, [], options.processes)
    if options.shipping:
        shipped = tiers(default_major())
        result["shipping"] = measure(options.shipping, options.seconds, shipped, options.processes)
        result["shipping"]["points_by_interval_s"] = {f"{tier['interval_s']:g}": len(tier["samples"]) for tier in shipped}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

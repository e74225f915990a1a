"""How true the lag is on real clusters, phase by phase, beside what others say; and what judging costs with 300 nodes.

    python tests/perf/bench_lag.py [--majors 15,17,18] [--scale 1] [--nodes 300] [--table]

Prints JSON (or the table); asserts nothing. The truth is measured with beats that a writer commits on the primary, not with
positions (tests/support/lag.py); `exporter_s` is the usual expression on the standby, `replay_lag_s` is its upstream's
pg_stat_replication. The cost is that of a collector's loop over a real series store: a primary and two standbys a cluster, one
tick a second each, a judgement every two seconds, and a start that reads six hours of the past.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

_NAMES = ("pg_replication_is_replica", "pgherd_timeline", "pgherd_wal_receiver_streaming", "pgherd_wal_receiver_heard_age_seconds",
          "pgherd_recovery_min_apply_delay_seconds")  # fmt: skip
_STANDBYS = 2  # of each primary


def accuracy(majors: list[int], scale: float) -> list[dict[str, Any]]:
    from support.lag import all_phases, table, watch
    from support.postgres import fleet

    rows = []
    for major in majors:
        with (
            tempfile.TemporaryDirectory() as directory,
            fleet() as servers,
            watch(servers, Path(directory), major) as (seen, link),
        ):
            all_phases(seen, link, scale)
            rows += [{"major": major, **row} for row in table(seen.judged()) if row["phase"] not in ("", "settling")]
    return rows


def cost(nodes: int, turns: int) -> dict[str, Any]:
    from pgherd.collector.control.herd import Herd, NodeReport
    from pgherd.collector.replication.series import LagSeries
    from pgherd.storage.control.store import ControlStore
    from pgherd.storage.series.batch import Batch, layout_of
    from pgherd.storage.series.store import SeriesSettings, SeriesStore
    from support.control import ManualClock, enrol

    clock = ManualClock(1_795_000_000_000_000_000)
    clusters = nodes // (1 + _STANDBYS)
    with tempfile.TemporaryDirectory() as directory:
        control = ControlStore.open(Path(directory) / "control.db")
        store = SeriesStore.open(Path(directory) / "series.duckdb", SeriesSettings(), clock)
        herd = Herd(control, clock, heartbeat_interval_s=1e9)
        labels = []
        for number in range(clusters):
            agent_id = enrol(control, f"agent-{number}")
            reports = []
            for member in range(1 + _STANDBYS):
                alias, cluster = f"n{number}-{member}", f"c{number}"
                reports.append(
                    NodeReport(
                        f"00000000-0000-4000-8000-{number * 10 + member:012}",
                        alias,
                        cluster,
                        str(number),
                        alias,
                        150000,
                        "unknown",
                        "up",
                    )
                )
                labels.append({"job": "pgherd", "instance": alias, "cluster": cluster, "node": alias})
            herd.claim(agent_id, reports, {})
            herd.arrive(agent_id, tuple(reports), {"skew_ns": 0})
        is_primary = np.arange(len(labels)) % (1 + _STANDBYS) == 0
        positions = [
            {**own, "__name__": "pgherd_wal_position_bytes", "position": "flush" if first else "replay"}
            for own, first in zip(labels, is_primary.tolist(), strict=True)
        ]
        layout = layout_of([*positions, *({**own, "__name__": name} for name in _NAMES for own in labels)])
        per_tick, start_ms = len(layout.labels), clock.unix_ns // 1_000_000
        fixed = np.concatenate(
            [(~is_primary).astype(float), np.ones(len(labels)), np.ones(len(labels)), np.zeros(2 * len(labels))]
        )

        def batch(from_ms: int, seconds: int) -> Batch:
            ticks = np.repeat(np.arange(seconds), per_tick)
            at_ms = from_ms + 1000 * ticks
            lsn = np.floor((at_ms - start_ms + 30 * 86400_000).reshape(seconds, per_tick)[:, : len(labels)] * 1000.0)
            values = np.concatenate([lsn, np.tile(fixed, (seconds, 1))], axis=1)
            return Batch(layout, np.tile(np.arange(per_tick, dtype=np.int32), seconds), at_ms.astype(np.int64), values.ravel())

        for begin_s in range(-6 * 3600, 0, 60):
            store.append(batch(start_ms + begin_s * 1000, 60)).result(60)
        lag = LagSeries(control, herd, store, clock)
        process = psutil.Process()
        before_bytes, started = process.memory_info().rss, time.perf_counter()
        asyncio.run(lag.write())
        start_s, spent, walls = time.perf_counter() - started, 0.0, []
        for _ in range(turns):
            clock.advance(2)
            now_ms = clock.unix_ns // 1_000_000
            store.append(batch(now_ms - 1000, 2)).result(60)
            cpu, wall = time.process_time(), time.perf_counter()
            asyncio.run(lag.write())
            spent += time.process_time() - cpu
            walls.append(time.perf_counter() - wall)
        after_bytes = process.memory_info().rss
        store.close()
        control.close()
    return {
        "nodes": len(labels),
        "start_reading_6_hours_s": round(start_s, 2),
        "turn_p50_ms": round(float(np.median(walls)) * 1000, 1),
        "turn_max_ms": round(max(walls) * 1000, 1),
        "cpu_share_of_one_core": round(spent / turns / 2, 4),
        "grown_bytes": after_bytes - before_bytes,
    }


def main() -> None:
    from support.lag import lines
    from support.postgres import default_major

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--majors", default=str(default_major()))
    parser.add_argument("--scale", type=float, default=1.0, help="how much longer every phase lasts")
    parser.add_argument("--nodes", type=int, default=300)
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--table", action="store_true", help="text instead of JSON")
    options = parser.parse_args()
    majors = [int(major) for major in options.majors.split(",") if major]
    phases = accuracy(majors, options.scale)
    costs = cost(options.nodes, options.turns) if options.nodes else {}
    if options.table:
        print(lines(phases))
        print(json.dumps(costs, indent=2))
        return
    print(json.dumps({"bench": "lag", "phases": phases, "cost": costs}, indent=2))


if __name__ == "__main__":
    main()

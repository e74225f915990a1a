"""`make bench`: what pgherd costs and how fast it is, beside its peers where they are installed. Asserts nothing.

    python tests/perf/bench.py [--quick] [--json]

Each part is a program of its own in this folder; figures of peers come from the same run on the same machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
DEMO = HERE.parents[1] / "deploy" / "demo" / "demo.py"
MIB = 1 << 20


def run(program: Path, *arguments: str) -> dict[str, Any]:
    """The JSON document that a part prints; its progress goes through to stderr."""
    finished = subprocess.run([sys.executable, str(program), *arguments], stdout=subprocess.PIPE, text=True, check=True)
    document: dict[str, Any] = json.loads(finished.stdout)
    return document


def exporter(sampling: dict[str, Any], figure: str) -> str:
    """postgres_exporter's figure from the same run."""
    beside = sampling["postgres_exporter"]
    return "no postgres_exporter here" if beside is None else f"postgres_exporter, scraped every 10 s: {beside[figure]:.2%}"


def wide_rows(wide: dict[str, Any]) -> list[tuple[str, str, str]]:
    size = f"{wide['databases']} databases, {wide['tables']:,} tables"
    return [
        ("sampling cycle on a wide server, p50 / p95", f"{wide['cycle_p50_ms']:.1f} / {wide['cycle_p95_ms']:.1f} ms", size),
        (
            "a visit to one database",
            f"{wide['visit_server_ms']:.1f} ms of the server, {wide['visit_agent_cpu_ms']:.1f} ms of the agent",
            f"{wide['walks_for_a_whole_round']} walks of 5 min for all {wide['databases']}",
        ),
        (
            "a reading of pg_stat_statements",
            f"{wide['statements_server_ms']:.1f} ms of the server, {wide['statements_agent_cpu_ms']:.1f} ms of the agent",
            f"{wide['statements']:,} statements, once a minute",
        ),
        ("resident memory with walks and statements", f"{wide['rss_bytes'] / MIB:.1f} MiB", "target 64 MiB"),
    ]


def rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(what, figure, beside it)"""
    ingest, sampling, query, backup, demo = (report[part] for part in ("ingest", "sampling", "query", "backup", "demo"))
    lag, judging = report["lag"], report["lag"]["cost"]
    table = [
        (
            "ingest, durable ack over gRPC",
            f"{ingest['points_per_s']:,.0f} points/s",
            f"{ingest['agents']} agents × {ingest['points_per_request']} points",
        ),
        ("ingest, server's memory", f"{ingest['collector_rss_bytes'] / MIB:.0f} MiB", "store and service alone"),
        (
            "sampling cycle, p50 / p95",
            f"{sampling['cycle_p50_ms']:.1f} / {sampling['cycle_p95_ms']:.1f} ms",
            f"PostgreSQL {sampling['major']}",
        ),
        ("sampling, CPU of the agent", f"{sampling['cpu_share']:.2%} of a core", exporter(sampling, "cpu_share")),
        (
            "sampling, CPU of the server",
            f"{sampling['server_cpu_share']:.2%} of a core",
            exporter(sampling, "server_cpu_share"),
        ),
        ("sampling, resident memory", f"{sampling['rss_bytes'] / MIB:.1f} MiB", "target 64 MiB"),
        *wide_rows(report["wide"]),
    ]
    for name, figures in query["queries"].items():
        peer = (
            f"Prometheus {figures['prometheus_ms']} ms, ratio {figures['ratio']}"
            if "ratio" in figures
            else "no Prometheus here"
        )
        table.append((f"query, {name}", f"{figures['pgherd_ms']} ms", peer))
    table += [
        (
            "backup with fingerprint",
            f"{backup['backup_s']:.1f} s",
            f"pg_dump | zstd {backup['pg_dump_zstd_s']:.1f} s, ratio {backup['backup_to_pg_dump_zstd_ratio']}",
        ),
        ("fingerprint's share of the backup", f"{backup['fingerprint_to_backup_ratio']:.0%}", ""),
        (
            "restore and compare",
            f"{backup['restore_and_compare_s']:.1f} s",
            f"{backup['archive_bytes'] / MIB:.0f} MiB of archive",
        ),
    ]
    worst = max(
        (phase for phase in lag["phases"] if phase["worst_error_s"] is not None), key=lambda phase: phase["worst_error_s"]
    )
    table += [
        ("replication lag, worst error", f"{worst['worst_error_s']:.2f} s", f"{worst['phase']}; promised max(1 s, 10 %)"),
        (
            f"replication lag, judging {judging['nodes']} nodes",
            f"{judging['turn_p50_ms']:.0f} ms every 2 s",
            f"{judging['cpu_share_of_one_core']:.1%} of a core",
        ),
    ]
    for kind, what in (("idle", "idle agents"), ("shipping", "agents shipping at the default rates")):
        held = report["agents"][kind]
        table.append(
            (
                f"collector with {held['agents']} {what}",
                f"{held['rss_peak_bytes'] / MIB:.0f} MiB, {held['cpu_share_of_one_core']:.0%} of a core",
                f"{held['descriptors']} descriptors, {held['points_per_s']} points/s; back in {held['back_s']:.0f} s after kill -9",
            )
        )
    table += latency_rows(report["latency"])
    for process in demo["processes"]:
        memory = f"{process['resident_bytes'] / MIB:.0f} MiB, with children at most {process['peak_bytes_with_children'] / MIB:.0f} MiB"
        table.append(
            (f"demo, {process['name']}", memory, f"{process['cpu_share_of_one_core']:.1%} of a core, sampling every second")
        )
    return table


def latency_rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Errors of the published percentiles beside the baselines', the worst of each; what a look costs."""
    told, costs = report["summary"], {row["connections"]: row for row in report["cost"]}
    quantiles = [q for part in report["workloads"] for window in part["windows"] for q in window["quantiles"]]

    def worst(key: str) -> float:
        return max((abs(q[key] / q["true_ms"] - 1) for q in quantiles if q[key] is not None), default=0.0)

    return [
        (
            "statement percentiles, worst error",
            f"{worst('ours_ms'):.0%}, {told['published']} of {told['percentiles']} published",
            f"percentile of means {worst('means_ms'):.0%}, lognormal fit {worst('lognormal_ms'):.0%}",
        ),
        (
            "statement percentiles, interval holds",
            f"{told['intervals_that_hold_it_within_30us']} of {told['intervals']}",
            "truth: the server's own log",
        ),
        (
            "ten looks a second, 50 sessions",
            f"{costs[50]['agent_share']:.2%} of a core, agent",
            f"{costs[50]['server_share']:.2%} of a core, server",
        ),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short runs, rough figures")
    parser.add_argument("--json", action="store_true", help="print the parts' documents instead of the table")
    options = parser.parse_args()
    quick = options.quick
    report = {
        "ingest": run(HERE / "bench_ingest.py", "--seconds", "5" if quick else "20"),
        "sampling": run(HERE / "bench_sampling.py", "--cycles", "50" if quick else "200", "--seconds", "20" if quick else "60"),
        "wide": run(
            HERE / "bench_wide.py", *(("--databases", "10", "--tables", "200", "--statements", "1000") if quick else ())
        ),
        "query": run(HERE / "bench_query.py", "--series", "200" if quick else "1000"),
        "agents": run(
            HERE / "bench_idle_agents.py", *(("--idle", "200", "--shipping", "20", "--seconds", "20") if quick else ())
        ),
        "lag": run(HERE / "bench_lag.py", "--scale", "1" if quick else "2"),
        "latency": run(HERE / "bench_latency.py", "--windows", "1", "--seconds", "20" if quick else "60", "--cost"),
        "backup": run(HERE / "bench_backup.py", "--rows", "200000" if quick else "2000000"),
        "demo": run(DEMO, "--for", "60s", "--json"),
    }
    if options.json:
        print(json.dumps(report, indent=2))
        return 0
    sheet = Table(box=None, header_style="bold")
    for heading in ("WHAT", "MEASURED", "BESIDE IT"):
        sheet.add_column(heading)
    for row in rows(report):
        sheet.add_row(*row)
    Console(highlight=False, markup=False, width=130).print(sheet)
    return 0


if __name__ == "__main__":
    sys.exit(main())

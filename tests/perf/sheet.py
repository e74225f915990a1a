"""The table of `make bench`: what of each part's JSON document a reader is shown, and what stands beside it."""

from __future__ import annotations

from typing import Any

Report = dict[str, Any]
Rows = list[tuple[str, str, str]]  # (what, figure, beside it)

MIB = 1 << 20


def exporter(sampling: Report, figure: str) -> str:
    """postgres_exporter's figure from the same run."""
    beside = sampling["postgres_exporter"]
    return "no postgres_exporter here" if beside is None else f"postgres_exporter, scraped every 10 s: {beside[figure]:.2%}"


def ingest_rows(ingest: Report) -> Rows:
    return [
        (
            "ingest, durable ack over gRPC",
            f"{ingest['points_per_s']:,.0f} points/s",
            f"{ingest['agents']} agents × {ingest['points_per_request']} points",
        ),
        ("ingest, server's memory", f"{ingest['collector_rss_bytes'] / MIB:.0f} MiB", "store and service alone"),
    ]


def sampling_rows(sampling: Report) -> Rows:
    return [
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
    ]


def impact_rows(impact: Report) -> Rows:
    return [
        (
            "pgbench with an agent, by without one",
            f"{impact['ratio_median']:.3f}",
            f"{impact['pairs']} pairs of {impact['seconds']:g} s, {impact['ratio_min']:.3f} to {impact['ratio_max']:.3f}",
        )
    ]


def query_rows(query: Report) -> Rows:
    return [
        (
            f"query, {name}",
            f"{figures['pgherd_ms']} ms",
            f"Prometheus {figures['prometheus_ms']} ms, ratio {figures['ratio']}"
            if "ratio" in figures
            else "no Prometheus here",
        )
        for name, figures in query["queries"].items()
    ]


def event_rows(event: Report) -> Rows:
    return [
        (
            "from a sample to the webhook, p50 / max",
            f"{event['event_to_webhook_p50_s']:.2f} / {event['event_to_webhook_max_s']:.2f} s",
            f"rules evaluated every {event['interval_s']:g} s",
        )
    ]


def backup_rows(backup: Report) -> Rows:
    return [
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


def lag_rows(lag: Report) -> Rows:
    judging = lag["cost"]
    worst = max(
        (phase for phase in lag["phases"] if phase["worst_error_s"] is not None), key=lambda phase: phase["worst_error_s"]
    )
    return [
        ("replication lag, worst error", f"{worst['worst_error_s']:.2f} s", f"{worst['phase']}; promised max(1 s, 10 %)"),
        (
            f"replication lag, judging {judging['nodes']} nodes",
            f"{judging['turn_p50_ms']:.0f} ms every 2 s",
            f"{judging['cpu_share_of_one_core']:.1%} of a core",
        ),
    ]


def agents_rows(agents: Report) -> Rows:
    return [
        (
            f"collector with {held['agents']} {what}",
            f"{held['rss_peak_bytes'] / MIB:.0f} MiB, {held['cpu_share_of_one_core']:.0%} of a core",
            f"{held['descriptors']} descriptors, {held['points_per_s']} points/s; back in {held['back_s']:.0f} s after kill -9",
        )
        for held, what in ((agents["idle"], "idle agents"), (agents["shipping"], "agents shipping at the default rates"))
    ]


def demo_rows(demo: Report) -> Rows:
    return [
        (
            f"demo, {process['name']}",
            f"{process['resident_bytes'] / MIB:.0f} MiB, with children at most {process['peak_bytes_with_children'] / MIB:.0f} MiB",
            f"{process['cpu_share_of_one_core']:.1%} of a core, sampling every second",
        )
        for process in demo["processes"]
    ]


def wide_rows(wide: Report) -> Rows:
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


def latency_rows(report: Report) -> Rows:
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

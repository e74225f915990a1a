"""What the panels of two public dashboards ask, in our own words: series, filters and what is done with them.

Grafana 9628 ("PostgreSQL Database") and 14114 (postgres_exporter's quickstart, which is its mixin's overview). The
dashboards themselves aren't kept here; the questions are made anew from this table, with the variables as Grafana
fills them: one instance, all databases (`.*`), and one minute for `$__rate_interval` (its default, four times a scrape
interval of 15 s). `release` and `kubernetes_namespace` are empty outside Kubernetes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Form = Literal[
    "value", "nonzero", "thousandfold", "rate", "average_rate", "instant_rate", "sum", "sum_of_instant_rates", "sum_of_rates"
]

RATE_WINDOW_9628 = "5m"
RATE_WINDOW_14114 = "1m"


@dataclass(frozen=True, slots=True)
class Panel:
    """One question of a dashboard."""

    dashboard: int
    title: str
    series: str
    form: Form = "value"
    by_database: bool = False
    filters: str = ""

    def promql(self, instance: str) -> str:
        """The question, as Grafana would send it."""
        matchers = [f'instance="{instance}"']
        if self.by_database:
            matchers.append('datname=~".*"')
        if self.filters:
            matchers.append(self.filters)
        selector = f"{self.series}{{{', '.join(matchers)}}}"
        window = RATE_WINDOW_9628 if self.dashboard == 9628 else RATE_WINDOW_14114
        return {
            "value": selector,
            "nonzero": f"{selector} != 0",
            "thousandfold": f"{selector} * 1000",
            "rate": f"rate({selector}[{window}])",
            "average_rate": f"avg(rate({selector}[{window}]))",
            "instant_rate": f"irate({selector}[{window}])",
            "sum": f"sum({selector})",
            "sum_of_instant_rates": f"sum(irate({selector}[{window}]))",
            "sum_of_rates": f"sum(rate({selector}[{window}]))",
        }[self.form]


def panels() -> Iterator[Panel]:
    """Every question, the hit ratios apart: see `ratios`."""
    yield from _facts_9628()
    yield from _activity_9628()
    yield from _quickstart_14114()


def _facts_9628() -> Iterator[Panel]:
    release = 'release=""'
    yield Panel(9628, "Version", "pg_static", filters=release)
    yield Panel(9628, "Start time", "pg_postmaster_start_time_seconds", "thousandfold", filters=release)
    yield Panel(9628, "Maximum connections", "pg_settings_max_connections", filters=release)
    for row, series in (("Inserted", "tup_inserted"), ("Updated", "tup_updated"), ("Fetched", "tup_fetched")):
        yield Panel(9628, f"{row} rows", f"pg_stat_database_{series}", "sum", by_database=True, filters=release)
    for setting in (
        "shared_buffers_bytes", "effective_cache_size_bytes", "maintenance_work_mem_bytes", "work_mem_bytes", "max_wal_size_bytes",
        "random_page_cost", "seq_page_cost", "max_worker_processes", "max_parallel_workers",
    ):  # fmt: skip
        yield Panel(9628, f"Setting {setting}", f"pg_settings_{setting}")
    yield Panel(9628, "CPU", "process_cpu_seconds_total", "average_rate", filters=release)
    for kind in ("resident", "virtual"):
        yield Panel(9628, f"Memory, {kind}", f"process_{kind}_memory_bytes", "average_rate", filters=release)
    yield Panel(9628, "Open files", "process_open_fds", filters=release)


def _activity_9628() -> Iterator[Panel]:
    yield Panel(9628, "Active sessions", "pg_stat_activity_count", "nonzero", by_database=True, filters='state="active"')
    idle = 'state=~"idle|idle in transaction|idle in transaction (aborted)"'
    yield Panel(9628, "Idle sessions", "pg_stat_activity_count", by_database=True, filters=idle)
    for outcome in ("xact_commit", "xact_rollback"):
        yield Panel(9628, "Transactions", f"pg_stat_database_{outcome}", "instant_rate", by_database=True)
    for rows in ("fetched", "inserted", "updated", "deleted", "returned"):
        yield Panel(9628, f"Rows {rows}", f"pg_stat_database_tup_{rows}", "nonzero", by_database=True)
    yield Panel(
        9628, "Locks", "pg_locks_count", "nonzero", by_database=True, filters='mode=~"accesssharelock|rowexclusivelock"'
    )
    for trouble in ("conflicts", "deadlocks", "temp_bytes"):
        yield Panel(9628, f"Trouble: {trouble}", f"pg_stat_database_{trouble}", "instant_rate", by_database=True)
    for buffers in ("alloc", "backend", "backend_fsync", "checkpoint", "clean"):
        for spelling in (f"buffers_{buffers}_total", f"buffers_{buffers}"):  # of new and of old copies
            yield Panel(9628, f"Buffers, {buffers}", f"pg_stat_bgwriter_{spelling}", "instant_rate")
    for part in ("write", "sync"):
        for spelling in (f"checkpoint_{part}_time_total", f"checkpoint_{part}_time"):
            yield Panel(9628, f"Checkpoints, {part}", f"pg_stat_bgwriter_{spelling}", "instant_rate")


def _quickstart_14114() -> Iterator[Panel]:
    for outcome in ("xact_commit", "xact_rollback"):
        yield Panel(14114, "Queries per second", f"pg_stat_database_{outcome}", "sum_of_instant_rates", by_database=True)
    for rows in ("fetched", "returned", "inserted", "updated", "deleted"):
        yield Panel(14114, "Rows", f"pg_stat_database_tup_{rows}", "sum_of_instant_rates", by_database=True)
    for buffers in ("alloc", "backend_fsync", "backend", "clean", "checkpoint"):
        for spelling in (f"buffers_{buffers}_total", f"buffers_{buffers}"):
            yield Panel(14114, f"Buffers, {buffers}", f"pg_stat_bgwriter_{spelling}", "instant_rate")
    for trouble in ("conflicts", "deadlocks"):
        yield Panel(14114, "Conflicts and deadlocks", f"pg_stat_database_{trouble}", "sum_of_rates", by_database=True)
    yield Panel(14114, "Connections", "pg_stat_database_numbackends", by_database=True)


def ratios(instance: str) -> Iterator[str]:
    """The cache hit ratio, as each dashboard computes it."""
    chosen = f'instance="{instance}", datname=~".*"'
    hit, read = f"pg_stat_database_blks_hit{{{chosen}}}", f"pg_stat_database_blks_read{{{chosen}}}"
    yield f"{hit} / ({read} + {hit})"
    hits, reads = (f"sum by (datname) (rate({selector}[{RATE_WINDOW_14114}]))" for selector in (hit, read))
    yield f"{hits} / ({hits} + {reads})"


# What the variables at the top of 9628 are filled from.
VARIABLES = (
    "pg_exporter_last_scrape_duration_seconds",
    'pg_exporter_last_scrape_duration_seconds{kubernetes_namespace=""}',
    'pg_up{release=""}',
)

# What the usual postgres_exporter alert rules read besides (rules that people bring along).
ALERT_SERIES = (
    "pg_up", "pg_replication_lag_seconds", "pg_replication_is_replica", "pg_stat_activity_max_tx_duration",
    "pg_exporter_last_scrape_error", "pg_stat_bgwriter_checkpoints_timed_total", "pg_stat_bgwriter_checkpoints_req_total",
    "pg_settings_max_locks_per_transaction", "pg_settings_superuser_reserved_connections",
    "pg_settings_autovacuum_vacuum_threshold", "pg_settings_autovacuum_vacuum_scale_factor",
    "pg_settings_autovacuum_analyze_threshold", "pg_stat_archiver_archived_count", "pg_stat_archiver_failed_count",
    "pg_stat_archiver_last_archive_age", "pg_wal_segments", "pg_wal_size_bytes", "pg_replication_slots_active",
    "pg_replication_slot_slot_is_active", "pg_replication_slots_pg_wal_lsn_diff", "pg_stat_database_checksum_failures",
    "pg_stat_database_session_time", "pg_stat_database_idle_in_transaction_time", "pg_stat_database_sessions_abandoned",
    "pg_stat_database_sessions_fatal", "pg_stat_database_sessions_killed",
)  # fmt: skip

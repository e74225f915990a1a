"""What `pgherd top` asks: PromQL as data, by the name of the row it fills.

All rows of a page are asked in one request: each expression is tagged with its name in the label `row` and
the whole is one union. An expression stands for one instant vector; a series that isn't there is a value
nobody knows, and the page shows it as that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

ROW_LABEL: Final = "row"

# A node's subject in `by (…)`: alias and cluster together are unique, the instance is what psql wants.
_BY: Final = "by (cluster, node)"

# SEL becomes the selector of one node, or of every node of pgherd.
_COUNTERS: Final = {
    "commits": "pg_stat_database_xact_commit",
    "rollbacks": "pg_stat_database_xact_rollback",
    "inserted": "pg_stat_database_tup_inserted",
    "updated": "pg_stat_database_tup_updated",
    "deleted": "pg_stat_database_tup_deleted",
    "blocks_hit": "pg_stat_database_blks_hit",
    "blocks_read": "pg_stat_database_blks_read",
    "deadlocks": "pg_stat_database_deadlocks",
    "temp_bytes": "pg_stat_database_temp_bytes",
}


def _per_second(metric: str) -> str:
    return f"sum {_BY} (rate({metric}{{SEL}}[1m]))"


FLEET: Final[Mapping[str, str]] = {
    "up": "pg_up{SEL}",
    "disk": f"max {_BY} (pgherd_disk_used_ratio{{SEL}})",
    "connections": "pgherd_connections_used{SEL}",
    "usable": "pgherd_connections_usable{SEL}",
    "p99": 'pgherd_statement_latency_seconds{SEL,quantile="0.99"}',
    "p99_low": 'pgherd_statement_latency_ci_low_seconds{SEL,quantile="0.99"}',
    "p99_high": 'pgherd_statement_latency_ci_high_seconds{SEL,quantile="0.99"}',
    "lag": "pgherd_replication_lag_seconds{SEL}",
    "commits": _per_second("pg_stat_database_xact_commit"),
    "rollbacks": _per_second("pg_stat_database_xact_rollback"),
    "backup": f"max {_BY} (pgherd_backup_last_success_timestamp_seconds{{SEL}})",
    "restored": f"max {_BY} (pgherd_backup_last_restored_timestamp_seconds{{SEL}})",
    "backup_enabled": f"max {_BY} (pgherd_backup_enabled{{SEL}})",
}

NODE: Final[Mapping[str, str]] = {
    **FLEET,
    **{name: _per_second(metric) for name, metric in _COUNTERS.items()},
    "disk_ratio": "pgherd_disk_used_ratio{SEL}",
    "disk_avail": "pgherd_disk_avail_bytes{SEL}",
    "disk_total": "pgherd_disk_total_bytes{SEL}",
    # What is left, over how fast it shrank in the last hour: only where it shrinks, and half an hour of it was seen.
    "disk_full_in": "pgherd_disk_avail_bytes{SEL} / -(deriv(pgherd_disk_avail_bytes{SEL}[1h]) < 0)"
    " and pgherd_disk_avail_bytes{SEL} offset 30m",
    "inodes_free": "pgherd_disk_inodes_free{SEL}",
    "inodes_total": "pgherd_disk_inodes_total{SEL}",
    "max_connections": "pgherd_connections_max{SEL}",
    "reserved": "pgherd_connections_reserved{SEL}",
    "state": "sum by (cluster, node, state) (pg_stat_activity_count{SEL})",
    "latency": "pgherd_statement_latency_seconds{SEL}",
    "latency_low": "pgherd_statement_latency_ci_low_seconds{SEL}",
    "latency_high": "pgherd_statement_latency_ci_high_seconds{SEL}",
    "statements": "pgherd_statements_window{SEL}",
    "over_low": "pgherd_statements_over_ratio_low{SEL}",
    "over_high": "pgherd_statements_over_ratio_high{SEL}",
    "lag_bytes": "pgherd_replication_lag_bytes{SEL}",
    "lag_unknown": "pgherd_replication_lag_unknown{SEL} == 1",
    # Of the whole cluster: how far behind its standbys are belongs on the primary's page too.
    "cluster_lag": "pgherd_replication_lag_seconds{CLUSTER}",
    "cluster_lag_bytes": "pgherd_replication_lag_bytes{CLUSTER}",
    "cluster_lag_unknown": "max by (cluster, node) (pgherd_replication_lag_unknown{CLUSTER}) == 1",
    "standby": "pg_stat_replication_pg_wal_lsn_diff{SEL}",
    "slot": "pg_replication_slots_pg_wal_lsn_diff{SEL}",
    "slot_active": "pg_replication_slots_active{SEL}",
    "long_query": "topk(10, pgherd_long_query_seconds{SEL})",
    "oldest": "pgherd_oldest_seconds{SEL}",
    "statement_seconds": 'topk(8, rate(pg_stat_statements_seconds_total{SEL,queryid!=""}[5m]))',
    "statement_calls": 'rate(pg_stat_statements_calls_total{SEL,queryid!=""}[5m])',
    "statement_text": "pgherd_statement_info{SEL}",
    "blocking": "topk(12, pgherd_blocking{SEL})",
    "blocked": "pgherd_blocked_sessions{SEL}",
    "unknown": "pgherd_probe_unknown{SEL} == 1",
}


@dataclass(frozen=True, slots=True)
class Subject:
    """Whom a page is about: one node, or the whole herd (`node` empty)."""

    node: str = ""
    cluster: str = ""

    @property
    def selector(self) -> str:
        """Label matchers without their braces."""
        if not self.node:
            return 'job="pgherd",node!=""'
        return f'job="pgherd",node={_quoted(self.node)},cluster={_quoted(self.cluster)}'

    @property
    def cluster_selector(self) -> str:
        """The same for every node of its cluster."""
        return f'job="pgherd",cluster={_quoted(self.cluster)}'


@dataclass(frozen=True, slots=True)
class Row:
    """One element of an answer, without the labels that say whose it is anyway."""

    labels: Mapping[str, str] = field(default_factory=dict)
    value: float = 0.0


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def union(questions: Mapping[str, str], subject: Subject) -> str:
    """All questions as one expression; each element says in the label `row` which one it answers."""
    return " or ".join(
        f'label_replace({expression.replace("SEL", subject.selector).replace("CLUSTER", subject.cluster_selector)}, "{ROW_LABEL}", "{name}", "", "")'
        for name, expression in questions.items()
    )


def rows_of(result: Iterable[Mapping[str, object]]) -> dict[str, list[Row]]:
    """The Prometheus API's `result` of such an expression, by question."""
    rows: dict[str, list[Row]] = {}
    for element in result:
        metric, sample = element["metric"], element["value"]
        assert isinstance(metric, Mapping)
        assert isinstance(sample, list | tuple)
        labels = {name: value for name, value in metric.items() if name not in (ROW_LABEL, "__name__", "job", "instance")}
        rows.setdefault(str(metric[ROW_LABEL]), []).append(Row(labels, float(sample[1])))
    return rows

"""The node page: what is slow, who blocks, how far behind, when is it full, is the backup good. Pure.

Sections come in the order in which a DBA asks; each is a function of the facts. What nobody knows is shown as unknown,
with the probe's own reason below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from pgherd.cli.top.facts import Facts
from pgherd.cli.top.fleet import (
    ALERT_GRADES,
    DISK_CRITICAL,
    DISK_WARNING,
    LAG_WARNING_S,
    P99_WARNING_S,
    alert_grade,
    concerns,
    connections_used,
    fleet_row,
    lag,
    summary,
)
from pgherd.cli.top.fleet import (
    latency as quantile_cell,
)
from pgherd.cli.top.page import (
    NONE,
    UNKNOWN,
    Cell,
    Column,
    Grade,
    Page,
    Section,
    counted,
    duration,
    first,
    judged,
    percent,
    plain,
    rate,
    size,
)
from pgherd.cli.top.questions import Row

Node = Mapping[str, Any]
Line = dict[str, Cell]

_FULL_SOON_S: Final = 24 * 3600.0
_LONG_WARNING_S: Final = {"idle in transaction": 300.0, "transaction": 3600.0, "query": 3600.0}
_BLOCKED_WARNING_S: Final = 30.0
_INODES_WARNING: Final = 0.85
_CACHE_HIT_MIN_READS: Final = 100.0  # blocks a second: below that the ratio means nothing


def node_page(facts: Facts) -> Page:
    """The page of the one node in `facts.nodes`."""
    node = facts.nodes[0]
    version = node["server_version_num"]
    title = f"{node['cluster']}/{node['alias']} · {node['instance']} · " + (
        f"PostgreSQL {version // 10000}.{version % 10000}" if version else "PostgreSQL of unknown version"
    )
    sections = tuple(
        section(node, facts)
        for section in (
            alerts, disk, connections, latency, replication, transactions, slow, long_running, blocking, backups,
        )
    )  # fmt: skip
    line = fleet_row(node, facts)
    head = {key: line[key] for key in ("node", "cluster", "state", "role")}
    return Page(f"{title} · {node['role']} · {line['state'].shown}", sections, facts.taken_unix_ns, head)


def _section(key: str, title: str, columns: tuple[Column, ...], rows: list[Line], *notes: str) -> Section:
    return Section(key, title, columns, tuple(rows), tuple(note for note in notes if note))


def _reasons(facts: Facts, node: Node, *probes: str) -> str:
    """Why values of these probes are unknown, as the agent says."""
    found = [
        f"{row.labels.get('probe')}: {row.labels.get('reason')}"
        for row in facts.of("unknown", node)
        if row.labels.get("probe", "").startswith(probes)
    ]
    return "unknown: " + "; ".join(sorted(found)) if found else ""


def alerts(node: Node, facts: Facts) -> Section:
    """What the collector's rules say of this node."""
    columns = (Column("state", "STATE", width=11), Column("severity", "SEVERITY", width=9), Column("summary", "WHAT"))
    live = [alert for alert in facts.alerts if alert["state"] in ALERT_GRADES and concerns(alert, node)]
    live.sort(key=lambda alert: -alert_grade(alert))
    rows = [
        {
            "state": Cell(alert["state"], alert["state"], alert_grade(alert), is_state=True),
            "severity": Cell(alert["labels"].get("severity", ""), alert["labels"].get("severity")),
            "summary": Cell(summary(alert), {"alertname": alert["labels"].get("alertname"), "summary": summary(alert)}),
        }
        for alert in live
    ]
    return _section("alerts", "Alerts", columns, rows, *facts.problems, "" if rows or facts.problems else "● none")


def disk(node: Node, facts: Facts) -> Section:
    """Every volume that the server writes to, and when it is full."""
    columns = (
        Column("path_kind", "VOLUME", width=22), Column("used", "USED", right=True, width=5),
        Column("avail", "LEFT", right=True, width=8), Column("total", "SIZE", right=True, width=8),
        Column("full_in", "FULL IN", right=True, width=8), Column("inodes", "INODES", right=True, width=7),
    )  # fmt: skip
    by_kind = {question: _by(facts.of(question, node), "path_kind") for question in _DISK_QUESTIONS}
    rows = []
    for kind in sorted({kind for values in by_kind.values() for kind in values}):
        value = {question: values.get(kind) for question, values in by_kind.items()}
        free, total = value["inodes_free"], value["inodes_total"]
        inodes = 1 - free / total if free is not None and total else None
        full_in_s = value["disk_full_in"]
        rows.append(
            {
                "path_kind": Cell(kind, kind),
                "used": judged(value["disk_ratio"], percent(value["disk_ratio"]), warning=DISK_WARNING, critical=DISK_CRITICAL),
                "avail": plain(value["disk_avail"], size(value["disk_avail"])),
                "total": plain(value["disk_total"], size(value["disk_total"])),
                "full_in": _full_in(full_in_s, value["disk_ratio"]),
                "inodes": NONE if inodes is None else judged(inodes, percent(inodes), warning=_INODES_WARNING),
            }
        )
    return _section(
        "disk", "Disk", columns, rows, _reasons(facts, node, "disk"), "" if rows else "? nothing known of the disks"
    )


_DISK_QUESTIONS: Final = ("disk_ratio", "disk_avail", "disk_total", "disk_full_in", "inodes_free", "inodes_total")


def _full_in(seconds: float | None, used_ratio: float | None) -> Cell:
    """At the speed of the last hour. Not judged while there is much room: a small slope is noise then."""
    if seconds is None:
        return Cell("–") if used_ratio is not None else UNKNOWN
    soon = seconds < _FULL_SOON_S and (used_ratio or 0.0) > 0.6
    return Cell(duration(seconds), seconds, Grade.WARNING if soon else Grade.PLAIN)


def connections(node: Node, facts: Facts) -> Section:
    """The pool of connection slots."""
    columns = tuple(
        Column(key, heading, right=True, width=width)
        for key, heading, width in (
            ("max", "MAX", 6), ("usable", "USABLE", 7), ("total", "TOTAL", 6), ("active", "ACTIVE", 7), ("idle", "IDLE", 6),
            ("idle_in_transaction", "IDLE IN TX", 11), ("utilisation", "UTILISATION", 12),
        )
    )  # fmt: skip
    states = _by(facts.of("state", node), "state")
    idle_in_transaction = [states[state] for state in states if state.startswith("idle in transaction")]
    values = {
        "max": first(facts.of("max_connections", node)),
        "usable": first(facts.of("usable", node)),
        "total": first(facts.of("connections", node)),
        "active": states.get("active"),
        "idle": states.get("idle"),
        "idle_in_transaction": math.fsum(idle_in_transaction) if idle_in_transaction else None,
    }
    row: Line = {key: plain(value, f"{value:.0f}" if value is not None else "?") for key, value in values.items()}
    row["utilisation"] = connections_used(node, facts)
    return _section("connections", "Connections", columns, [row], _reasons(facts, node, "connections", "stat_activity"))


def latency(node: Node, facts: Facts) -> Section:
    """Statement durations of the last window: an interval where a number would pretend."""
    columns = (
        Column("quantile", "QUANTILE", width=9), Column("seconds", "LATENCY", right=True, width=9),
        Column("interval", "INTERVAL", right=True, width=16), Column("estimator", "ESTIMATOR"),
    )  # fmt: skip
    found = {row.labels.get("quantile", ""): row for row in facts.of("latency", node)}
    low, high = (_by(facts.of(question, node), "quantile") for question in ("latency_low", "latency_high"))
    rows = []
    for quantile, name in (("0.5", "P50"), ("0.95", "P95"), ("0.99", "P99")):
        row = found.get(quantile)
        ends = (low.get(quantile), high.get(quantile))
        limit_s = P99_WARNING_S if quantile == "0.99" else math.inf
        rows.append(
            {
                "quantile": Cell(name, float(quantile)),
                "seconds": quantile_cell(row.value if row else None, *ends, limit_s),
                "interval": Cell(f"{duration(ends[0])}–{duration(ends[1])}", list(ends)) if None not in ends else UNKNOWN,
                "estimator": Cell(row.labels.get("estimator", "") if row else "no number: too wide"),
            }
        )
    statements, over = (
        first(facts.of("statements", node)),
        (first(facts.of("over_low", node)), first(facts.of("over_high", node))),
    )
    note = ""
    if statements is not None and over[0] is not None and over[1] is not None:
        note = f"{statements:.0f} statements in the window; {over[0]:.2%} to {over[1]:.2%} of them took more than 1 s"
    return _section("latency", "Latency", columns, rows, note, _latency_reasons(facts, node))


def _latency_reasons(facts: Facts, node: Node) -> str:
    reasons = _reasons(facts, node, "latency", "activity")
    return f"{reasons} (docs/latency.md)" if reasons else ""


def replication(node: Node, facts: Facts) -> Section:
    """Both ends: this standby's lag, this primary's standbys, and what slots keep back."""
    columns = (
        Column("what", "WHAT", width=12), Column("name", "NAME", width=24), Column("state", "STATE", width=16),
        Column("lag", "LAG", right=True, width=8), Column("bytes", "BEHIND", right=True, width=9),
    )  # fmt: skip
    rows: list[Line] = []
    seconds, behind = first(facts.of("lag", node)), first(facts.of("lag_bytes", node))
    if node["role"] != "primary":
        why = ", ".join(sorted(row.labels.get("reason", "") for row in facts.of("lag_unknown", node)))
        rows.append(
            {
                "what": Cell("this node", "this node"),
                "name": Cell(str(node["alias"]), node["alias"]),
                "state": Cell(why or str(node["role"]), why or node["role"], Grade.UNKNOWN if why else Grade.PLAIN),
                "lag": lag(node, seconds),
                "bytes": plain(behind, size(behind)),
            }
        )
    rows += _standbys_of_cluster(node, facts)
    for row in facts.of("standby", node):
        state = row.labels.get("state", "?")
        rows.append(
            {
                "what": Cell("walsender", "walsender"),
                "name": Cell(row.labels.get("application_name") or row.labels.get("client_addr", "?")),
                "state": Cell(state, state, Grade.GOOD if state == "streaming" else Grade.WARNING),
                "lag": NONE,
                "bytes": Cell(size(row.value), row.value),
            }
        )
    active = _by(facts.of("slot_active", node), "slot_name")
    for row in facts.of("slot", node):
        name = row.labels.get("slot_name", "?")
        used = active.get(name)
        rows.append(
            {
                "what": Cell("slot", "slot"),
                "name": Cell(name, name),
                "state": UNKNOWN if used is None else Cell("active" if used else "inactive", bool(used), _slot_grade(used)),
                "lag": NONE,
                "bytes": Cell(size(row.value), row.value),
            }
        )
    note = "" if rows else "no standby is connected and there are no slots"
    return _section("replication", "Replication", columns, rows, note, _reasons(facts, node, "replication", "stat_repl", "wal"))


def _standbys_of_cluster(node: Node, facts: Facts) -> list[Line]:
    """The other nodes of the cluster whose lag is known, or known to be unknown."""
    seconds = {row.labels.get("node", ""): row.value for row in facts.rows.get("cluster_lag", ())}
    behind = {row.labels.get("node", ""): row.value for row in facts.rows.get("cluster_lag_bytes", ())}
    unknown = {row.labels.get("node", "") for row in facts.rows.get("cluster_lag_unknown", ())}
    return [
        {
            "what": Cell("standby", "standby"),
            "name": Cell(name, name),
            "state": Cell("lag unknown", None, Grade.UNKNOWN) if name in unknown else Cell("lag known", "lag known"),
            "lag": judged(seconds.get(name), duration(seconds.get(name)), warning=LAG_WARNING_S),
            "bytes": plain(behind.get(name), size(behind.get(name))),
        }
        for name in sorted((seconds.keys() | unknown) - {str(node["alias"])})
    ]


def _slot_grade(active: float) -> Grade:
    return Grade.PLAIN if active else Grade.WARNING  # an inactive slot fills the disk


def transactions(node: Node, facts: Facts) -> Section:
    """All databases, per second over the last minute."""
    columns = (
        Column("commits", "COMMITS", right=True, width=8), Column("rollbacks", "ROLLBACKS", right=True, width=10),
        Column("cache_hit", "CACHE HIT", right=True, width=10), Column("inserted", "INSERTS", right=True, width=8),
        Column("updated", "UPDATES", right=True, width=8), Column("deleted", "DELETES", right=True, width=8),
        Column("temp_bytes", "TEMP", right=True, width=8), Column("deadlocks", "DEADLOCKS", right=True, width=10),
    )  # fmt: skip
    value = {
        name: first(facts.of(name, node))
        for name in (
            "commits",
            "rollbacks",
            "inserted",
            "updated",
            "deleted",
            "deadlocks",
            "temp_bytes",
            "blocks_hit",
            "blocks_read",
        )
    }
    row: Line = {
        name: plain(value[name], rate(value[name])) for name in ("commits", "rollbacks", "inserted", "updated", "deleted")
    }
    row["temp_bytes"] = plain(value["temp_bytes"], size(value["temp_bytes"]))
    row["deadlocks"] = judged(value["deadlocks"], rate(value["deadlocks"]), warning=5 / 60)
    row["cache_hit"] = _cache_hit(value["blocks_hit"], value["blocks_read"])
    return _section("transactions", "Per second", columns, [row], _reasons(facts, node, "stat_database"))


def _cache_hit(hit: float | None, read: float | None) -> Cell:
    if hit is None or read is None:
        return UNKNOWN
    if hit + read < _CACHE_HIT_MIN_READS:
        return Cell("–")
    return Cell(percent(hit / (hit + read)), hit / (hit + read))


def slow(node: Node, facts: Facts) -> Section:
    """The statements that the server's time goes to, from pg_stat_statements."""
    columns = (
        Column("share", "BUSY", right=True, width=6), Column("calls", "CALLS/S", right=True, width=8),
        Column("mean", "MEAN", right=True, width=7), Column("datname", "DATABASE", width=12), Column("query", "STATEMENT"),
    )  # fmt: skip
    calls = {_statement(row): row.value for row in facts.of("statement_calls", node)}
    texts = {row.labels.get("queryid", ""): row.labels.get("query", "") for row in facts.of("statement_text", node)}
    rows = []
    for row in sorted(facts.of("statement_seconds", node), key=lambda row: -row.value):
        called = calls.get(_statement(row))
        mean_s = row.value / called if called else None
        queryid = row.labels.get("queryid", "")
        rows.append(
            {
                "share": Cell(percent(row.value), row.value),
                "calls": plain(called, rate(called)),
                "mean": plain(mean_s, duration(mean_s)),
                "datname": Cell(row.labels.get("datname", "")),
                "query": Cell(
                    _one_line(texts.get(queryid, "")) or f"queryid {queryid}", {"queryid": queryid, "query": texts.get(queryid)}
                ),
            }
        )
    why = _reasons(facts, node, "statements", "stat_statements")
    note = "" if rows or why else "nothing yet: two readings of pg_stat_statements are needed, and they are a minute apart"
    return _section("slow", "Where the time goes", columns, rows, note, why)


def _statement(row: Row) -> tuple[str, str, str]:
    return row.labels.get("queryid", ""), row.labels.get("datname", ""), row.labels.get("user", "")


def long_running(node: Node, facts: Facts) -> Section:
    """Queries and transactions that have been going on for more than ten seconds."""
    columns = (
        Column("pid", "PID", right=True, width=8), Column("age", "FOR", right=True, width=7), Column("state", "STATE", width=20),
        Column("wait", "WAITS FOR", width=14), Column("datname", "DATABASE", width=12), Column("query", "STATEMENT"),
    )  # fmt: skip
    rows = []
    for row in sorted(facts.of("long_query", node), key=lambda row: -row.value):
        state = row.labels.get("state", "")
        limit = _LONG_WARNING_S["idle in transaction" if state.startswith("idle in") else "query"]
        rows.append(
            {
                "pid": _pid(row, "pid"),
                "age": judged(row.value, duration(row.value), warning=limit),
                "state": Cell(state, state),
                "wait": Cell(row.labels.get("wait_event") or row.labels.get("wait_event_type", "")),
                "datname": Cell(row.labels.get("datname", "")),
                "query": Cell(_one_line(row.labels.get("query", "")), row.labels.get("query")),
            }
        )
    oldest = {row.labels.get("kind", ""): row.value for row in facts.of("oldest", node)}
    note = ", ".join(f"oldest {kind.replace('_', ' ')} {duration(oldest[kind])}" for kind in sorted(oldest) if kind in _AGES)
    return _section("long", "Long running", columns, rows, note or ("" if rows else "● none over 10 s"))


_AGES: Final = ("query", "transaction", "idle_in_transaction")


def blocking(node: Node, facts: Facts) -> Section:
    """Who waits for whom."""
    columns = (
        Column("blocker", "BLOCKER", right=True, width=8), Column("blocked", "BLOCKED", right=True, width=8),
        Column("waited", "WAITED", right=True, width=7), Column("datname", "DATABASE", width=12),
        Column("blocker_state", "BLOCKER IS", width=20), Column("blocked_query", "WAITING STATEMENT"),
    )  # fmt: skip
    rows = []
    for row in sorted(facts.of("blocking", node), key=lambda row: -row.value):
        root = row.labels.get("blocker_waits") == "false"
        state = row.labels.get("blocker_state", "")
        rows.append(
            {
                "blocker": _pid(row, "blocker_pid"),
                "blocked": _pid(row, "blocked_pid"),
                "waited": judged(row.value, duration(row.value), warning=_BLOCKED_WARNING_S),
                "datname": Cell(row.labels.get("datname", "")),
                "blocker_state": Cell(f"{state}, the root" if root else f"{state}, waits too", {"state": state, "root": root}),
                "blocked_query": Cell(_one_line(row.labels.get("blocked_query", "")), row.labels.get("blocked_query")),
            }
        )
    waiters = first(facts.of("blocked", node))
    note = (
        "? not known"
        if waiters is None
        else "● nobody waits for a lock"
        if waiters == 0
        else f"▲ {counted(waiters, 'session')} waiting"
    )
    return _section("blocking", "Who blocks", columns, rows, note, _reasons(facts, node, "block", "locks"))


def backups(node: Node, facts: Facts) -> Section:
    """The newest backups and how far each is proven."""
    columns = (
        Column("name", "BACKUP", width=26), Column("age", "AGE", right=True, width=6), Column("size", "SIZE", right=True, width=8),
        Column("grade", "PROVEN", width=14), Column("note", "NOTE"),
    )  # fmt: skip
    rows = []
    for backup in facts.backups:
        age_s = max(0.0, (facts.taken_unix_ns - backup["started_unix_ns"]) / 1e9)
        proven = str(backup.get("grade") or "unproven")
        stored = backup.get("stored_bytes")
        rows.append(
            {
                "name": Cell(str(backup["name"]), backup["name"]),
                "age": Cell(duration(age_s), age_s),
                "size": plain(stored, size(stored)),
                "grade": Cell(proven, backup.get("grade"), _PROOFS.get(proven, Grade.WARNING)),
                "note": Cell("" if backup.get("complete", True) else "incomplete", backup.get("complete")),
            }
        )
    restored_s = first(facts.of("restored", node))
    now_s = facts.taken_unix_ns / 1e9
    proof = (
        f"last proven by a restore {duration(now_s - restored_s)} ago"
        if restored_s
        else "never proven by a restore, as far as is known"
    )
    taken_s = first(facts.of("backup", node))
    age = f"last good one {duration(now_s - taken_s)} ago" if taken_s else ""
    return _section("backups", "Backups", columns, rows, age, proof, "" if rows else "none listed at the collector")


_PROOFS: Final = {"content-equal": Grade.GOOD, "started and checked": Grade.GOOD, "read back": Grade.PLAIN}


def _pid(row: Row, label: str) -> Cell:
    text = row.labels.get(label, "")
    return Cell(text, int(text)) if text.isdigit() else UNKNOWN


def _by(rows: list[Row], label: str) -> dict[str, float]:
    return {row.labels.get(label, ""): row.value for row in rows}


def _one_line(text: str) -> str:
    return " ".join(text.split())

"""The fleet page: one line a node, the worst first. Pure.

The limits at which a cell is marked are those of the default alert rules (alerts/pgherd/alerts/rules); the alerts
column is what the collector's rules say, with their `for`, silences and unknowns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from pgherd.cli.top.facts import Facts
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
)

DISK_WARNING, DISK_CRITICAL = 0.80, 0.90
CONNECTIONS_WARNING, CONNECTIONS_CRITICAL = 0.75, 0.90
P99_WARNING_S = 1.0
LAG_WARNING_S = 10.0
BACKUP_WARNING_S = 3600.0 + 1800.0  # RPO 1 h and half an hour to take it

COLUMNS: Final = (
    Column("state", "STATE", width=10),
    Column("node", "NODE", width=12),
    Column("role", "ROLE", width=7),
    Column("disk", "DISK", right=True, width=5),
    Column("connections", "CONN", right=True, width=5),
    Column("p99", "P99", right=True, width=6),
    Column("lag", "LAG", right=True, width=6),
    Column("transactions", "TX/S", right=True, width=5),
    Column("backup", "BACKUP", right=True, width=6),
    Column("alerts", "ALERTS", width=0),
)


def fleet_page(facts: Facts, text_filter: str = "") -> Page:
    """All nodes whose name, cluster, role, state or alerts contain the filter, the worst first."""
    lines = [fleet_row(node, facts) for node in facts.nodes]
    shown = [line for line in lines if _matches(line, text_filter)]
    shown.sort(key=lambda line: (-line["state"].grade, str(line["cluster"].value), str(line["node"].value)))
    herd_alerts = _unplaced(facts)
    notes = [*facts.problems, *herd_alerts]
    if len(shown) < len(lines):
        notes.append(f"{len(shown)} of {len(lines)} nodes shown: filter {text_filter!r}")
    section = Section("nodes", "Nodes", COLUMNS, tuple(shown), tuple(notes))
    firing = sum(alert["state"] == "firing" for alert in facts.alerts)
    counts = {
        "nodes": Cell(str(len(lines)), len(lines)),
        "firing": Cell(str(firing), firing, Grade.CRITICAL if firing else Grade.GOOD),
    }
    return Page(
        f"herd: {counted(len(lines), 'node')}, {counted(firing, 'alert')} firing", (section,), facts.taken_unix_ns, counts
    )


def fleet_row(node: Mapping[str, Any], facts: Facts) -> dict[str, Cell]:
    """One node's line."""
    up = node["condition"] == "up"
    cells = {
        "disk": _disk(first(facts.of("disk", node))),
        "connections": connections_used(node, facts),
        "p99": latency(
            first(facts.of("p99", node)), first(facts.of("p99_low", node)), first(facts.of("p99_high", node)), P99_WARNING_S
        ),
        "lag": lag(node, first(facts.of("lag", node))),
        "transactions": plain(_sum(facts, node, "commits", "rollbacks"), rate(_sum(facts, node, "commits", "rollbacks"))),
        "backup": backup_age(node, facts),
        "alerts": _alerts(node, facts),
    }
    if not up:  # the last values of a server that doesn't answer aren't news
        cells |= dict.fromkeys(("connections", "p99", "transactions"), UNKNOWN)
        if cells["lag"] is not NONE:
            cells["lag"] = UNKNOWN
    # A P99 of too few statements or a managed server's disk may be unknown for good; a standby's lag may not.
    counted = [cell.grade for key, cell in cells.items() if key == "lag" or cell.grade is not Grade.UNKNOWN]
    worst = max(_condition(node).grade, *counted)
    word = str(node["condition"]) if not up else worst.word
    state = Cell(word, word, worst, is_state=True)
    return {
        "state": state,
        "node": Cell(str(node["alias"]), node["alias"]),
        "cluster": Cell(str(node["cluster"]), node["cluster"]),
        "role": Cell(str(node["role"]), node["role"], Grade.PLAIN if up else Grade.UNKNOWN),
        **cells,
    }


def _condition(node: Mapping[str, Any]) -> Cell:
    condition = str(node["condition"])
    grade = {"up": Grade.GOOD, "unknown": Grade.UNKNOWN}.get(condition, Grade.CRITICAL)
    return Cell(condition, condition, grade)


def _disk(ratio: float | None) -> Cell:
    return judged(ratio, percent(ratio), warning=DISK_WARNING, critical=DISK_CRITICAL)


def connections_used(node: Mapping[str, Any], facts: Facts) -> Cell:
    """Share of the connection slots that ordinary roles can take."""
    if node["condition"] == "saturated":
        return Cell("100%", 1.0, Grade.CRITICAL)
    used, usable = first(facts.of("connections", node)), first(facts.of("usable", node))
    if used is None or not usable:
        return UNKNOWN
    return judged(used / usable, percent(used / usable), warning=CONNECTIONS_WARNING, critical=CONNECTIONS_CRITICAL)


def latency(seconds: float | None, low_s: float | None, high_s: float | None, warning_s: float) -> Cell:
    """A quantile; where the window gives no number but an interval, the end that decides: "<15ms", ">1.2s"."""
    if seconds is not None:
        return judged(seconds, duration(seconds), warning=warning_s)
    if high_s is not None and high_s <= warning_s:
        return Cell(f"<{duration(high_s)}", None, Grade.GOOD)
    if low_s is not None and low_s > warning_s:
        return Cell(f">{duration(low_s)}", None, Grade.WARNING)
    return UNKNOWN


def lag(node: Mapping[str, Any], seconds: float | None) -> Cell:
    """A standby's lag; a primary has none."""
    if node["role"] == "primary":
        return NONE
    return judged(seconds, duration(seconds), warning=LAG_WARNING_S)


def backup_age(node: Mapping[str, Any], facts: Facts) -> Cell:
    """Age of the last good backup; a standby's cluster is backed up on its primary."""
    if node["role"] == "standby" or first(facts.of("backup_enabled", node)) == 0:
        return NONE
    taken_s = first(facts.of("backup", node))
    if taken_s is None:
        enabled = first(facts.of("backup_enabled", node))
        return Cell("none", None, Grade.WARNING) if enabled else UNKNOWN
    age_s = max(0.0, facts.taken_unix_ns / 1e9 - taken_s)
    return judged(age_s, duration(age_s), warning=BACKUP_WARNING_S)


def _sum(facts: Facts, node: Mapping[str, Any], *questions: str) -> float | None:
    values = [first(facts.of(question, node)) for question in questions]
    known = [value for value in values if value is not None]
    return math.fsum(known) if len(known) == len(values) else None


def concerns(alert: Mapping[str, Any], node: Mapping[str, Any]) -> bool:
    """Whether an alert is about this node."""
    labels = alert["labels"]
    named = "instance" in labels or "node" in labels
    return (
        named
        and labels.get("instance", node["instance"]) == node["instance"]
        and labels.get("node", node["alias"]) == node["alias"]
        and labels.get("cluster", node["cluster"]) == node["cluster"]
    )


# A pending alert is shown and judges nothing: some wait for days before they fire.
ALERT_GRADES: Final = {"firing": Grade.CRITICAL, "pending": Grade.PLAIN, "unknown": Grade.UNKNOWN}


def alert_grade(alert: Mapping[str, Any]) -> Grade:
    """How bad an alert is: by its state, and for a firing one by its severity."""
    if alert["state"] == "firing" and alert["labels"].get("severity") in ("warning", "info"):
        return Grade.WARNING
    return ALERT_GRADES.get(alert["state"], Grade.PLAIN)


def _alerts(node: Mapping[str, Any], facts: Facts) -> Cell:
    live = [alert for alert in facts.alerts if alert["state"] in ALERT_GRADES and concerns(alert, node)]
    live.sort(key=lambda alert: -alert_grade(alert))
    names = [
        alert["labels"].get("alertname", "?") + ("" if alert["state"] == "firing" else f" {alert['state']}") for alert in live
    ]
    grade = max((alert_grade(alert) for alert in live), default=Grade.GOOD)
    return Cell(", ".join(dict.fromkeys(names)), list(dict.fromkeys(names)), grade)


def _unplaced(facts: Facts) -> list[str]:
    """Alerts that no line shows: of agents, clusters, the collector."""
    loose = [
        alert
        for alert in facts.alerts
        if alert["state"] in ALERT_GRADES and not any(concerns(alert, node) for node in facts.nodes)
    ]
    loose.sort(key=lambda alert: -alert_grade(alert))
    return [f"{alert_grade(alert).shape} {alert['state']}: {summary(alert)}".strip() for alert in loose[:20]]


def summary(alert: Mapping[str, Any]) -> str:
    """An alert in one line."""
    return str(alert["annotations"].get("summary") or alert["labels"].get("alertname", "?"))


def _matches(line: Mapping[str, Cell], text_filter: str) -> bool:
    wanted = text_filter.strip().lower()
    seen = " ".join(line[key].text for key in ("state", "node", "cluster", "role", "alerts")).lower()
    return wanted in seen

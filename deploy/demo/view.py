"""The status view: what the herd looks like now, redrawn once a second on a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

from commands import CommandError
from herd import Herd
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from story import Step, Story

from pgherd.runtime.render import human_bytes

_SIGNS = {True: ("✔", "green"), False: ("✘", "red"), None: ("…", "yellow")}
_QUERIES = {
    "connections": "pgherd_connections_used",
    "usable": "pgherd_connections_usable",
    "commits": "sum by (node) (rate(pg_stat_database_xact_commit[10s]))",
    "lag": "pgherd_replication_lag_seconds",
}


def _by_node(herd: Herd, expression: str) -> dict[str, float]:
    rows = herd.pgherd("query", expression)["data"]["result"]
    return {row["metric"]["node"]: float(row["value"][1]) for row in rows}


def _nodes(herd: Herd) -> Table:
    sheet = Table(box=None, pad_edge=False, header_style="bold", expand=True)
    for heading in ("NODE", "ROLE", "STATE", "CONNECTIONS", "COMMITS/S", "LAG"):
        sheet.add_column(heading)
    values = {name: _by_node(herd, expression) for name, expression in _QUERIES.items()}
    for row in herd.pgherd("nodes", "ls"):
        alias = row["alias"]

        def shown(name: str, form: str, node: str = alias) -> str:
            value = values[name].get(node)
            return "unknown" if value is None else form.format(value)

        sign, colour = ("●", "green") if row["condition"] == "up" else ("▲", "red")
        sheet.add_row(
            alias,
            row["role"],
            Text(f"{sign} {row['condition']}", style=colour),
            f"{shown('connections', '{:.0f}')}/{shown('usable', '{:.0f}')}",
            shown("commits", "{:.1f}"),
            "–" if row["role"] == "primary" else shown("lag", "{:.1f} s"),
        )
    return sheet


def _steps(steps: Iterable[Step]) -> Table:
    sheet = Table(box=None, pad_edge=False, show_header=False, expand=True)
    for step in steps:
        sign, colour = _SIGNS[step.ok]
        seconds = f"{step.seconds:.1f} s" if step.ok is not None else ""
        sheet.add_row(Text(sign, style=colour), step.name, Text(step.error or seconds, style="red" if step.error else "dim"))
    return sheet


def _processes(herd: Herd) -> Text:
    parts = []
    for service in herd.services:
        with contextlib.suppress(Exception):
            figures: dict[str, Any] = service.figures()
            parts.append(
                f"{service.name} {human_bytes(figures['resident_bytes'] or 0)}, {figures['cpu_share_of_one_core']:.1%} CPU"
            )
    return Text(" · ".join(parts), style="dim")


def picture(herd: Herd, story: Story) -> RenderableType:
    """The whole view; a collector that doesn't answer now is shown as that."""
    parts: list[RenderableType] = []
    try:
        parts.append(_nodes(herd))
        alerts = [row for row in herd.pgherd("alerts", "ls") if row["state"] in ("pending", "firing")]
        text = ", ".join(f"{row['labels']['alertname']} {row['state']} on {row['labels'].get('node', '?')}" for row in alerts)
        parts.append(Text(f"\nalerts: {text or 'none'}", style="red" if alerts else "dim"))
        backups = herd.pgherd("backups", "ls")
        newest = max(backups, key=lambda row: row["started_unix_ns"], default=None)
        parts.append(
            Text(f"backups: {len(backups)}" + (f", newest {newest['name']} ({newest['grade']})" if newest else ""), style="dim")
        )
    except CommandError:
        parts.append(Text("the collector doesn't answer right now", style="yellow"))
    parts += [_processes(herd), Text(), _steps(story.steps)]
    title = f"pgherd demo · look at {herd.query_url} · Ctrl-C stops everything"
    return Panel(Group(*parts), title=title, title_align="left")

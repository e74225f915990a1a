"""`pgherd alerts`: what is pending and firing."""

from __future__ import annotations

import click

from pgherd.cli.main import CliContext
from pgherd.cli.verb import moment, show, verb


@click.group()
def alerts() -> None:
    """What is pending and firing."""


@alerts.command("ls")
@verb
def list_alerts(context: CliContext) -> None:
    """List the alerts that are pending, firing or lately resolved."""
    rows = list(context.client.pages("/api/v1/alerts"))
    for row in rows:
        row["alert"] = row["labels"].get("alertname")
        row["severity"] = row["labels"].get("severity", "")
        row["where"] = row["labels"].get("node") or row["labels"].get("agent") or row["labels"].get("instance", "")
        row["shown"] = row["state"] + (" (silenced)" if row["silenced_by"] else "")
        row["since"] = moment(row["active_unix_ns"])
        row["summary"] = row["annotations"].get("summary", "")
    columns = [("alert", "ALERT"), ("shown", "STATE"), ("severity", "SEVERITY"), ("where", "WHERE"), ("since", "SINCE")]
    show(context, rows, [*columns, ("summary", "SUMMARY")])

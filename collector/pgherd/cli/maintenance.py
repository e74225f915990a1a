"""`pgherd maintenance`: windows in which alerts are mute, once or every week."""

from __future__ import annotations

import click

from pgherd.cli.main import CliContext
from pgherd.cli.silences import matchers_of, which
from pgherd.cli.verb import duration_s, moment, show, verb
from pgherd.runtime.render import emit_json


@click.group()
def maintenance() -> None:
    """Windows in which alerts are mute, once or recurring."""


@maintenance.command()
@click.argument("name")
@which
@click.option("--for", "lifetime", required=True, help="How long each time, such as 2h.")
@click.option("--start", help="Once, at this wall-clock time: 2026-12-24T22:00.")
@click.option("--at", help="Recurring, at this time of day: 02:30.")
@click.option("--on", "days", multiple=True, help="Weekday of a recurring window (mon … sun), repeatable; default: every day.")
@click.option("--zone", default="UTC", show_default=True, help="Time zone of --start and --at, such as Europe/Zurich.")
@click.option("--comment", default="", help="Why.")
@verb
def add(
    context: CliContext,
    name: str,
    matchers: tuple[str, ...],
    alert: str | None,
    cluster: str | None,
    node: str | None,
    lifetime: str,
    start: str | None,
    at: str | None,
    days: tuple[str, ...],
    zone: str,
    comment: str,
) -> None:
    """Add the window NAME for alerts that match all of MATCHERS. One that comes once is listed with the silences."""
    body = {
        "name": name,
        "matchers": matchers_of(matchers, alert=alert, cluster=cluster, node=node),
        "duration_s": duration_s("--for", lifetime),
        "zone": zone,
        "comment": comment,
        "days": list(days),
        **({"start": start} if start else {}),
        **({"at": at} if at else {}),
    }
    answer = context.client.post("/api/v1/maintenance", body)
    if context.json:
        emit_json(answer)
    else:
        click.echo(answer["id"])


@maintenance.command("ls")
@verb
def list_windows(context: CliContext) -> None:
    """List the recurring windows and when they come next."""
    rows = context.client.get("/api/v1/maintenance")["items"]
    for row in rows:
        row["which"] = ", ".join(row["matchers"])
        row["when"] = f"{' '.join(row['days']) or 'daily'} {row['at']} {row['zone']}"
        row["next"] = moment(row["next_unix_ns"])
    columns = [("id", "ID"), ("name", "NAME"), ("state", "STATE"), ("when", "WHEN"), ("next", "NEXT"), ("which", "ALERTS")]
    show(context, rows, [*columns, ("actor", "BY")])


@maintenance.command()
@click.argument("window_id")
@verb
def rm(context: CliContext, window_id: str) -> None:
    """Delete a recurring window."""
    answer = context.client.delete(f"/api/v1/maintenance/{window_id}")
    if context.json:
        emit_json(answer)
    else:
        click.echo(f"{window_id} removed")

"""`pgherd silences`: mute alerts for a while."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from pgherd.cli.main import CliContext
from pgherd.cli.verb import duration_s, moment, show, verb
from pgherd.runtime.render import emit_json

F = TypeVar("F", bound=Callable[..., Any])


def which(function: F) -> F:
    """The options that say which alerts: matchers, and the usual labels by name."""
    options = (
        click.argument("matchers", nargs=-1),
        click.option("--alert", help="The alert's name."),
        click.option("--cluster", help="Alerts of this cluster."),
        click.option("--node", help="Alerts of this node."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def matchers_of(texts: Sequence[str], *, alert: str | None, cluster: str | None, node: str | None) -> list[str]:
    """Every matcher, the named labels as equalities."""
    named = (("alertname", alert), ("cluster", cluster), ("node", node))
    return [*texts, *(f'{label}="{_escaped(value)}"' for label, value in named if value)]


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


@click.group()
def silences() -> None:
    """Mute alerts for a while; what still fires afterwards is told then."""


@silences.command()
@which
@click.option("--for", "lifetime", default="2h", show_default=True, help="How long.")
@click.option("--comment", default="", help="Why; shown beside the silence.")
@verb
def add(
    context: CliContext,
    matchers: tuple[str, ...],
    alert: str | None,
    cluster: str | None,
    node: str | None,
    lifetime: str,
    comment: str,
) -> None:
    """Silence alerts that match all of MATCHERS, such as severity="warning" or node=~"db.*"."""
    body = {
        "matchers": matchers_of(matchers, alert=alert, cluster=cluster, node=node),
        "duration_s": duration_s("--for", lifetime),
        "comment": comment,
    }
    answer = context.client.post("/api/v1/silences", body)
    if context.json:
        emit_json(answer)
    else:
        click.echo(answer["id"])


@silences.command("ls")
@verb
def list_silences(context: CliContext) -> None:
    """List silences that are active, to come, or ended lately."""
    rows = context.client.get("/api/v1/silences")["items"]
    for row in rows:
        row["which"] = ", ".join(row["matchers"])
        row["from"], row["until"] = moment(row["starts_unix_ns"]), moment(row["ends_unix_ns"])
    columns = [("id", "ID"), ("state", "STATE"), ("which", "ALERTS"), ("from", "FROM"), ("until", "UNTIL")]
    show(context, rows, [*columns, ("actor", "BY"), ("comment", "COMMENT")])


@silences.command()
@click.argument("silence_id")
@verb
def expire(context: CliContext, silence_id: str) -> None:
    """End a silence now."""
    answer = context.client.delete(f"/api/v1/silences/{silence_id}")
    if context.json:
        emit_json(answer)
    else:
        click.echo(f"{silence_id} ended")

"""`pgherd agents`: who is in the herd, letting one in, and putting one out."""

from __future__ import annotations

from typing import Any

import click

from pgherd.cli.main import CliContext
from pgherd.cli.revocation import end_identity
from pgherd.cli.verb import duration_s, moment, show, verb
from pgherd.proto.errors import ConfigError
from pgherd.runtime.render import emit_json


@click.group()
def agents() -> None:
    """The agents of the herd."""


@agents.command("ls")
@verb
def list_agents(context: CliContext) -> None:
    """List the agents: connected or silent, clock skew, what they have shipped."""
    rows = list(context.client.pages("/api/v1/agents"))
    shipments: dict[str, list[dict[str, Any]]] = {}
    for shipment in context.client.get("/api/v1/shipments")["items"]:
        shipments.setdefault(shipment["agent_id"], []).append(shipment)
    for row in rows:
        mine = shipments.get(row["id"], [])
        row["incarnations"] = mine
        row["stored_points"] = sum(shipment["stored_points"] for shipment in mine)
        row["gaps"] = sum(shipment["gaps"] for shipment in mine)
        row["seen"] = moment(row["last_heartbeat_unix_ns"])
        row["skew"] = None if row["skew_ns"] is None else f"{row['skew_ns'] / 1e6:+.1f} ms"
        row["link"] = "connected" if row["connected"] else "silent"
    columns = [("name", "AGENT"), ("id", "ID"), ("status", "STATUS"), ("link", "LINK"), ("seen", "LAST SEEN")]
    show(context, rows, [*columns, ("skew", "SKEW"), ("stored_points", "POINTS"), ("gaps", "GAPS")])


@agents.command()
@click.option("--name", help="How the agent shall be called; default: its host's name.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="A label of the agent; may be repeated.")
@click.option("--lifetime", default="15m", show_default=True, help="How long the token may be used.")
@verb
def add(context: CliContext, name: str | None, labels: tuple[str, ...], lifetime: str) -> None:
    """Make a single-use token and print the one line to run on the database host."""
    body: dict[str, Any] = {"labels": dict(_pair(label) for label in labels)}
    if name:
        body["name"] = name
    body["lifetime_s"] = duration_s("--lifetime", lifetime)
    token = context.client.post("/api/v1/join-tokens", body)
    if context.json:
        emit_json(token)
        return
    click.echo("On the database host run\n\n    pgherd-agent join\n\nand paste this token when it asks:\n")
    click.echo(f"    {token['token']}\n")
    click.echo(f"It works once and until {moment(token['expires_unix_ns'])}. It is shown only here.")


@agents.command()
@click.argument("agent")
@click.option("--reason", default="", help="Kept in the audit.")
@click.option("--yes", is_flag=True, help="Don't ask.")
@verb
def revoke(context: CliContext, agent: str, reason: str, yes: bool) -> None:
    """End AGENT's identity for good and cut its connections; it has to join again with a new token."""
    end_identity(context, "agent", context.client.pages("/api/v1/agents"), agent, reason=reason, yes=yes)


def _pair(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ConfigError("usage.invalid", f"--label {text!r} isn't KEY=VALUE")
    return key, value

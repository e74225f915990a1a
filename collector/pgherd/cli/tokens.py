"""`pgherd tokens`: bearer tokens of the HTTP API (Grafana gets a viewer)."""

from __future__ import annotations

import click

from pgherd.cli.main import CliContext
from pgherd.cli.verb import duration_s, moment, show, verb
from pgherd.runtime.render import emit_json


@click.group()
def tokens() -> None:
    """Bearer tokens of the HTTP API."""


@tokens.command()
@click.argument("name")
@click.option("--scope", type=click.Choice(["viewer", "operator", "admin"]), default="viewer", show_default=True)
@click.option("--lifetime", default="90d", show_default=True)
@verb
def create(context: CliContext, name: str, scope: str, lifetime: str) -> None:
    """Make a token for NAME; it is shown once."""
    lifetime_s = duration_s("--lifetime", lifetime)
    token = context.client.post("/api/v1/tokens", {"name": name, "scope": scope, "lifetime_s": lifetime_s})
    if context.json:
        emit_json(token)
    else:
        click.echo(token["token"])
        click.echo(f"{scope} until {moment(token['expires_unix_ns'])}; shown only here", err=True)


@tokens.command("ls")
@verb
def list_tokens(context: CliContext) -> None:
    """List the tokens, without their secrets."""
    rows = context.client.get("/api/v1/tokens")["items"]
    for row in rows:
        row["expires"] = moment(row["expires_unix_ns"])
        row["used"] = moment(row["last_used_unix_ns"])
        row["state"] = "revoked" if row["revoked_unix_ns"] else "active"
    show(
        context,
        rows,
        [("id", "ID"), ("name", "NAME"), ("scope", "SCOPE"), ("state", "STATE"), ("expires", "EXPIRES"), ("used", "LAST USED")],
    )


@tokens.command()
@click.argument("token_id")
@verb
def revoke(context: CliContext, token_id: str) -> None:
    """Revoke a token at once."""
    context.client.delete(f"/api/v1/tokens/{token_id}")
    if context.json:
        emit_json({"id": token_id, "revoked": True})
    else:
        click.echo(f"{token_id} revoked")

"""`pgherd nodes`: the PostgreSQL instances of the herd."""

from __future__ import annotations

import click

from pgherd.cli.commands import follow, issue
from pgherd.cli.main import CliContext
from pgherd.cli.verb import moment, show, verb


@click.group()
def nodes() -> None:
    """The PostgreSQL instances of the herd."""


@nodes.command("ls")
@verb
def list_nodes(context: CliContext) -> None:
    """List the nodes; a node whose agent is silent is unknown, whatever it was before."""
    rows = list(context.client.pages("/api/v1/nodes"))
    for row in rows:
        row["seen"] = moment(row["observed_unix_ns"])
        version = row["server_version_num"]
        row["version"] = f"{version // 10000}.{version % 10000}" if version else None
    columns = [("alias", "NODE"), ("cluster", "CLUSTER"), ("role", "ROLE"), ("condition", "CONDITION")]
    show(context, rows, [*columns, ("version", "VERSION"), ("instance", "INSTANCE"), ("seen", "LAST SEEN")])


@nodes.command()
@click.argument("node")
@verb
def ping(context: CliContext, node: str) -> int:
    """Have the node's agent answer a command, to see that commands arrive."""
    return follow(context, issue(context, node, "ping"))


@nodes.command()
@click.argument("node")
@verb
def diagnostics(context: CliContext, node: str) -> int:
    """What keeps this node from being sampled, backed up, restored or promoted."""
    return follow(context, issue(context, node, "diagnostics"))

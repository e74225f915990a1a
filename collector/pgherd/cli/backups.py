"""`pgherd backups`: take, verify and restore through the agents; list what is there and how far it is proven."""

from __future__ import annotations

from typing import Any

import click

from pgherd.cli.commands import finish, follow, issue
from pgherd.cli.main import CliContext
from pgherd.cli.verb import moment, show, verb
from pgherd.runtime.render import emit_json, human_bytes

_wait = click.option("--wait", is_flag=True, help="Follow it to its end; the exit status is the command's.")


@click.group()
def backups() -> None:
    """Take, verify and restore backups through the agents."""


@backups.command("ls")
@click.option("--node", help="Only this node's.")
@verb
def list_backups(context: CliContext, node: str | None) -> None:
    """List the backups that agents reported, the newest first, with the grade of their proof."""
    rows = list(context.client.pages("/api/v1/backups", {"node": node}))
    for row in rows:
        row["started"] = moment(row["started_unix_ns"])
        row["size"] = human_bytes(row["stored_bytes"])
        row["state"] = "complete" if row["complete"] else "INCOMPLETE"
    columns = [
        ("name", "BACKUP"),
        ("node", "NODE"),
        ("started", "STARTED"),
        ("size", "SIZE"),
        ("state", "STATE"),
        ("grade", "PROOF"),
    ]
    show(context, rows, columns)


@backups.command("run")
@click.argument("node")
@_wait
@verb
def run(context: CliContext, node: str, wait: bool) -> int:
    """Have NODE's agent take a backup now."""
    return _asked(context, issue(context, node, "backup.run"), wait)


@backups.command("verify")
@click.argument("node")
@click.argument("backup", default="")
@_wait
@verb
def verify(context: CliContext, node: str, backup: str, wait: bool) -> int:
    """Have every byte of BACKUP (default: the newest) read back and compared."""
    return _asked(context, issue(context, node, "backup.verify", {"backup": backup}), wait)


@backups.command("restore")
@click.argument("node")
@click.argument("backup", default="")
@click.option("--root", default="", help="Restore into a new data directory under this restore root of the agent.")
@click.option("--name", default="", help="Name of the new directory under --root.")
@_wait
@verb
def restore(context: CliContext, node: str, backup: str, root: str, name: str, wait: bool) -> int:
    """Restore BACKUP (default: the newest) into a scratch server and compare its content; or into a new directory."""
    return _asked(context, issue(context, node, "restore", {"backup": backup, "root": root, "name": name}), wait)


def _asked(context: CliContext, command: dict[str, Any], wait: bool) -> int:
    if wait:
        return follow(context, command)
    if not command["open"]:
        return finish(context, command)
    if context.json:
        emit_json(command)
    else:
        click.echo(f"{command['id']} {command['state']}; follow it with `pgherd commands watch {command['id']}`")
    return 0

"""`pgherd-agent discover`: read-only, needs no configuration; every user sees what they may see."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import click

from pgherd.agent.context import AgentContext
from pgherd.agent.discovery.look import look
from pgherd.agent.discovery.merge import Instance
from pgherd.agent.discovery.propose import Address, toml_of, with_nodes
from pgherd.runtime.render import command_main, emit_json, table


@click.command()
@click.option("--toml", "as_toml", is_flag=True, help="Only the [[nodes]] tables to add to the configuration.")
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
@click.pass_obj
def discover(context: AgentContext, as_toml: bool, as_json: bool) -> None:
    """Find the PostgreSQL servers of this host, and say which of them this agent serves.

    Looks at processes, UNIX sockets and Debian's cluster layout; sends nothing to a server, changes nothing
    and reads no secret. What this user may not see is named.
    """
    as_json = as_json or context.json

    def body() -> None:
        found = with_nodes(look(), _addresses(context), os.path.realpath)
        proposals = _proposals(found, [node.alias for node in context.config.nodes])
        if as_json:
            emit_json([{**asdict(one), "toml": proposals.get(number)} for number, one in enumerate(found)])
        elif as_toml:
            click.echo("\n\n".join(proposals.values()))
        else:
            _say(found, list(proposals.values()))

    sys.exit(command_main(body, as_json=as_json))


def _addresses(context: AgentContext) -> Mapping[str, Address]:
    """Where each configured node is; a service file isn't read: it may hold passwords."""
    from psycopg.conninfo import conninfo_to_dict

    addresses = {}
    for node in context.config.nodes:
        given = conninfo_to_dict(node.conninfo)
        if "service" not in given or "host" in given:
            host = str(given.get("host") or given.get("hostaddr") or "").split(",")[0]
            addresses[node.alias] = (host, str(given.get("port") or "").split(",")[0])
    return addresses


def _proposals(found: Sequence[Instance], taken: Sequence[str]) -> dict[int, str]:
    """TOML by the instance's number, for those that run and that no node serves."""
    from psycopg.conninfo import make_conninfo

    aliases, proposals = list(taken), {}
    for number, one in enumerate(found):
        if one.running and one.configured is None and one.port is not None:
            alias, proposals[number] = toml_of(
                one, socket.gethostname(), aliases, lambda keywords: make_conninfo("", **keywords)
            )
            aliases.append(alias)
    return proposals


def _say(found: Sequence[Instance], proposals: Sequence[str]) -> None:
    if not found:
        click.echo("no PostgreSQL server shows itself here")
        return
    rows = [
        {
            "name": one.name or "-",
            "state": "running" if one.running else "down",
            "major": one.major or "?",
            "port": one.port or "?",
            "socket": one.socket_directory or "-",
            "data": one.data_directory or "?",
            "node": one.configured or "-",
        }
        for one in found
    ]
    titles = ("name", "state", "major", "port", "socket", "data", "node")
    table(rows, [(name, {"node": "CONFIGURED AS"}.get(name, name.upper())) for name in titles])
    for one in found:
        for what, why in one.unseen.items():
            who = f"pid {one.pid}" if one.pid else f"port {one.port}"
            click.echo(f"not seen: {what} of {who}: {why}")
    if any(one.unseen for one in found) and os.geteuid() != 0:
        click.echo("root, or the server's own user, sees more")
    if proposals:
        click.echo("\nto serve the others, add to the configuration:\n")
        click.echo("\n\n".join(proposals))

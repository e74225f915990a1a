"""`pgherd-agent sql`: print the exact GRANTs. Talks to the server only to learn its version, and only if asked."""

from __future__ import annotations

import dataclasses
import sys
from typing import cast

import click

from pgherd.agent.context import AgentContext
from pgherd.agent.grants.statements import DEFAULT_ROLE, PURPOSES, Purpose, create_role, grants, script
from pgherd.proto.errors import ConfigError
from pgherd.runtime.render import command_main, emit_json

_MAJORS = (13, 99)


def parse_purposes(text: str) -> tuple[Purpose, ...]:
    """ "monitor,backup" → purposes. Raises ConfigError usage.invalid."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in PURPOSES]
    if unknown or not names:
        raise ConfigError(
            "usage.invalid", f"not a purpose: {', '.join(unknown) or text!r}", hint=f"one or more of {','.join(PURPOSES)}"
        )
    return tuple(cast(Purpose, name) for name in names)


@click.command()
@click.option("--for", "purposes", required=True, help="What the role is for: monitor, backup, failover; several with commas.")
@click.option("--role", default=DEFAULT_ROLE, show_default=True, help="The role's name.")
@click.option("--major", type=click.IntRange(*_MAJORS), help="The server's major version; default: asked from the node.")
@click.option("--node", "alias", help="The node to ask for its version (may be left out when there is only one).")
@click.option("--no-create", is_flag=True, help="Leave out CREATE ROLE: the role exists.")
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
@click.pass_obj
def sql(
    context: AgentContext, purposes: str, role: str, major: int | None, alias: str | None, no_create: bool, as_json: bool
) -> None:
    """Print the GRANTs that the agent's role needs: least privilege, never superuser.

    \b
    pgherd-agent sql --for monitor,backup --major 17 | psql -X -v ON_ERROR_STOP=1
    """
    as_json = as_json or context.json

    def body() -> None:
        wanted = parse_purposes(purposes)
        version = major if major is not None else _ask_major(context, alias)
        if as_json:
            statements = [*([] if no_create else [create_role(role)]), *grants(role, version, wanted)]
            emit_json({"role": role, "major": version, "statements": [dataclasses.asdict(s) for s in statements]})
        else:
            click.echo(script(role, version, wanted, create=not no_create), nl=False)

    sys.exit(command_main(body, as_json=as_json))


def _ask_major(context: AgentContext, alias: str | None) -> int:
    from pgherd.postgres.connection import Target, connect
    from pgherd.runtime.durable import read_secret

    if not context.config.nodes:
        raise ConfigError("usage.invalid", "no node is configured to ask for its version", hint="say --major 17")
    node = context.node(alias)
    target = Target(node.conninfo, read_secret(node.password_file) if node.password_file else None)
    with connect(target) as connection:
        return connection.info.server_version // 10000

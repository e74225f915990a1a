"""`pgherd-agent join` and `pgherd-agent renew`."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path

import click

from pgherd.agent.context import AgentContext
from pgherd.agent.identity.files import Identity
from pgherd.agent.identity.join import join_herd
from pgherd.agent.identity.renew import renew_identity
from pgherd.proto.enrolment import JoinToken
from pgherd.proto.errors import ConfigError
from pgherd.runtime.clock import SystemClock
from pgherd.runtime.durable import read_secret
from pgherd.runtime.render import command_main, emit_json

_TOKEN_CHARACTERS_MAX = 1024


@click.command()
@click.option(
    "--token-file",
    type=click.Path(path_type=Path, allow_dash=True),
    help="File with the join token (0600), or - for standard input. Without it, you are asked.",
)
@click.option("--force", is_flag=True, help="Join as a new agent even if this one has joined before.")
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
@click.pass_obj
def join(context: AgentContext, token_file: Path | None, force: bool, as_json: bool) -> None:
    """Join a herd with the token that `pgherd agents add` printed.

    The token is read from a prompt, a file or standard input; never give it as an argument, where every user of
    this host can see it.
    """
    as_json = as_json or context.json

    def body() -> None:
        identity = join_herd(context.config.state_directory, _read_token(token_file), force=force)
        _answer(identity, "joined", as_json)

    sys.exit(command_main(body, as_json=as_json))


@click.command()
@click.option("--force", is_flag=True, help="Renew now, due or not.")
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
@click.pass_obj
def renew(context: AgentContext, force: bool, as_json: bool) -> None:
    """Renew this agent's certificate if it is due. The running agent does this by itself."""
    as_json = as_json or context.json

    def body() -> None:
        identity = renew_identity(context.config.state_directory, SystemClock(), force=force)
        if identity is not None:
            _answer(identity, "renewed", as_json)
        elif as_json:
            emit_json({"outcome": "not due"})
        else:
            click.echo("the certificate isn't due for renewal; --force renews it now")

    sys.exit(command_main(body, as_json=as_json))


def _read_token(token_file: Path | None) -> JoinToken:
    if token_file is None and not sys.stdin.isatty():
        token_file = Path("-")
    if token_file is None:
        text = str(click.prompt("Join token", hide_input=True, err=True))
    elif str(token_file) == "-":
        text = sys.stdin.readline(_TOKEN_CHARACTERS_MAX)
        if not text.strip():
            raise ConfigError(
                "join.token_malformed", "no join token on standard input", hint="pipe the line in, or use --token-file"
            )
    else:
        text = read_secret(token_file)
    return JoinToken.parse(text)


def _answer(identity: Identity, outcome: str, as_json: bool) -> None:
    until = datetime.fromtimestamp(identity.not_after_unix_ns // 1_000_000_000, UTC).isoformat()
    if as_json:
        emit_json(
            {
                "outcome": outcome,
                "agent_id": identity.agent_id,
                "trust_domain": identity.trust_domain,
                "grpc_address": identity.grpc_address,
                "serial": identity.serial,
                "not_after": until,
            }
        )
    else:
        click.echo(f"{outcome}: agent {identity.agent_id} of {identity.trust_domain}, certificate until {until}")

"""`pgherd-agent check`: read-only, needs no collector, no identity and no installed service."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from pgherd.agent.answering import answering
from pgherd.agent.config import AgentConfig, NodeConfig
from pgherd.agent.context import AgentContext
from pgherd.agent.preflight.gather import gather
from pgherd.agent.preflight.judge import Finding, judge
from pgherd.proto.codes import Exit
from pgherd.proto.errors import ConfigError
from pgherd.runtime.render import Progress, command_main, emit_json


@click.command()
@click.option("--node", "alias", help="The node's alias (may be left out when the configuration has only one).")
@click.option("--conninfo", help="Look at this server instead of a configured node (libpq keywords, no password).")
@click.option("--password-file", type=click.Path(path_type=Path), help="With --conninfo: first line is the password (0600).")
@click.option("--ndjson", is_flag=True, help="Progress and the result as NDJSON on stdout (for programs).")
@click.option("--result-file", type=click.Path(path_type=Path), help="Also publish the outcome durably in this file.")
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
@click.pass_obj
def check(
    context: AgentContext,
    alias: str | None,
    conninfo: str | None,
    password_file: Path | None,
    ndjson: bool,
    result_file: Path | None,
    as_json: bool,
) -> None:
    """Say what keeps a server from being sampled, backed up, restored or promoted, and how to mend it.

    Changes nothing. Exits with 0 when nothing blocks, 6 when something does.
    """
    as_json = as_json or context.json

    def body() -> int:
        with answering(result_file, ndjson=ndjson) as answer:
            config, node = _subject(context, alias, conninfo, password_file)
            progress = Progress(ndjson=ndjson)
            progress("check", 0, 1, "nodes")
            findings = judge(gather(config, node))
            progress("check", 1, 1, "nodes")
            progress.close()
            answer({"findings": [finding.as_dict() for finding in findings]})
        if as_json and not ndjson:
            emit_json({"node": node.alias, "findings": [finding.as_dict() for finding in findings]})
        elif not ndjson:
            _say(node, findings)
        blocked = any(finding.severity == "blocker" for finding in findings)
        return Exit.PARTIAL if blocked and not ndjson else Exit.OK  # to the agent, a check that found something succeeded

    sys.exit(command_main(body, as_json=as_json or ndjson))


def _subject(
    context: AgentContext, alias: str | None, conninfo: str | None, password_file: Path | None
) -> tuple[AgentConfig, NodeConfig]:
    if conninfo is None:
        if password_file is not None:
            raise ConfigError(
                "usage.invalid", "--password-file belongs to --conninfo", hint="nodes have password_file of their own"
            )
        return context.config, context.node(alias)
    if alias is not None:
        raise ConfigError("usage.invalid", "--node and --conninfo exclude each other", hint="leave one out")
    if "password" in _keywords(conninfo):
        raise ConfigError(
            "usage.invalid", "a password in an argument is visible to every user of this host", hint="use --password-file"
        )
    return context.config, NodeConfig("(conninfo)", "(none)", conninfo, password_file=password_file)


def _keywords(conninfo: str) -> set[str]:
    import psycopg
    from psycopg.conninfo import conninfo_to_dict

    try:
        return {key for key, value in conninfo_to_dict(conninfo).items() if value is not None}
    except psycopg.Error as error:
        text = str(error).strip()
        raise ConfigError(
            "usage.invalid", f"--conninfo: {text}", hint="write it like 'host=/run/postgresql user=pgherd'"
        ) from error


_COLOURS = {"blocker": "red", "warning": "yellow", "unknown": "magenta", "info": "blue", "ok": "green"}


def _say(node: NodeConfig, findings: Sequence[Finding]) -> None:
    click.echo(f"{node.alias}: {node.conninfo}")
    for finding in findings:
        mark = click.style(f"{finding.severity:>8}", fg=_COLOURS[finding.severity])
        click.echo(f"{mark}  {finding.check}: {finding.message}")
        if finding.remedy:
            click.echo("          " + "\n          ".join(finding.remedy.splitlines()))

"""`pgherd-agent`: one short-lived process per verb; `run` validates and then becomes the resident.

Verbs live with what they do (identity, backup, preflight …) and are only gathered here.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import click

from pgherd.agent.context import AgentContext
from pgherd.runtime.logging import configure
from pgherd.runtime.render import command_main, emit_json, show_settings, table

# Verb → where its click command lives. Loaded on use: `pgherd-agent sql` needn't import gRPC.
_VERBS = {
    "join": "pgherd.agent.identity.command:join",
    "renew": "pgherd.agent.identity.command:renew",
    "check": "pgherd.agent.preflight.command:check",
    "discover": "pgherd.agent.discovery.command:discover",
    "sql": "pgherd.agent.grants.command:sql",
    "backup": "pgherd.agent.backup.command:backup",
}


class LazyGroup(click.Group):
    """A click group that imports a verb's module only when the verb is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *_VERBS})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = _VERBS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config", "config_file", type=click.Path(path_type=Path), help="Configuration file (default: /etc/pgherd/agent.toml)."
)
@click.option("--state-directory", type=click.Path(path_type=Path), help="Overrides state_directory.")
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
@click.version_option(package_name="pgherd")
@click.pass_context
def agent(ctx: click.Context, config_file: Path | None, state_directory: Path | None, as_json: bool) -> None:
    """The agent beside a PostgreSQL server: samples it, backs it up, restores it."""
    configure(level="warning")  # to stderr: stdout belongs to results; `run` sets its own
    flags: dict[str, object] = {"state_directory": str(state_directory.absolute())} if state_directory else {}
    ctx.obj = AgentContext(config_file=config_file.absolute() if config_file else None, json=as_json, flags=flags)


@agent.command()
@click.option("--standalone", is_flag=True, help="Run without a collector: backups by schedule, samples stay in the spool.")
@click.pass_obj
def run(context: AgentContext, standalone: bool) -> None:
    """Run the agent until it is told to stop (SIGTERM)."""
    from pgherd.agent.launch import launch

    sys.exit(command_main(lambda: launch(context, standalone=standalone), as_json=context.json))


@agent.command()
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
@click.pass_obj
def status(context: AgentContext, as_json: bool) -> None:
    """Show how the agent on this host is, collector or not."""
    from pgherd.agent.status import read_status

    def body() -> None:
        document = read_status(context.config.state_directory / "status.json")
        if as_json or context.json:
            emit_json(document)
            return
        spool = document["spool"]
        link = {True: "connected", False: "not connected", None: "none (standalone)"}[document["connected"]]
        click.echo(f"collector: {link}; spool: {spool['waiting_points']} points wait, {spool['dropped_points']} were dropped")
        if disabled := document.get("commands_disabled"):
            click.echo(f"NO COMMANDS AND NO SCHEDULED BACKUPS: {disabled['message']}; {disabled['hint']}")
        table(document["nodes"], [("alias", "NODE"), ("role", "ROLE"), ("condition", "CONDITION"), ("instance", "INSTANCE")])

    sys.exit(command_main(body, as_json=as_json or context.json))


@agent.group()
def config() -> None:
    """Check and show the configuration."""


@config.command("check")
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
@click.pass_obj
def config_check(context: AgentContext, as_json: bool) -> None:
    """Validate every layer; say what is wrong and where."""

    def body() -> None:
        nodes = [node.alias for node in context.config.nodes]
        if as_json or context.json:
            emit_json({"ok": True, "nodes": nodes})
        else:
            click.echo(f"the configuration is valid; nodes: {', '.join(nodes) or 'none'}")

    sys.exit(command_main(body, as_json=as_json or context.json))


@config.command("show")
@click.option("--origin", is_flag=True, help="Say where each value comes from.")
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
@click.pass_obj
def config_show(context: AgentContext, origin: bool, as_json: bool) -> None:
    """Print every setting as it is in force."""
    as_json = as_json or context.json

    def body() -> None:
        show_settings(context.loaded.show(), origin=origin, as_json=as_json)

    sys.exit(command_main(body, as_json=as_json))


def main() -> None:
    """Entry point of the `pgherd-agent` command."""
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # before grpc is imported: we start children
    agent()


if __name__ == "__main__":
    main()

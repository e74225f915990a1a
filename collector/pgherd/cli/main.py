"""`pgherd`: the operator's command. An HTTP client of the collector; works from the base install.

Verbs that need more (`collector`) are found through the entry point group `pgherd.commands`, so that
this package imports nothing of the collector.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import entry_points
from pathlib import Path

import click

from pgherd.cli.client import Address, Client
from pgherd.runtime.logging import configure

_VERBS = ("agents", "alerts", "backups", "clients", "commands", "maintenance", "nodes", "query", "silences", "tokens", "top")
_PLUGINS = "pgherd.commands"


@dataclass
class CliContext:
    """The group's own options; the connection is made when a verb first asks for it."""

    url: str | None
    socket: Path | None
    token_file: Path | None
    json: bool

    @cached_property
    def client(self) -> Client:
        """Raises ConfigError config.secret_unreadable."""
        return Client(Address.resolve(url=self.url, socket=self.socket, token_file=self.token_file))


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*_VERBS, *(point.name for point in entry_points(group=_PLUGINS))})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _VERBS:
            module = importlib.import_module(f"pgherd.cli.{cmd_name}")
            command: click.Command = getattr(module, cmd_name)
            return command
        for point in entry_points(group=_PLUGINS, name=cmd_name):
            plugin: click.Command = point.load()
            return plugin
        return None


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--url", help="The collector's HTTP address (PGHERD_URL).")
@click.option("--socket", type=click.Path(path_type=Path), help="The collector's local socket (PGHERD_SOCKET).")
@click.option("--token-file", type=click.Path(path_type=Path), help="File with an API token (PGHERD_TOKEN_FILE).")
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
@click.version_option(package_name="pgherd")
@click.pass_context
def pgherd(ctx: click.Context, url: str | None, socket: Path | None, token_file: Path | None, as_json: bool) -> None:
    """Watch over a herd of PostgreSQL servers: nodes, backups, alerts, commands."""
    configure(level="warning")  # to stderr: stdout belongs to results
    ctx.obj = CliContext(url=url, socket=socket, token_file=token_file, json=as_json)


def main() -> None:
    """Entry point of the `pgherd` command."""
    pgherd()


if __name__ == "__main__":
    main()

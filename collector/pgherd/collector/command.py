"""`pgherd collector`: make a herd and serve it."""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import cached_property
from pathlib import Path

import click

from pgherd.collector.config import DEFAULT_FILE, ENVIRONMENT_PREFIX, CollectorConfig
from pgherd.proto.codes import Exit
from pgherd.proto.errors import ConfigError
from pgherd.runtime.clock import SystemClock
from pgherd.runtime.config import Loaded, load
from pgherd.runtime.logging import configure
from pgherd.runtime.render import command_main, emit_json, render_error, show_settings

_LIBRARIES = ("alembic", "duckdb", "fastapi", "numpy", "promql_parser", "pyarrow", "sqlalchemy", "uvicorn", "yaml")


class CollectorContext:
    """The group's own options; the configuration is read when a verb first asks for it."""

    def __init__(self, file: Path | None, flags: dict[str, object], *, json: bool) -> None:
        self._file = file
        self._flags = flags
        self.json = json

    @cached_property
    def loaded(self) -> Loaded[CollectorConfig]:
        """All layers, validated, with origins. Raises ConfigError."""
        file = self._file or (DEFAULT_FILE if DEFAULT_FILE.exists() else None)
        return load(CollectorConfig, file=file, environment_prefix=ENVIRONMENT_PREFIX, flags=self._flags)


@click.group()
@click.option(
    "--config", "config_file", type=click.Path(path_type=Path), help="Configuration file (default: /etc/pgherd/collector.toml)."
)
@click.option("--state-directory", type=click.Path(path_type=Path), help="Overrides state_directory.")
@click.pass_context
def collector(ctx: click.Context, config_file: Path | None, state_directory: Path | None) -> None:
    """Make a herd and serve it."""
    require_libraries("pgherd collector")
    flags: dict[str, object] = {"state_directory": str(state_directory.absolute())} if state_directory else {}
    as_json = bool(getattr(ctx.obj, "json", False))
    ctx.obj = CollectorContext(config_file.absolute() if config_file else None, flags, json=as_json)


def require_libraries(verb: str) -> None:
    """End with config.missing_extra when this is a base install: `verb` ships with it, its libraries don't."""
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        error = ConfigError(
            "config.missing_extra",
            f"`{verb}` needs {', '.join(missing)}, which a base install doesn't bring",
            hint="pip install 'pgherd[collector]'",
        )
        render_error(error, as_json=False)
        sys.exit(Exit.USAGE)


_json = click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")


@collector.command()
@click.option(
    "--new-control-store", is_flag=True, help="Begin with an empty control store if a herd's was lost: agents join again."
)
@_json
@click.pass_obj
def init(context: CollectorContext, new_control_store: bool, as_json: bool) -> None:
    """Make the state directory, the herd's CA and the control store; safe to repeat."""

    def body() -> None:
        from pgherd.collector.setup import initialise

        config = context.loaded.value
        ca, made = initialise(config, SystemClock(), new_control_store=new_control_store)
        if as_json or context.json:
            emit_json(
                {
                    "created": made,
                    "trust_domain": ca.trust_domain,
                    "ca_pin": ca.pin,
                    "state_directory": str(config.state_directory),
                }
            )
            return
        click.echo(f"{'made' if made else 'found'} the herd {ca.trust_domain} in {config.state_directory}")
        click.echo("next: `pgherd collector run`, then `pgherd agents add` for each database host")

    sys.exit(command_main(body, as_json=as_json or context.json))


@collector.command()
@click.pass_obj
def run(context: CollectorContext) -> None:
    """Serve the herd until told to stop (SIGTERM)."""

    def body() -> int:
        from pgherd.collector.service import run

        config = context.loaded.value
        configure(level=config.log_level)
        return run(config)

    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    sys.exit(command_main(body, as_json=context.json))


@collector.group()
def config() -> None:
    """Check and show the configuration."""


@config.command("check")
@_json
@click.pass_obj
def config_check(context: CollectorContext, as_json: bool) -> None:
    """Validate every layer and every rule file; say what is wrong and where."""

    def body() -> None:
        from pgherd.collector.alerting.setup import inhibitions_of, routing_of
        from pgherd.collector.service import load_groups

        alerts = context.loaded.value.alerts
        routing_of(alerts)
        inhibitions_of(alerts)
        groups = load_groups(context.loaded.value)
        rules = sum(len(group.rules) for group in groups)
        if as_json or context.json:
            emit_json({"ok": True, "groups": len(groups), "rules": rules})
        else:
            click.echo(f"the configuration is valid; {rules} rules in {len(groups)} groups")

    sys.exit(command_main(body, as_json=as_json or context.json))


@config.command("show")
@click.option("--origin", is_flag=True, help="Say where each value comes from.")
@_json
@click.pass_obj
def config_show(context: CollectorContext, origin: bool, as_json: bool) -> None:
    """Print every setting as it is in force."""
    as_json = as_json or context.json

    def body() -> None:
        show_settings(context.loaded.show(), origin=origin, as_json=as_json)

    sys.exit(command_main(body, as_json=as_json))

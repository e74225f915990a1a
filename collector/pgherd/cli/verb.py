"""How a verb of `pgherd` is made: `--json` behind it too, errors rendered once, exit statuses kept."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Concatenate, ParamSpec, cast

import click

from pgherd.cli.main import CliContext
from pgherd.proto.errors import ConfigError
from pgherd.runtime.config import parse_duration_s
from pgherd.runtime.render import command_main, emit_json, table

P = ParamSpec("P")


def verb(body: Callable[Concatenate[CliContext, P], int | None]) -> Callable[P, None]:
    """Turn a function of the context into a click callback with `--json`.

    The body returns an exit status (None: 0) and raises PgherdErrors.
    """

    @click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
    @click.pass_context
    @functools.wraps(body)
    def callback(ctx: click.Context, /, as_json: bool, *args: P.args, **kwargs: P.kwargs) -> None:
        context: CliContext = ctx.obj
        context.json = context.json or as_json
        sys.exit(command_main(lambda: body(context, *args, **kwargs), as_json=context.json))

    return cast(Callable[P, None], callback)  # click gives it `as_json` by name


def show(context: CliContext, rows: Sequence[Mapping[str, Any]], columns: Sequence[tuple[str, str]]) -> None:
    """A listing: all members as JSON, or the named columns as a table."""
    if context.json:
        emit_json(list(rows))
    else:
        table(rows, columns)


def moment(unix_ns: int | None) -> str | None:
    """Wall time for people: UTC, to the second; None stays unknown."""
    return datetime.fromtimestamp(unix_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%SZ") if unix_ns else None


def duration_s(option: str, text: str) -> float:
    """Seconds of an option's duration. Raises ConfigError usage.invalid naming the option."""
    try:
        return parse_duration_s(text)
    except ValueError as error:
        raise ConfigError("usage.invalid", f"{option}: {error}") from error

"""`pgherd top`: one look (`--once`, `--json`, `--plain`) with the base install; the live screen with the extra `tui`."""

from __future__ import annotations

import os
import sys
import time

import click

from pgherd.cli.main import CliContext
from pgherd.cli.top.facts import Facts, look_at_herd, look_at_node
from pgherd.cli.top.fleet import fleet_page
from pgherd.cli.top.node import node_page
from pgherd.cli.top.page import Page
from pgherd.cli.top.plain import page_text
from pgherd.cli.verb import duration_s, verb
from pgherd.proto.errors import ConfigError, TransientError
from pgherd.runtime.render import emit_json, emit_json_line, render_error

_WIDTH_IN_A_PIPE = 160
_EVERY_MIN_S, _EVERY_MAX_S = 1.0, 60.0


@click.command()
@click.argument("node", required=False)
@click.option("--once", is_flag=True, help="Print one page and end.")
@click.option("--plain", is_flag=True, help="Print pages one below the other, without colour or screen control.")
@click.option("--every", default="2s", show_default=True, help="Time between two looks, 1s to 60s.")
@click.option("--filter", "text_filter", default="", help="Only nodes whose name, cluster, role, state or alerts contain this.")
@verb
def top(context: CliContext, node: str | None, once: bool, plain: bool, every: str, text_filter: str) -> int | None:
    """The herd now, or one NODE: what is slow, who blocks, how far behind, when is it full, is the backup good.

    The live screen needs the extra `tui` (pip install 'pgherd[tui]'); --once, --plain and --json don't. With --json and
    without --once every look is a line of its own.
    """
    every_s = duration_s("--every", every)
    if not _EVERY_MIN_S <= every_s <= _EVERY_MAX_S:
        raise ConfigError("usage.invalid", f"--every must lie between 1s and 60s, not {every}")
    if once:
        _print(context, _page(context, node, text_filter), plain=plain)
        return None
    if plain or context.json:
        return _keep_printing(context, node, text_filter, every_s, plain=plain)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError("usage.invalid", "the live screen needs a terminal", hint="use --once, --plain or --json")
    try:
        from pgherd.cli.top.screen import TopScreens
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "textual":
            raise
        raise ConfigError(
            "config.missing_extra",
            "the live screen needs the extra `tui`",
            hint="pip install 'pgherd[tui]', or use --once or --plain",
        ) from error

    def look(name: str | None) -> Facts:
        return look_at_herd(context.client) if name is None else look_at_node(context.client, name)

    if node is not None:
        look(node)  # a name that nobody has is told before the screen is taken
    return TopScreens(look, node=node, every_s=every_s, text_filter=text_filter).run()


def _page(context: CliContext, node: str | None, text_filter: str) -> Page:
    if node is None:
        return fleet_page(look_at_herd(context.client), text_filter)
    return node_page(look_at_node(context.client, node))


def _print(context: CliContext, page: Page, *, plain: bool) -> None:
    if context.json:
        emit_json(page.as_json())
        return
    from rich.console import Console

    console = Console(highlight=False, markup=False, width=_width(), no_color=True if plain else None)
    console.print(page_text(page, console.width), no_wrap=True, crop=False)


def _width() -> int | None:
    """None: the terminal's own; a pipe gets enough for whole lines, or COLUMNS."""
    if sys.stdout.isatty():
        return None
    columns = os.environ.get("COLUMNS", "")
    return int(columns) if columns.isdigit() and int(columns) >= 40 else _WIDTH_IN_A_PIPE


def _keep_printing(context: CliContext, node: str | None, text_filter: str, every_s: float, *, plain: bool) -> int:
    """Until Ctrl-C; a collector that doesn't answer now is said, and asked again."""
    while True:
        started_mono_s = time.monotonic()
        try:
            page = _page(context, node, text_filter)
        except TransientError as error:
            render_error(error, as_json=context.json)
        else:
            if context.json:
                emit_json_line(page.as_json())
            else:
                _print(context, page, plain=plain)
        time.sleep(max(0.0, every_s - (time.monotonic() - started_mono_s)))

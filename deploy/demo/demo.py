"""`make demo`: a herd on this machine, from the first sample to a restored backup with equal content.

On a terminal it shows the herd until Ctrl-C. `--for 60s` ends by itself, `--json` prints one summary; the exit
status is 0 only if every step truly happened. Nothing is left running and nothing is left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import signal
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # run as a script: its modules are siblings

from commands import end_orphans, measuring, survivors
from herd import Herd, herd
from rich.console import Console, Group, RenderableType
from rich.live import Live
from servers import pair, unmount
from story import Story
from view import picture

from pgherd.cli.client import Address, Client
from pgherd.cli.top.facts import look_at_herd, look_at_node
from pgherd.cli.top.fleet import fleet_page
from pgherd.cli.top.node import node_page
from pgherd.cli.top.plain import page_text
from pgherd.postgres.scratch import sweep, workspace
from pgherd.proto.errors import PgherdError
from pgherd.runtime.config import parse_duration_s
from pgherd.runtime.durable import is_locked
from pgherd.runtime.render import emit_json, render_error

PARENT = Path(tempfile.gettempdir()) / f"pgherd-demo-{os.geteuid()}"  # each OS user's own


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument(
        "--for", dest="for_s", type=parse_duration_s, metavar="60s", help="end by itself, after the story and this time"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="keep a picture of the view as it is at the end")
    parser.add_argument(
        "--top-picture", type=Path, metavar="FILE.svg", help="keep a picture of `pgherd top` while the four alerts fire"
    )
    parser.add_argument("--json", action="store_true", help="run unattended and print one JSON summary")
    return parser.parse_args()


def show(running: Herd, story: Story, until_mono_s: float | None, console: Console) -> None:
    """Tell the story in a thread of its own and redraw the view until the time is over or Ctrl-C."""
    teller = threading.Thread(target=story.tell, name="story", daemon=True)
    teller.start()
    with Live(console=console, auto_refresh=False) as live:
        while teller.is_alive() or until_mono_s is None or time.monotonic() < until_mono_s:
            live.update(picture(running, story), refresh=True)
            time.sleep(1.0)


def unattended(story: Story, until_mono_s: float, console: Console) -> None:
    """Tell the story, a line per step on stderr, then let the herd run until the time is over."""
    told = threading.Event()

    def tell() -> None:
        try:
            story.tell()
        finally:
            told.set()

    threading.Thread(target=tell, name="story", daemon=True).start()
    printed = 0
    while not (told.is_set() and printed == len(story.steps)):
        told.wait(0.2)
        while printed < len(story.steps) and story.steps[printed].ok is not None:
            step = story.steps[printed]
            console.print(
                f"{'ok  ' if step.ok else 'FAIL'} {step.name} ({step.seconds:.1f} s) {step.error}",
                highlight=False,
                markup=False,
            )
            printed += 1
    while time.monotonic() < until_mono_s:
        time.sleep(0.2)


def forget_parent() -> None:
    """Remove the folder of all demos' workspaces, unless another demo of ours runs."""
    with contextlib.suppress(OSError):
        PARENT.rmdir()


def keep_picture(running: Herd, story: Story, file: Path) -> None:
    """The view as SVG, for the README."""
    write_svg(picture(running, story), "make demo", 110, file)


def keep_top(running: Herd, file: Path) -> None:
    """Both pages of `pgherd top` as they are now, as SVG."""
    with Client(Address("", running.socket, None)) as client:
        pages = [fleet_page(look_at_herd(client)), node_page(look_at_node(client, "primary"))]
    write_svg(Group(*(page_text(page, 100) for page in pages)), "pgherd top", 100, file)


def write_svg(drawn: RenderableType, title: str, width: int, file: Path) -> None:
    """What a terminal would show, as a picture that fetches nothing."""
    recorder = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="standard")
    recorder.print(drawn)
    svg = recorder.export_svg(title=title)
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # it would fetch fonts from elsewhere
    file.write_text(svg.replace("Fira Code", "DejaVu Sans Mono"), encoding="utf-8")


def run(options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """The whole demo; returns its summary and whether everything happened."""
    started_mono_s = time.monotonic()
    console = Console(stderr=True)
    with contextlib.ExitStack() as stack:
        stack.callback(forget_parent)
        end_orphans(PARENT)
        for volume in PARENT.glob("s-*/log"):  # of a demo that was killed with -9, or of one that runs: that one is busy
            if not is_locked(volume.parent.with_suffix(".lock")) and volume.is_mount():
                unmount(volume)
        sweep(PARENT)
        directory = stack.enter_context(workspace(PARENT))
        console.print("starting PostgreSQL …", style="dim")
        servers = stack.enter_context(pair(directory))
        running = stack.enter_context(herd(directory, servers))
        story = Story(running, partial(keep_top, running, options.top_picture) if options.top_picture else lambda: None)
        with measuring(running):
            story.begin()
            if story.ok:
                until_mono_s = started_mono_s + options.for_s if options.for_s else None
                if options.json or not console.is_terminal:
                    unattended(story, until_mono_s or started_mono_s, console)
                else:
                    with contextlib.suppress(KeyboardInterrupt):
                        show(running, story, until_mono_s, console)
            processes = [service.figures() for service in running.services]
            if options.picture:
                keep_picture(running, story, options.picture)
        if not story.ok:
            for service in running.services:
                console.print(f"--- {service.name}\n{service.tail()}", highlight=False, markup=False)
    left = survivors(directory)
    with story.step("nothing is left running or behind") as step:
        step.figures = {"processes": left, "files": [str(directory)] if directory.exists() else []}
        step.ok = not left and not directory.exists()
        if not step.ok:
            raise OSError(f"left behind: {step.figures}")
    summary = {
        "ok": story.ok,
        "seconds": round(time.monotonic() - started_mono_s, 1),
        "postgresql": servers.binaries.major,
        "steps": [step.as_dict() for step in story.steps],
        "processes": processes,
    }
    return summary, story.ok


_interrupted = threading.Event()


def interrupt(_number: int, _frame: object) -> None:
    _interrupted.set()
    raise KeyboardInterrupt


def main() -> int:
    options = arguments()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a closed terminal ends the herd too
        signal.signal(number, interrupt)
    try:
        summary, ok = run(options)
    except PgherdError as error:
        if _interrupted.is_set():  # Ctrl-C reached a child of the terminal's group first, and its end is what we saw
            print("stopped", file=sys.stderr)
            return 130
        render_error(error, as_json=options.json)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    if options.json:
        emit_json(summary)
    else:
        for step in summary["steps"]:
            print(f"{'ok  ' if step['ok'] else 'FAIL'} {step['name']} ({step['seconds']:.1f} s) {step.get('error', '')}")
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())

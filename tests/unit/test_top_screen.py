"""The live screen of `pgherd top`, driven as a person would, at 80×24."""

from __future__ import annotations

import asyncio
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import OptionList, Static
from unit.test_top_pages import HEALTHY, facts, node, rows

from pgherd.cli.top.facts import Facts
from pgherd.cli.top.screen import FleetScreen, HelpScreen, NodeScreen, TopScreens
from pgherd.proto.codes import Exit
from pgherd.proto.errors import TransientError

Story = Callable[[TopScreens, Pilot[int]], Coroutine[Any, Any, None]]


class Collector:
    """What is looked at: answers from memory, can hang and can fail."""

    def __init__(self) -> None:
        self.looks: list[str | None] = []
        self.trouble: TransientError | None = None
        self.gate = threading.Event()
        self.gate.set()

    def look(self, name: str | None) -> Facts:
        assert self.gate.wait(20)
        self.looks.append(name)
        if self.trouble is not None:
            raise self.trouble
        if name is not None:
            return facts(node(name.split("/")[1]), answers=HEALTHY)
        return facts(node(), node("db2"), node("db3", condition="down"), answers=HEALTHY | rows("db2", disk=0.9))


def play(story: Story, collector: Collector, *, size: tuple[int, int] = (80, 24), every_s: float = 1.0) -> None:
    async def run() -> None:
        app = TopScreens(collector.look, every_s=every_s)
        async with app.run_test(size=size) as pilot:
            await story(app, pilot)

    asyncio.run(run())


async def until(pilot: Pilot[int], condition: Callable[[], object], what: str) -> None:
    for _ in range(500):
        await pilot.pause(0.02)
        if condition():
            return
    pytest.fail(f"not seen: {what}")


def lines(app: TopScreens) -> list[str]:
    nodes = app.screen.query_one("#nodes", OptionList)
    return [str(option.prompt) for option in nodes.options]


def shown(app: TopScreens, name: str) -> str:
    return str(app.screen.query_one(f"#{name}", Static).content)


def test_from_the_herd_to_a_node_and_back() -> None:
    async def story(app: TopScreens, pilot: Pilot[int]) -> None:
        await until(pilot, lambda: isinstance(app.screen, FleetScreen) and len(lines(app)) == 3, "three nodes")
        assert lines(app)[0].startswith("■ down")
        assert all(len(line) <= 80 for line in lines(app))
        await pilot.press("down", "enter")
        await until(pilot, lambda: isinstance(app.screen, NodeScreen) and "DISK" in shown(app, "page"), "the node page")
        assert "main/" in shown(app, "page")
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(app.screen, FleetScreen), "the herd again")

    play(story, Collector())


def test_the_choice_stays_on_its_node_over_looks() -> None:
    collector = Collector()

    async def story(app: TopScreens, pilot: Pilot[int]) -> None:
        await until(pilot, lambda: len(lines(app)) == 3, "three nodes")
        await pilot.press("end")
        before = app.screen.query_one("#nodes", OptionList).highlighted
        seen = len(collector.looks)
        await until(pilot, lambda: len(collector.looks) > seen + 1, "more looks")
        assert app.screen.query_one("#nodes", OptionList).highlighted == before == 2

    play(story, collector)


def test_a_filter_narrows_and_escape_drops_it() -> None:
    async def story(app: TopScreens, pilot: Pilot[int]) -> None:
        await until(pilot, lambda: len(lines(app)) == 3, "three nodes")
        await pilot.press("slash", "d", "b", "2", "enter")
        await until(pilot, lambda: len(lines(app)) == 1, "one node")
        assert "1 of 3" in shown(app, "notes")
        await pilot.press("escape")
        await until(pilot, lambda: len(lines(app)) == 3, "all nodes")

    play(story, Collector())


def test_space_pauses_and_goes_on() -> None:
    collector = Collector()

    async def story(app: TopScreens, pilot: Pilot[int]) -> None:
        await until(pilot, lambda: len(lines(app)) == 3, "three nodes")
        await pilot.press("space")
        await until(pilot, lambda: "paused" in shown(app, "status"), "the word paused")
        await until(pilot, lambda: "paused, 2 s" in shown(app, "status"), "two seconds of pause")
        seen = len(collector.looks)
        await pilot.press("space")
        await until(pilot, lambda: len(collector.looks) > seen, "a look after the pause")

    play(story, collector)


def test_a_collector_that_hangs_stops_no_key_and_an_error_says_how_old_the_picture_is() -> None:
    collector = Collector()

    async def story(app: TopScreens, pilot: Pilot[int]) -> None:
        await until(pilot, lambda: len(lines(app)) == 3, "three nodes")
        collector.gate.clear()
        seen = len(collector.looks)
        await until(pilot, lambda: getattr(app.screen, "_looking", False), "a look that hangs")
        await pilot.press("question_mark")
        await until(pilot, lambda: isinstance(app.screen, HelpScreen), "the help")
        await pilot.press("escape")
        collector.trouble = TransientError("peer.unreachable", "no collector answers")
        collector.gate.set()
        await until(pilot, lambda: "no collector answers" in shown(app, "status"), "the trouble")
        assert len(collector.looks) > seen
        assert "s old" in shown(app, "status")
        assert len(lines(app)) == 3  # the last picture stays, said to be old

    play(story, collector)


def test_the_pace_stays_between_its_ends() -> None:
    async def story(app: TopScreens, pilot: Pilot[int]) -> None:
        await pilot.press(*["minus"] * 9)
        assert app.every_s == 60.0
        await pilot.press(*["plus"] * 9)
        assert app.every_s == 1.0

    play(story, Collector())


def test_without_a_terminal_it_says_what_to_use_and_without_a_collector_where_it_looked(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "pgherd.cli.main", "--socket", str(tmp_path / "none"), "top"]
    finished = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert finished.returncode == Exit.USAGE
    assert "--once" in finished.stderr
    finished = subprocess.run([*argv, "--once"], capture_output=True, text=True)
    assert finished.returncode == Exit.UNREACHABLE
    assert str(tmp_path / "none") in finished.stderr


def test_without_the_extra_the_screen_is_refused_and_plain_pages_are_not(tmp_path: Path) -> None:
    """A base install has no textual: the module is hidden from the child."""
    hidden = tmp_path / "textual"
    hidden.mkdir()
    (hidden / "__init__.py").write_text("raise ModuleNotFoundError('no textual here', name='textual')\n")
    controller, terminal = pty.openpty()
    try:
        argv = [sys.executable, "-m", "pgherd.cli.main", "--socket", str(tmp_path / "none"), "top"]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        finished = subprocess.run(
            argv, stdin=terminal, stdout=terminal, stderr=subprocess.PIPE, text=True, env=environment, timeout=60
        )
        assert finished.returncode == Exit.USAGE
        assert "pgherd[tui]" in finished.stderr
        finished = subprocess.run([*argv, "--once"], capture_output=True, text=True, env=environment, timeout=60)
        assert "tui" not in finished.stderr
    finally:
        os.close(controller)
        os.close(terminal)

"""The live screen (Textual): a fleet page to move on and a node page to read, kept fresh by a look every few seconds.

A look happens on a thread: a collector that hangs never stops a key. What is shown after a look that failed is the last
page, said to be old. Only this module knows Textual.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen, Screen
from textual.widgets import Footer, Input, OptionList, Static
from textual.widgets.option_list import Option
from textual.worker import get_current_worker

from pgherd.cli.top.facts import Facts
from pgherd.cli.top.fleet import COLUMNS, fleet_page
from pgherd.cli.top.node import node_page
from pgherd.cli.top.page import Cell, Grade, Page
from pgherd.cli.top.plain import STYLES, line_text, page_text
from pgherd.proto.errors import PgherdError
from pgherd.proto.printable import printable

Look = Callable[[str | None], Facts]

_EVERY_S = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_HELP = """\
 Enter   look at the node        Esc   back to the herd
 ↑ ↓     move, scroll            /     filter nodes
 Space   pause, go on            r     look again now
 + -     look more, less often   q     quit

 ● ok   ▲ warning   ■ critical   ? unknown (never 0, never ok)

 DISK     fullest volume that the server writes to
 CONN     client backends of the slots that ordinary roles can take
 P99      of statements, estimated from pg_stat_activity
 LAG      of a standby behind its primary, less a configured delay
 TX/S     commits and rollbacks of the last minute, pgherd's own looks included (some 15 a second)
 BACKUP   age of the last good one
"""


class HelpScreen(ModalScreen[None]):
    """What the keys and columns mean."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,question_mark,enter,space", "dismiss", "Close")]
    DEFAULT_CSS = (
        "HelpScreen { align: center middle; } HelpScreen > Static { width: auto; border: round $primary; padding: 0 1; }"
    )

    def compose(self) -> ComposeResult:
        yield Static(Text(_HELP))


class _LookingScreen(Screen[None]):
    """Looks every `every_s`, shows each page, says when the last one is old. Subclasses say what and how."""

    def __init__(self, look: Look) -> None:
        super().__init__()
        self._look = look
        self._due_mono_s = 0.0
        self._looking = False
        self._taken_mono_s: float | None = None
        self._trouble = ""

    def on_mount(self) -> None:
        self.set_interval(0.2, self._tick)
        self._tick()

    def _tick(self) -> None:
        app = self.app
        assert isinstance(app, TopScreens)
        self._say()
        if self._looking or not self.is_current or time.monotonic() < self._due_mono_s or (app.paused and self._taken_mono_s):
            return
        self._looking = True
        self._due_mono_s = time.monotonic() + app.every_s
        self.run_worker(self._fetch, thread=True, exit_on_error=True)

    def _fetch(self) -> None:
        worker = get_current_worker()
        try:
            facts, trouble = self._look(self.subject()), ""
        except PgherdError as error:
            facts, trouble = None, error.message
        if not worker.is_cancelled:
            self.app.call_from_thread(self._arrived, facts, trouble)

    def _arrived(self, facts: Facts | None, trouble: str) -> None:
        self._looking = False
        self._trouble = trouble
        if facts is not None:
            self._taken_mono_s = time.monotonic()
            self.show_facts(facts)
        self._say()

    def _say(self) -> None:
        app = self.app
        assert isinstance(app, TopScreens)
        age_s = time.monotonic() - self._taken_mono_s if self._taken_mono_s is not None else None
        if self._trouble:
            old = f"what you see is {age_s:.0f} s old" if age_s is not None else "nothing was seen yet"
            line = Text(f"? {old}: {self._trouble}", STYLES[Grade.CRITICAL])
        elif app.paused:
            line = Text(f"paused, {age_s or 0:.0f} s old; Space goes on", STYLES[Grade.WARNING])
        else:
            line = Text(f"every {app.every_s:g} s", "dim")
        self.query_one("#status", Static).update(line)

    def look_now(self) -> None:
        """Look again without waiting."""
        self._due_mono_s = 0.0

    def subject(self) -> str | None:
        """The node to look at, None for the herd."""
        return None

    def show_facts(self, facts: Facts) -> None:
        """Draw what was seen."""
        raise NotImplementedError


class FleetScreen(_LookingScreen):
    """One line a node, the worst first."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("slash", "filter", "Filter"),
        Binding("escape", "no_filter", "All", show=False),
    ]

    def __init__(self, look: Look, text_filter: str) -> None:
        super().__init__(look)
        self._filter = text_filter
        self._facts: Facts | None = None

    def compose(self) -> ComposeResult:
        yield Static(id="title")
        yield Static(id="heading")
        yield OptionList(id="nodes")
        yield Static(id="notes")
        yield Input(self._filter, placeholder="name, cluster, role, state or alert; Enter keeps it, Esc drops it", id="filter")
        yield Static(id="status")
        yield Footer()

    def on_mount(self) -> None:
        self.query_one("#filter").display = False
        self.query_one("#nodes").focus()
        super().on_mount()

    def on_resize(self) -> None:
        self._draw()

    def show_facts(self, facts: Facts) -> None:
        self._facts = facts
        self._draw()

    def _draw(self) -> None:
        if self._facts is None:
            return
        page = fleet_page(self._facts, self._filter)
        section = page.sections[0]
        width = max(40, self.size.width - 2)  # the list's scrollbar
        self.query_one("#title", Static).update(page_text(Page(page.title, (), page.taken_unix_ns), self.size.width))
        headings = {column.key: Cell(column.heading) for column in COLUMNS}
        self.query_one("#heading", Static).update(line_text(headings.get, COLUMNS, width))
        self.query_one("#notes", Static).update(Text("\n").join(Text(printable(note)) for note in section.notes[:5]))
        nodes = self.query_one("#nodes", OptionList)
        chosen = _chosen(nodes)
        nodes.set_options(
            Option(line_text(row.get, COLUMNS, width), id=f"{row['cluster'].value}/{row['node'].value}") for row in section.rows
        )
        if section.rows:
            ids = [option.id for option in nodes.options]
            nodes.highlighted = ids.index(chosen) if chosen in ids else 0

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        if event.option_id:
            self.app.push_screen(NodeScreen(self._look, event.option_id))

    def action_filter(self) -> None:
        box = self.query_one("#filter", Input)
        box.display = True
        box.focus()

    def action_no_filter(self) -> None:
        self.query_one("#filter", Input).value = ""
        self._close_filter()

    def on_input_changed(self, event: Input.Changed) -> None:
        self._filter = event.value
        self._draw()

    def on_input_submitted(self, _event: Input.Submitted) -> None:
        self._close_filter()

    def _close_filter(self) -> None:
        self.query_one("#filter").display = False
        self.query_one("#nodes").focus()


def _chosen(nodes: OptionList) -> str | None:
    if nodes.highlighted is None:
        return None
    return nodes.get_option_at_index(nodes.highlighted).id


class NodeScreen(_LookingScreen):
    """One node, section below section."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,backspace", "back", "Herd")]

    def __init__(self, look: Look, name: str) -> None:
        super().__init__(look)
        self._name = name
        self._page: Page | None = None

    def compose(self) -> ComposeResult:
        with VerticalScroll():
            yield Static(id="page")
        yield Static(id="status")
        yield Footer()

    def subject(self) -> str | None:
        return self._name

    def on_resize(self) -> None:
        self._draw()

    def show_facts(self, facts: Facts) -> None:
        self._page = node_page(facts)
        self._draw()

    def _draw(self) -> None:
        if self._page is not None:
            self.query_one("#page", Static).update(page_text(self._page, max(40, self.size.width - 2)))

    def action_back(self) -> None:
        app = self.app
        assert isinstance(app, TopScreens)
        app.show_herd()


class TopScreens(App[int]):
    """The screens, and what they share: the pace and the pause."""

    CSS = """
    #nodes { height: 1fr; border: none; padding: 0; background: transparent; }
    #heading { color: $text-muted; }
    #status, #notes, #title, #heading { height: auto; }
    """
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "pause", "Pause"),
        Binding("question_mark", "help", "Help"),
        Binding("r", "look_now", "Look now", show=False),
        Binding("plus,equals_sign", "pace(-1)", "Faster", show=False),
        Binding("minus", "pace(1)", "Slower", show=False),
        Binding("q", "quit", "Quit"),
    ]

    def __init__(self, look: Look, *, node: str | None = None, every_s: float = 2.0, text_filter: str = "") -> None:
        super().__init__(ansi_color=True)
        self._look = look
        self._node = node
        self._text_filter = text_filter
        self.every_s = every_s
        self.paused = False

    def on_mount(self) -> None:
        self.push_screen(
            FleetScreen(self._look, self._text_filter) if self._node is None else NodeScreen(self._look, self._node)
        )

    def show_herd(self) -> None:
        """Back from a node: to the fleet page it came from, or to a new one."""
        if any(isinstance(screen, FleetScreen) for screen in self.screen_stack):
            self.pop_screen()
        else:
            self.switch_screen(FleetScreen(self._look, self._text_filter))

    def action_pause(self) -> None:
        self.paused = not self.paused

    def action_help(self) -> None:
        self.push_screen(HelpScreen())

    def action_look_now(self) -> None:
        screen = self.screen
        if isinstance(screen, _LookingScreen):
            screen.look_now()

    def action_pace(self, direction: int) -> None:
        at = min(range(len(_EVERY_S)), key=lambda i: abs(_EVERY_S[i] - self.every_s))
        self.every_s = _EVERY_S[max(0, min(len(_EVERY_S) - 1, at + direction))]
        self.action_look_now()

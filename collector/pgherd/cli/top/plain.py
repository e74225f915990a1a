"""Pages as text: what `--once` and `--plain` print, and what the screen shows. 80 columns are enough.

The same lines carry colour on a terminal and none with NO_COLOR, in a pipe or with --plain; shapes and words stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Final

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from pgherd.cli.top.page import Cell, Column, Grade, Page, Section
from pgherd.proto.printable import printable

STYLES: Final = {
    Grade.PLAIN: "",
    Grade.GOOD: "green",
    Grade.UNKNOWN: "magenta",
    Grade.WARNING: "yellow",
    Grade.CRITICAL: "bold red",
}


def page_text(page: Page, width: int) -> Text:
    """The whole page, lines no wider than `width` characters."""
    at = datetime.fromtimestamp(page.taken_unix_ns / 1e9, UTC).strftime("%H:%M:%SZ")
    head = Text(_cut(printable(page.title), width - len(at) - 1), "bold")
    head.append(" " * max(1, width - head.cell_len - len(at)))
    head.append(at, "dim")
    return Text("\n").join([head, *(line for section in page.sections for line in _section(section, width))])


def _section(section: Section, width: int) -> Iterable[Text]:
    yield Text()
    title = Text(section.title.upper(), "bold")
    if section.grade >= Grade.WARNING:  # what is unknown stands in its cell: much may be, for good reasons
        title.append(f"  {section.grade.shape} {section.grade.word}", STYLES[section.grade])
    yield title
    if section.rows:
        yield Text(_cut(" ".join(_aligned(column.heading, column, 0) for column in section.columns), width), "dim")
    for row in section.rows:
        yield line_text(row.get, section.columns, width)
    for note in section.notes:
        yield Text(_cut(printable(note), width), _note_style(note))


def line_text(cell_of: Callable[[str], Cell | None], columns: Iterable[Column], width: int) -> Text:
    """One row of a table."""
    line = Text()
    for column in columns:
        cell = cell_of(column.key) or Cell()
        if line:
            line.append(" ")
        left = width - line.cell_len
        line.append(_aligned(printable(cell.shown), column, left), STYLES[cell.grade])
    line.truncate(width)
    return line


def _aligned(text: str, column: Column, rest: int) -> str:
    if not column.width:
        return _cut(text, rest) if rest else text
    if cell_len(text) > column.width:
        return _cut(text, column.width)
    return " " * (column.width - cell_len(text)) + text if column.right else set_cell_size(text, column.width)


def _cut(text: str, width: int) -> str:
    """At most `width` characters wide; what is cut says so."""
    if cell_len(text) <= width:
        return text
    return set_cell_size(text, max(0, width - 1)) + "…"


def _note_style(note: str) -> str:
    for grade, style in STYLES.items():
        if grade.shape and note.startswith(grade.shape):
            return style
    return "dim"

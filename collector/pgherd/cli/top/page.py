"""A page of `pgherd top` before anybody draws it: sections of cells, each with a text, a value and a judgement. Pure.

Never broken: a value that isn't known is shown as unknown, never as 0 and never as good; whatever is judged worse than
good says so in a shape and, in its row, in a word, so that no colour is needed to read it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any


class Grade(IntEnum):
    """How a value is judged; the larger the more it wants to be looked at first."""

    PLAIN = 0  # isn't judged
    GOOD = 1
    UNKNOWN = 2
    WARNING = 3
    CRITICAL = 4

    @property
    def shape(self) -> str:
        return _SHAPES[self]

    @property
    def word(self) -> str:
        return _WORDS[self]


_SHAPES = {Grade.PLAIN: "", Grade.GOOD: "●", Grade.UNKNOWN: "?", Grade.WARNING: "▲", Grade.CRITICAL: "■"}
_WORDS = {Grade.PLAIN: "", Grade.GOOD: "ok", Grade.UNKNOWN: "unknown", Grade.WARNING: "warning", Grade.CRITICAL: "critical"}


@dataclass(frozen=True, slots=True)
class Cell:
    """One value: as people read it, as programs read it (None: unknown or none), and how it is judged.

    `is_state`: the text is a word for the judgement itself, and always stands beside its shape.
    """

    text: str = ""
    value: Any = None
    grade: Grade = Grade.PLAIN
    is_state: bool = False

    @property
    def shown(self) -> str:
        """The text, with its shape where it wants to be noticed."""
        if self.is_state:
            return f"{self.grade.shape} {self.text}"
        return f"{self.grade.shape}{self.text}" if self.grade in (Grade.WARNING, Grade.CRITICAL) else self.text


UNKNOWN = Cell("?", None, Grade.UNKNOWN)
NONE = Cell("–")  # there can be none here: a primary's lag


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its member in JSON, its heading, whether numbers stand right-aligned, and its width in characters (0: the rest)."""

    key: str
    heading: str
    right: bool = False
    width: int = 0


@dataclass(frozen=True, slots=True)
class Section:
    """A titled table; `notes` stand below it: what is missing, and why."""

    key: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Mapping[str, Cell], ...]
    notes: tuple[str, ...] = ()

    @property
    def grade(self) -> Grade:
        """The worst judgement in it."""
        return max((cell.grade for row in self.rows for cell in row.values()), default=Grade.PLAIN)

    def as_json(self) -> dict[str, Any]:
        rows = [{key: cell.value for key, cell in row.items()} | _worst(row) for row in self.rows]
        return {"title": self.title, "grade": self.grade.word or None, "rows": rows, "notes": list(self.notes)}


def _worst(row: Mapping[str, Cell]) -> dict[str, str]:
    judged = {key: cell.grade.word for key, cell in row.items() if cell.grade is not Grade.PLAIN}
    return {"grades": judged} if judged else {}  # type: ignore[dict-item]


@dataclass(frozen=True, slots=True)
class Page:
    """What is drawn: a heading, its sections in reading order, and when it was so (unix nanoseconds)."""

    title: str
    sections: tuple[Section, ...]
    taken_unix_ns: int
    facts: Mapping[str, Cell] = field(default_factory=dict)

    @property
    def grade(self) -> Grade:
        return max((section.grade for section in self.sections), default=Grade.PLAIN)

    def as_json(self) -> dict[str, Any]:
        """A stable document: sections by key."""
        return {
            "title": self.title,
            "taken_unix_ns": self.taken_unix_ns,
            "grade": self.grade.word or None,
            **{key: cell.value for key, cell in self.facts.items()},
            "sections": {section.key: section.as_json() for section in self.sections},
        }


# ---- judging ------------------------------------------------------------------------------------


def judged(value: float | None, text: str, *, warning: float, critical: float = math.inf) -> Cell:
    """A value for which more is worse: above `warning` or `critical`. Unknown stays unknown."""
    if value is None or math.isnan(value):
        return UNKNOWN
    grade = Grade.CRITICAL if value > critical else Grade.WARNING if value > warning else Grade.GOOD
    return Cell(text, value, grade)


def plain(value: float | None, text: str) -> Cell:
    """A value that isn't judged."""
    return UNKNOWN if value is None else Cell(text, value)


# ---- numbers for people -------------------------------------------------------------------------


def percent(ratio: float | None) -> str:
    """0.8123 → "81%"; what isn't quite full never says 100."""
    if ratio is None:
        return "?"
    return f"{math.floor(ratio * 100 + (0 if ratio < 1 else 1e-9)):d}%"


def duration(seconds: float | None) -> str:
    """Two significant figures or so, in at most six characters: 0.00023 → "230µs", 75 → "75s", 5400 → "1.5h"."""
    if seconds is None:
        return "?"
    if seconds == 0:
        return "0s"
    if seconds < 0:
        return "-" + duration(-seconds)
    for limit, unit_s, unit in ((1e-3, 1e-6, "µs"), (1, 1e-3, "ms"), (120, 1, "s"), (7200, 60, "m"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return _short(seconds / unit_s) + unit
    return _short(seconds / 86400) + "d"


def _short(number: float) -> str:
    if number == 0:
        return "0"
    if number < 10:
        return f"{number:.2g}" if number < 1 else f"{number:.1f}".removesuffix(".0")
    return f"{number:.0f}"


def rate(per_second: float | None) -> str:
    """12345 → "12.3k"."""
    if per_second is None:
        return "?"
    for limit, unit in ((1e3, ""), (1e6, "k"), (1e9, "M")):
        if per_second < limit:
            scaled = per_second / (limit / 1e3)
            return (f"{scaled:.1f}" if unit or scaled < 10 else f"{scaled:.0f}").removesuffix(".0") + unit
    return f"{per_second / 1e9:.1f}G"


def size(count: float | None) -> str:
    """1536 → "1.5K", binary."""
    if count is None:
        return "?"
    for unit in ("B", "K", "M", "G", "T"):
        if abs(count) < 1024:
            return f"{count:.0f}{unit}" if unit == "B" or count >= 100 else f"{count:.1f}{unit}"
        count /= 1024
    return f"{count:.1f}P"


def counted(number: float, noun: str) -> str:
    """1 alert, 2 alerts."""
    return f"{number:.0f} {noun}" if number == 1 else f"{number:.0f} {noun}s"


def first(rows: Sequence[Any]) -> float | None:
    """The value of the only row, or the largest of several."""
    return max((row.value for row in rows), default=None)

"""Builders for alert tests: one per frozen type, sane defaults, change one fact."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from pgherd.alerts.knowledge import Knowledge
from pgherd.alerts.model import Group, QueryRow, Rule
from pgherd.alerts.state import Moment
from pgherd.alerts.template import compile_template

SECOND_NS = 1_000_000_000
START_UNIX_NS = 1_760_000_000 * SECOND_NS


def rule(
    alert: str = "High",
    *,
    expr: str = "x > 1",
    for_s: float = 0,
    keep_firing_for_s: float = 0,
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
    group: str = "g",
) -> Rule:
    return Rule(
        group=group,
        alert=alert,
        expr=expr,
        for_ns=int(for_s * SECOND_NS),
        keep_firing_for_ns=int(keep_firing_for_s * SECOND_NS),
        labels={name: compile_template(text, where=name) for name, text in (labels or {}).items()},
        annotations={name: compile_template(text, where=name) for name, text in (annotations or {}).items()},
        origin="rules.yaml:3",
    )


def group(*rules: Rule, name: str = "g", interval_s: float = 15, limit: int = 0) -> Group:
    return Group(name=name, interval_ns=int(interval_s * SECOND_NS), rules=rules, limit=limit, source="rules.yaml")


def row(value: float = 2.0, **labels: str) -> QueryRow:
    return QueryRow(labels or {"instance": "a:5432"}, value)


def moment(at_s: float, *, elapsed_s: float | None = None, gap_max_s: float = 60) -> Moment:
    """`at_s` seconds after the start of the test's time."""
    return Moment(
        unix_ns=START_UNIX_NS + int(at_s * SECOND_NS),
        gap_max_ns=int(gap_max_s * SECOND_NS),
        elapsed_ns=None if elapsed_s is None else int(elapsed_s * SECOND_NS),
    )


def everything_known(_labels: Mapping[str, str]) -> bool:
    return True


def nothing_known(_labels: Mapping[str, str]) -> bool:
    return False


@dataclass
class TestClock:
    """Both clocks, moved by hand; the wall clock may also be set."""

    __test__ = False

    wall_s: float = START_UNIX_NS / SECOND_NS
    mono: float = 1000.0

    def wall_unix_ns(self) -> int:
        return int(self.wall_s * SECOND_NS)

    def mono_s(self) -> float:
        return self.mono

    def advance(self, seconds: float) -> None:
        self.wall_s += seconds
        self.mono += seconds


@dataclass
class Answers:
    """A query function whose answer is set by hand: a vector, or an exception to raise."""

    vectors: dict[str, Sequence[tuple[Mapping[str, str], float]] | Exception] = field(default_factory=dict)
    asked: list[tuple[str, int]] = field(default_factory=list)

    def __call__(self, expr: str, at_ms: int) -> Sequence[tuple[Mapping[str, str], float]]:
        self.asked.append((expr, at_ms))
        answer = self.vectors.get(expr, [])
        if isinstance(answer, Exception):
            raise answer
        return answer


def no_facts(_at_ms: int) -> Knowledge:
    """Facts of a herd in which nothing is watched: everything counts as known."""
    return Knowledge((), frozenset(), frozenset())


Facts = Callable[[int], Knowledge]

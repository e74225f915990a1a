"""A series source in memory: the honest double behind PromQL's ports, without a store.

It keeps what it was given (stale markers included), answers closed ranges as the port says and records what it
was asked, so that tests can check the engine's fetches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pgherd.proto.selectors import Matcher, MatchOp
from pgherd.storage.series.patterns import full_matches


@dataclass(frozen=True, slots=True, eq=False)
class MemoryWindow:
    """One series, or the part of it inside a range."""

    labels: Mapping[str, str]
    times_ms: NDArray[np.int64]
    values: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class MemoryMetadata:
    kind: str
    help: str
    unit: str = ""


@dataclass(slots=True)
class MemorySeries:
    """Series added by `add`, selected by scanning them all."""

    windows: list[MemoryWindow] = field(default_factory=list)
    families: dict[str, MemoryMetadata] = field(default_factory=dict)
    asked: list[tuple[tuple[Matcher, ...], int, int]] = field(default_factory=list)

    def add(self, labels: Mapping[str, str], samples: Iterable[tuple[int, float]]) -> None:
        """Add one series of (milliseconds, value) in ascending order."""
        pairs = list(samples)
        self.add_arrays(
            labels, np.array([t for t, _ in pairs], dtype=np.int64), np.array([v for _, v in pairs], dtype=np.float64)
        )

    def add_arrays(self, labels: Mapping[str, str], times_ms: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        """Add one series; several may share one array of times."""
        if not bool((np.diff(times_ms) > 0).all()):
            raise ValueError("times must ascend")
        self.windows.append(MemoryWindow(dict(labels), times_ms, values))

    def select(self, matchers: Sequence[Matcher], start_ms: int, end_ms: int) -> Sequence[MemoryWindow]:
        self.asked.append((tuple(matchers), start_ms, end_ms))
        found = []
        for window in self.windows:
            inside = (window.times_ms >= start_ms) & (window.times_ms <= end_ms)
            if inside.any() and all(matches(matcher, window.labels) for matcher in matchers):
                found.append(MemoryWindow(window.labels, window.times_ms[inside], window.values[inside]))
        return found

    def label_names(self, matchers: Sequence[Matcher], start_ms: int, end_ms: int) -> Sequence[str]:
        return sorted({name for labels in self.series(matchers, start_ms, end_ms) for name in labels})

    def label_values(self, name: str, matchers: Sequence[Matcher], start_ms: int, end_ms: int) -> Sequence[str]:
        return sorted({labels[name] for labels in self.series(matchers, start_ms, end_ms) if name in labels})

    def series(self, matchers: Sequence[Matcher], start_ms: int, end_ms: int) -> Sequence[Mapping[str, str]]:
        return [window.labels for window in self.select(matchers, start_ms, end_ms)]

    def metadata(self) -> Mapping[str, MemoryMetadata]:
        return self.families


def matches(matcher: Matcher, labels: Mapping[str, str]) -> bool:
    """Whether a label set satisfies one matcher; a missing label counts as empty."""
    value = labels.get(matcher.name, "")
    match matcher.op:
        case MatchOp.EQUAL:
            return value == matcher.value
        case MatchOp.NOT_EQUAL:
            return value != matcher.value
        case MatchOp.REGEX:
            return bool(full_matches(matcher.value, [value])[0])
        case MatchOp.NOT_REGEX:
            return not full_matches(matcher.value, [value])[0]

"""Series that rules write: seen by the next rule at once, and stored without making evaluation wait.

`RecordedSeries` is a source for the engine in front of the series store. It holds the newest sample of each
recorded series until the store has it: a rule sees at its own instant what an earlier one recorded, and goes on
seeing it while the disk is full. Overflow rule: one sample a series; an older one that couldn't be stored is a gap.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from pgherd.alerts.recording import ALERTS, ALERTS_FOR_STATE, Labels
from pgherd.promql.source import SeriesSource, SeriesWindow
from pgherd.proto.errors import PgherdError
from pgherd.proto.samples import Metric, MetricKind
from pgherd.proto.selectors import NAME_LABEL, Matcher, MatchOp
from pgherd.runtime.logging import get_logger
from pgherd.storage.series.batch import Batch, SeriesLayout, Window
from pgherd.storage.series.patterns import full_matches

_log = get_logger(__name__)

_METRICS = (
    Metric(ALERTS, MetricKind.GAUGE, "1 while an alert is in the state of its label alertstate"),
    Metric(ALERTS_FOR_STATE, MetricKind.GAUGE, "Since when an alert is active, Unix time", "s"),
)


@dataclass(frozen=True, slots=True)
class Point:
    """One sample of one recorded series; a stale marker ends it."""

    labels: Labels
    at_ms: int
    value: float


class RecordedSeries:
    """See the module. Thread-safe."""

    def __init__(self, source: SeriesSource, append: Callable[[Batch], Future[Any]]) -> None:
        """`append` is SeriesStore.append."""
        self._source = source
        self._append = append
        self._lock = threading.Lock()
        self._newest: dict[str, dict[Labels, Point]] = {}  # metric → series → its sample that isn't stored yet
        self._layouts: dict[tuple[Labels, ...], SeriesLayout] = {}
        self.points_lost = 0  # since start: the store didn't take them

    def select(self, matchers: Sequence[Matcher], start_ms: int, end_ms: int) -> Sequence[SeriesWindow]:
        """As the store, with what it doesn't have yet."""
        # Ours first: a sample that becomes durable in between is then found twice, never not at all.
        ours = [point for point in self._candidates(matchers) if start_ms <= point.at_ms <= end_ms]
        ours = _matching(ours, matchers)
        stored = self._source.select(matchers, start_ms, end_ms)
        return _merged(stored, ours) if ours else stored

    def show(self, points: Iterable[Point]) -> None:
        """Let every query see these from now on."""
        with self._lock:
            for point in points:
                self._newest.setdefault(_name(point.labels), {})[point.labels] = point

    def withdraw(self, points: Iterable[Point]) -> None:
        """Undo `show`."""
        with self._lock:
            for point in points:
                series = self._newest.get(_name(point.labels), {})
                if series.get(point.labels) is point:
                    del series[point.labels]

    def write(self, points: Sequence[Point]) -> None:
        """Hand shown points to the store; they are forgotten here once it has them. Never raises, never waits."""
        if not points:
            return
        try:
            self._append(self._batch(points)).add_done_callback(lambda future: self._written(points, future))
        except PgherdError as error:
            self._lost(points, error)

    def _written(self, points: Sequence[Point], future: Future[Any]) -> None:
        error = future.exception()
        if error is not None:
            self._lost(points, error)
        else:
            self.withdraw(points)

    def _lost(self, points: Sequence[Point], error: BaseException) -> None:
        self.points_lost += len(points)
        _log.warning("alert.recorded_not_stored", points=len(points), error=str(error))

    def _candidates(self, matchers: Sequence[Matcher]) -> list[Point]:
        name = next((m.value for m in matchers if m.name == NAME_LABEL and m.op is MatchOp.EQUAL), None)
        with self._lock:
            if name is not None:
                return list(self._newest.get(name, {}).values())
            return [point for series in self._newest.values() for point in series.values()]

    def _batch(self, points: Sequence[Point]) -> Batch:
        labels = tuple(point.labels for point in points)
        layout = self._layouts.get(labels)
        if layout is None:
            if len(self._layouts) >= 256:  # a steady herd has one layout a group; this is a storm
                self._layouts.clear()
            layout = self._layouts[labels] = SeriesLayout(labels, _METRICS)
        return Batch(
            layout=layout,
            series=np.arange(len(points), dtype=np.int32),
            times_ms=np.array([point.at_ms for point in points], dtype=np.int64),
            values=np.array([point.value for point in points], dtype=np.float64),
        )


def _name(labels: Labels) -> str:
    return next(value for name, value in labels if name == NAME_LABEL)


def _matching(points: list[Point], matchers: Sequence[Matcher]) -> list[Point]:
    for matcher in matchers:
        if not points:
            break
        values = [dict(point.labels).get(matcher.name, "") for point in points]
        if matcher.op in (MatchOp.EQUAL, MatchOp.NOT_EQUAL):
            hits = [value == matcher.value for value in values]
        else:
            hits = [bool(hit) for hit in full_matches(matcher.value, values)]
        wanted = matcher.op in (MatchOp.EQUAL, MatchOp.REGEX)
        points = [point for point, hit in zip(points, hits, strict=True) if hit is wanted]
    return points


def _merged(stored: Sequence[SeriesWindow], points: Sequence[Point]) -> Sequence[SeriesWindow]:
    """Both, one window a series; of two samples at one time ours stands."""
    ours = {point.labels: point for point in points}
    merged: list[SeriesWindow] = []
    for window in stored:
        point = ours.pop(tuple(sorted(window.labels.items())), None)
        merged.append(window if point is None else _with_point(window, point))
    new = (Window(dict(point.labels), np.array([point.at_ms]), np.array([point.value])) for point in ours.values())
    return [*merged, *new]


def _with_point(window: SeriesWindow, point: Point) -> Window:
    before = window.times_ms < point.at_ms
    after = window.times_ms > point.at_ms
    return Window(
        window.labels,
        np.concatenate([window.times_ms[before], [point.at_ms], window.times_ms[after]]),
        np.concatenate([window.values[before], [point.value], window.values[after]]),
    )

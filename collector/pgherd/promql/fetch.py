"""What an expression needs of the store, known before anything is computed.

Every selector becomes a `Fetch`; selectors that need the same samples share one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pgherd.promql.ast import Expr, MatrixSelector, Subquery, VectorSelector, children
from pgherd.promql.grid import Integers
from pgherd.promql.moments import Horizon, inner_steps, looked_at
from pgherd.promql.source import TIME_MAX_MS, SeriesSource
from pgherd.promql.windows import Checkpoint, Selection, arrange
from pgherd.proto.errors import PreconditionError
from pgherd.proto.selectors import Matcher


@dataclass(frozen=True, slots=True)
class Fetch:
    """The smallest closed range that holds every left-open window of a selector; whether stale markers matter to it."""

    matchers: tuple[Matcher, ...]
    start_ms: int
    end_ms: int
    drop_stale: bool


def fetch_of(node: VectorSelector | MatrixSelector, steps: Integers, horizon: Horizon) -> Fetch:
    """What a selector needs when it is evaluated at these steps (at least one)."""
    is_range = isinstance(node, MatrixSelector)
    selector, reach_ms = (node.selector, node.range_ms) if isinstance(node, MatrixSelector) else (node, horizon.lookback_ms)
    moments_ms = looked_at(selector, steps, horizon)
    first_ms, last_ms = int(moments_ms[0]) - reach_ms + 1, int(moments_ms[-1])
    return Fetch(selector.matchers, _storable_ms(first_ms), _storable_ms(last_ms), is_range)


def _storable_ms(moment_ms: int) -> int:
    return max(-TIME_MAX_MS, min(TIME_MAX_MS, moment_ms))


def _fetches(expr: Expr, steps: Integers, horizon: Horizon) -> Iterator[tuple[Fetch, int]]:
    """Every fetch of an expression, and at how many steps its selector is evaluated."""
    pending = [(expr, steps)]
    while pending:
        node, at = pending.pop()
        if isinstance(node, VectorSelector | MatrixSelector):
            yield fetch_of(node, at, horizon), len(at)
        inner = inner_steps(node, at, horizon) if isinstance(node, Subquery) else at
        if len(inner):
            pending.extend((child, inner) for child in reversed(children(node)))


def fetch_all(
    expr: Expr, steps: Integers, horizon: Horizon, source: SeriesSource, samples_max: int, checkpoint: Checkpoint
) -> tuple[dict[Fetch, Selection], int]:
    """The samples of every selector, and how many they are.

    Raises `promql.limit` for more than `samples_max` samples in all, or as many cells (series × steps) of one selector.
    """
    selections: dict[Fetch, Selection] = {}
    fetched = 0
    for fetch, evaluations in _fetches(expr, steps, horizon):
        if fetch in selections:
            continue
        checkpoint()
        series = source.select(fetch.matchers, fetch.start_ms, fetch.end_ms)
        fetched += sum(len(window.times_ms) for window in series)
        if max(fetched, len(series) * evaluations) > samples_max:
            raise too_many_samples(samples_max)
        selections[fetch] = arrange(series, drop_stale=fetch.drop_stale)
    return selections, fetched


def too_many_samples(samples_max: int) -> PreconditionError:
    """The refusal of a query that would hold too much at once, in Prometheus' words."""
    return PreconditionError(
        "promql.limit",
        f"query processing would load too many samples into memory (more than {samples_max})",
        hint="select fewer series, a shorter range or a larger step",
    )

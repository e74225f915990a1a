"""The rules' view of the PromQL engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from pgherd.collector.alerting.evaluation import Query
from pgherd.promql.engine import DEFAULT_LIMITS, Limits, evaluate_instant
from pgherd.promql.source import SeriesSource
from pgherd.promql.values import Scalar, Vector
from pgherd.proto.clock import Clock
from pgherd.proto.errors import PreconditionError, TransientError


def promql_query(source: SeriesSource, clock: Clock, *, timeout_s: float, limits: Limits = DEFAULT_LIMITS) -> Query:
    """A query function for rules: a scalar counts as a vector of one element without labels, as in Prometheus.

    The function raises promql.* and what the source raises, query.timeout after `timeout_s`, and
    promql.execution for an expression that yields neither vector nor scalar.
    """

    def query(expr: str, at_ms: int) -> Sequence[tuple[Mapping[str, str], float]]:
        bounded = replace(limits, checkpoint=_deadline(clock, timeout_s))
        match evaluate_instant(expr, at_ms, source, bounded):
            case Vector(samples=samples):
                return [(sample.labels, sample.value) for sample in samples]
            case Scalar(value=value):
                return [({}, value)]
            case _:
                raise PreconditionError(
                    "promql.execution",
                    "a rule's expression must yield a vector or a scalar",
                    hint="select an instant vector, without a range or a string",
                )

    return query


def _deadline(clock: Clock, timeout_s: float) -> Callable[[], None]:
    deadline_mono_s = clock.mono_s() + timeout_s

    def checkpoint() -> None:
        if clock.mono_s() > deadline_mono_s:
            raise TransientError("query.timeout", f"the query didn't finish within {timeout_s:g} s", timeout_s=timeout_s)

    return checkpoint

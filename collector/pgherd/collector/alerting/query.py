"""The rules' view of the PromQL engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from pgherd.promql.ast import MatrixSelector, VectorSelector, walk
from pgherd.promql.engine import DEFAULT_LIMITS, Limits, evaluate_instant
from pgherd.promql.parse import parse
from pgherd.promql.source import SeriesSource
from pgherd.promql.values import Scalar, Vector
from pgherd.proto.clock import Clock
from pgherd.proto.errors import PreconditionError, TransientError
from pgherd.proto.selectors import NAME_LABEL, MatchOp

# The expression's vector at a time (ms since the epoch). Synchronous, called on a thread, and bounded in time
# by itself (query.timeout); raises PgherdError.
Query = Callable[[str, int], Sequence[tuple[Mapping[str, str], float]]]


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


def metric_names(expr: str) -> frozenset[str]:
    """The metrics that an expression reads; empty when a selector names none, so that nobody relies on half of them."""
    names: set[str] = set()
    for node in walk(parse(expr)):
        selector = node.selector if isinstance(node, MatrixSelector) else node
        if isinstance(selector, VectorSelector):
            name = next((m.value for m in selector.matchers if m.name == NAME_LABEL and m.op is MatchOp.EQUAL), None)
            if name is None:
                return frozenset()
            names.add(name)
    return frozenset(names)

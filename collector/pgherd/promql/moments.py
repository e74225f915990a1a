"""When: the times at which selectors look and subqueries are evaluated.

Source: Prometheus documentation, "Querying basics" (offset, @, subqueries).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pgherd.promql.ast import Anchor, Subquery, VectorSelector
from pgherd.promql.grid import Integers
from pgherd.proto.errors import PreconditionError


@dataclass(frozen=True, slots=True)
class Horizon:
    """What every part of a query knows of the whole: its first and last step and the defaults of time."""

    first_ms: int
    last_ms: int
    lookback_ms: int
    subquery_step_ms: int
    steps_max: int


def looked_at(node: VectorSelector | Subquery, steps: Integers, horizon: Horizon) -> Integers:
    """For each step the moment that the selector or subquery is about: the step's own or that of `@`, less the offset."""
    match node.at:
        case None:
            return steps - node.offset_ms
        case Anchor.START:
            at_ms = horizon.first_ms
        case Anchor.END:
            at_ms = horizon.last_ms
        case fixed_ms:
            at_ms = fixed_ms
    return np.full(len(steps), at_ms - node.offset_ms, dtype=np.int64)


def inner_steps(node: Subquery, steps: Integers, horizon: Horizon) -> Integers:
    """The steps of a subquery's operand: all multiples of its resolution that some step's range holds.

    They don't depend on the outer steps' own times, so that the same moments are evaluated however often a dashboard
    refreshes. Raises `promql.limit` when there are more than `steps_max`.
    """
    step_ms = node.step_ms or horizon.subquery_step_ms
    ends_ms = looked_at(node, steps, horizon)
    before_ms, last_ms = int(ends_ms.min()) - node.range_ms, int(ends_ms.max())
    first = before_ms // step_ms + 1  # ranges are open on the left
    count = last_ms // step_ms - first + 1
    if count > horizon.steps_max:
        raise PreconditionError(
            "promql.limit",
            f"query processing would load too many samples into memory: a subquery of {count} steps",
            hint="use a shorter range or a larger resolution in the subquery",
        )
    return (first + np.arange(max(count, 0), dtype=np.int64)) * step_ms

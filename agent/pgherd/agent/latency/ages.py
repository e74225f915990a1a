"""How long statements take, from the ages of running ones: right whatever clients do between statements. Pure.

A look finds a statement running at age a exactly if it has run that long already, so the ages of running statements
are spread like the survival function of durations: looks · rate · S(a) of them per second of age. S falls; the
closest falling curve to what was counted (Grenander's estimator, by pooling adjacent violators) is S. No assumption
on think time, connections or transactions is made, but quick statements are rarely caught: it serves busy servers.

Source: Grenander 1956; Barlow, Bartholomew, Bremner and Brunk 1972 (pool adjacent violators).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Final

from pgherd.agent.latency.buckets import MIN_INDEX, Buckets, index_of, lower_bound
from pgherd.agent.latency.window import CUT_S

_FIRST_S: Final = 0.0005  # ages below aren't told apart: the clock is read a moment after the states
_Z: Final = 2.2  # pooled steps are fitted to the data, which makes their counts look surer than they are


@dataclass(frozen=True, slots=True)
class Step:
    """Between two ages the survival share is `share`, known from `count` running statements."""

    from_s: float
    to_s: float
    share: float
    count: float

    @property
    def error(self) -> float:
        """Relative error of the share, at the estimator's confidence."""
        return _Z / math.sqrt(self.count) if self.count > 0 else 1.0


def survival(ages: Buckets, looks: float, seconds: float, count: float) -> list[Step]:
    """S by steps of age up to CUT_S, for `count` statements in `seconds` seen by `looks` looks."""
    edges = [0.0, *(lower_bound(index) for index in range(index_of(_FIRST_S) + 1, index_of(CUT_S) + 1)), CUT_S]
    counted = [0.0] * (len(edges) - 1)
    first = index_of(_FIRST_S)
    for index, weight in ages.counts.items():
        place = max(0, index - first) if index > MIN_INDEX else 0
        if place < len(counted):
            counted[place] += weight
    scale = looks * count / seconds
    pools: list[list[float]] = []  # [from, to, counted]
    for (low, high), number in zip(pairwise(edges), counted, strict=True):
        pools.append([low, high, number])
        while len(pools) > 1 and _density(pools[-1]) >= _density(pools[-2]):
            last = pools.pop()
            pools[-1][1], pools[-1][2] = last[1], pools[-1][2] + last[2]
    return [Step(low, high, min(1.0, number / (high - low) / scale), number) for low, high, number in pools]


def _density(pool: list[float]) -> float:
    return pool[2] / (pool[1] - pool[0])


def age_where(steps: list[Step], share: float, side: int) -> float | None:
    """The age that `share` of the statements outlive; with side −1 or +1 its low or high bound. None above CUT_S."""
    levels = [min(1.0, max(0.0, step.share * (1 + side * step.error))) for step in steps]
    # S falls: a bound that holds at one age holds for all before (the low one) or after it (the high one).
    levels = list(accumulate(reversed(levels), max))[::-1] if side < 0 else list(accumulate(levels, min))
    for place, (step, level) in enumerate(zip(steps, levels, strict=True)):
        if level <= share:
            # Everybody outlives age 0: within the first step nothing tells where the share is reached, only that it is.
            return step.to_s if place == 0 and side >= 0 else step.from_s
    return None

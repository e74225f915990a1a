"""Sums with Prometheus' own accuracy: compensated (Kahan-Neumaier), so that both round the same ties alike.

Two ways to the same digits. Over time, `Compensated` adds sample after sample, as Prometheus does. Across series,
`group_sums` adds in pairs with the error of every addition kept beside it, which takes log2(n) passes over whole arrays
instead of n. Both are exact to about twice a float's precision before the last rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pgherd.promql.grid import Bools, Floats, Integers

# Sums of whole numbers are exact below this, in any order.
_WHOLE_BELOW = 2.0**53


def window_reduce(ufunc: np.ufunc, values: Floats, low: Integers, high: Integers) -> Floats:
    """`ufunc` over `values[s, low[t]:high[t]]`: (S, N) → (S, T). Every segment has at least one element."""
    padded = np.concatenate((values, np.zeros((values.shape[0], 1))), axis=1)
    bounds = np.empty(2 * len(low), dtype=np.intp)
    bounds[0::2] = low
    bounds[1::2] = high
    reduced: Floats = ufunc.reduceat(padded, bounds, axis=1)[:, ::2]
    return reduced


def sums_are_exact(values: Floats, count: int) -> bool:
    """Whether up to `count` of the values can be added in any order without rounding."""
    if not values.size:
        return True
    largest = float(np.abs(values).max())
    return largest * count < _WHOLE_BELOW and bool((values == np.rint(values)).all())


@dataclass(slots=True)
class Compensated:
    """Running sums: `total` is what a plain addition gives, `error` what it has lost so far."""

    total: Floats
    error: Floats

    @classmethod
    def zeros(cls, shape: tuple[int, ...]) -> Compensated:
        """Nothing added yet."""
        return cls(np.zeros(shape), np.zeros(shape))

    def add(self, steps: slice | Integers, increment: Floats) -> None:
        """Add to the columns `steps`."""
        self.total[:, steps], self.error[:, steps] = increased(increment, self.total[:, steps], self.error[:, steps])

    def value(self) -> Floats:
        """The sums."""
        return self.total + self.error


def increased(increment: Floats, total: Floats, error: Floats) -> tuple[Floats, Floats]:
    """`total` and `error` after adding `increment`: Neumaier's step, which loses nothing but the error's own rounding."""
    after = total + increment
    lost = np.where(np.abs(total) >= np.abs(increment), (total - after) + increment, (increment - after) + total)
    return after, np.where(np.isinf(after), 0.0, error + lost)


def group_sums(values: Floats, starts: Integers) -> Compensated:
    """Sums of rows `values[starts[g]:starts[g + 1]]`, the last group to the end: (S, T) → (G, T)."""
    sizes = np.diff(np.append(starts, values.shape[0]))
    if sums_are_exact(values, int(sizes.max())):
        totals: Floats = np.add.reduceat(values, starts, axis=0)
        return Compensated(totals, np.zeros(totals.shape))
    total, error = values, np.zeros(values.shape)
    while int(sizes.max()) > 1:
        # In each group the rows 0 and 1 become one, 2 and 3, …; a last odd one stays.
        halves = (sizes + 1) // 2
        starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
        place = np.arange(int(halves.sum())) - np.repeat(np.cumsum(halves) - halves, halves)
        first = np.repeat(starts, halves) + 2 * place
        paired = 2 * place + 1 < np.repeat(sizes, halves)
        left, rest = total[first], error[first]
        partner = first[paired] + 1
        after, lost = increased(total[partner], left[paired], rest[paired] + error[partner])
        left[paired], rest[paired] = after, lost
        total, error, sizes = left, rest, halves
    return Compensated(total, error)


@dataclass(slots=True)
class Mean:
    """Running averages: the sum over the count, or step by step from where the sum would overflow, as in Prometheus."""

    sums: Compensated
    means: Floats
    counts: Floats
    stepwise: Bools

    @classmethod
    def zeros(cls, shape: tuple[int, ...]) -> Mean:
        """Nothing added yet."""
        return cls(Compensated.zeros(shape), np.zeros(shape), np.zeros(shape), np.zeros(shape, dtype=np.bool_))

    def add(self, where: Any, values: Floats) -> None:
        """Add one value to each of the cells `where` (any index of numpy that names no cell twice)."""
        self.counts[where] += 1
        counts, stepwise, mean = self.counts[where], self.stepwise[where], self.means[where]
        total, error = self.sums.total[where], self.sums.error[where]
        after, rest = increased(values, total, error)
        overflows = ~stepwise & np.isinf(after) & (counts > 1)
        mean = np.where(overflows, total / (counts - 1), mean)
        error = np.where(overflows, error / (counts - 1), error)
        stepwise = stepwise | overflows
        share = (counts - 1) / counts
        moved, unrest = increased(values / counts, share * mean, share * error)
        self.stepwise[where] = stepwise
        self.means[where] = np.where(stepwise, moved, mean)
        self.sums.total[where] = np.where(stepwise, total, after)
        self.sums.error[where] = np.where(stepwise, unrest, rest)

    def value(self) -> Floats:
        """The averages; NaN where nothing was added."""
        error = self.sums.error
        return np.where(self.stepwise, self.means + error, self.sums.total / self.counts + error / self.counts)

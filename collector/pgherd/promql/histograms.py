"""Classic histograms: cumulative buckets labelled `le`, and what can be read from them.

Source: Prometheus documentation, "histogram_quantile" and "histogram_fraction".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from pgherd.promql.annotations import Annotations
from pgherd.promql.grid import Bools, Floats, Integers, Labels, VectorGrid
from pgherd.promql.quantiles import judge_quantile

_BOUND_LABEL = "le"
_BOUND = re.compile(r"[+-]?(?:inf(?:inity)?|nan|(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)", re.ASCII | re.IGNORECASE)
# Relative differences between neighbouring buckets up to here are noise of floats, not of the data.
_NOISE = 1e-12
_LEAST_NORMAL = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True, slots=True)
class _Buckets:
    """One histogram during some steps: B upper bounds ascending, (B, T) cumulative counts."""

    bounds: Floats
    counts: Floats
    steps: Integers

    @property
    def complete(self) -> bool:
        """Whether the last bucket holds every observation."""
        return bool(np.isposinf(self.bounds[-1]))


def histogram_quantile(quantile: Floats, grid: VectorGrid, annotations: Annotations) -> VectorGrid:
    """The φ-quantile (one φ per step) of every histogram, interpolated linearly within its bucket."""
    judge_quantile(quantile, annotations)

    def of(buckets: _Buckets) -> Floats:
        values, forced = _quantile(quantile[buckets.steps], buckets)
        if forced:
            annotations.inform(
                "input to histogram_quantile needed to be fixed for monotonicity "
                "(see https://prometheus.io/docs/prometheus/latest/querying/functions/#histogram_quantile)"
            )
        return values

    return _each(grid, of, annotations)


def histogram_fraction(lower: Floats, upper: Floats, grid: VectorGrid, annotations: Annotations) -> VectorGrid:
    """The share of observations between two values (one of each per step)."""

    def of(buckets: _Buckets) -> Floats:
        return _fraction(lower[buckets.steps], upper[buckets.steps], buckets)

    return _each(grid, of, annotations)


def _each(grid: VectorGrid, of: Callable[[_Buckets], Floats], annotations: Annotations) -> VectorGrid:
    """`of` every histogram: series that differ in nothing but `le`."""
    members: dict[Labels, list[tuple[float, int]]] = {}
    for row, labels in enumerate(grid.labels):
        bound = dict(labels).get(_BOUND_LABEL, "")
        if not _BOUND.fullmatch(bound):
            annotations.warn(f'bucket label "le" is missing or has a malformed value of "{bound}"')
            continue
        key = tuple(pair for pair in labels if pair[0] != _BOUND_LABEL)
        members.setdefault(key, []).append((float(bound), row))
    values = np.zeros((len(members), grid.values.shape[1]))
    present = np.zeros(values.shape, dtype=np.bool_)
    for place, found in enumerate(members.values()):
        found.sort(key=lambda member: member[0])
        bounds = np.array([bound for bound, _ in found])
        rows = [row for _, row in found]
        for buckets in _by_steps(bounds, grid.values[rows], grid.present[rows]):
            values[place, buckets.steps] = of(buckets)
            present[place, buckets.steps] = True
    return VectorGrid(list(members), values, present).nameless()


def _by_steps(bounds: Floats, counts: Floats, present: Bools) -> Iterator[_Buckets]:
    """The histogram during the steps at which the same of its buckets are there; nothing where none is."""
    patterns, pattern_of = np.unique(present, axis=1, return_inverse=True)
    for index in range(patterns.shape[1]):
        rows = np.flatnonzero(patterns[:, index])
        if len(rows):
            steps = np.flatnonzero(pattern_of.reshape(-1) == index)
            distinct, starts = np.unique(bounds[rows], return_index=True)
            # Buckets with the same bound, spelt differently, are one.
            together = np.add.reduceat(counts[rows][:, steps], starts, axis=0)
            yield _Buckets(distinct, together, steps)


def _quantile(quantile: Floats, buckets: _Buckets) -> tuple[Floats, bool]:
    bounds, last = buckets.bounds, len(buckets.bounds) - 1
    forced = False
    if not buckets.complete or last < 1:
        found = np.full(quantile.shape, np.nan)
    else:
        counts, forced = _monotonic(buckets.counts)
        rank = quantile * counts[-1]
        place = _first_at_least(counts[:-1], rank)
        lines = np.arange(len(rank))
        below = np.maximum(place - 1, 0)
        inner = place > 0
        start = np.where(inner, bounds[below], 0.0)
        count = counts[place, lines] - np.where(inner, counts[below, lines], 0.0)
        within = rank - np.where(inner, counts[below, lines], 0.0)
        found = start + (bounds[place] - start) * (within / count)
        found = np.where((place == 0) & (bounds[0] <= 0), bounds[0], found)
        found = np.where(place == last, bounds[last - 1], found)
        found = np.where(counts[-1] == 0, np.nan, found)
    found = np.where(quantile < 0, -np.inf, np.where(quantile > 1, np.inf, found))
    valid = (quantile >= 0) & (quantile <= 1)
    return np.where(np.isnan(quantile), np.nan, found), forced and bool(valid.any())


def _monotonic(counts: Floats) -> tuple[Floats, bool]:
    """Cumulative counts without their decreases, and whether any was more than noise."""
    fixed = counts.copy()
    highest = counts[0].copy()
    forced = False
    for row in range(1, len(counts)):
        current = counts[row]
        noise = _nearly_equal(highest, current)
        decrease = ~noise & (current < highest)
        forced |= bool(decrease.any())
        fixed[row] = np.where(noise | decrease, highest, current)
        highest = np.where(noise | decrease, highest, current)
    return fixed, forced


def _nearly_equal(left: Floats, right: Floats) -> Bools:
    magnitude = np.abs(left) + np.abs(right)
    difference = np.abs(left - right)
    tiny = (left == 0) | (right == 0) | (magnitude < _LEAST_NORMAL)
    relative = difference / np.minimum(magnitude, np.finfo(np.float64).max)
    close = np.where(tiny, difference < _NOISE * _LEAST_NORMAL, relative < _NOISE)
    equal: Bools = (left == right) | close | (np.isnan(left) & np.isnan(right))
    return equal


def _first_at_least(counts: Floats, rank: Floats) -> Integers:
    """For each step the first row whose count reaches the rank (the number of rows when none does), by bisection."""
    low = np.zeros(len(rank), dtype=np.int64)
    high = np.full(len(rank), len(counts), dtype=np.int64)
    lines = np.arange(len(rank))
    while bool((low < high).any()):
        middle = (low + high) // 2
        reached = counts[np.minimum(middle, len(counts) - 1), lines] >= rank
        searching = low < high
        low = np.where(searching & ~reached, middle + 1, low)
        high = np.where(searching & reached, middle, high)
    return low


def _fraction(lower: Floats, upper: Floats, buckets: _Buckets) -> Floats:
    if not buckets.complete:
        return np.full(lower.shape, np.nan)
    total = buckets.counts[-1]
    share = (_rank_of(upper, buckets) - _rank_of(lower, buckets)) / total
    share = np.where(lower >= upper, 0.0, share)
    return np.where((total == 0) | np.isnan(lower) | np.isnan(upper), np.nan, share)


def _rank_of(value: Floats, buckets: _Buckets) -> Floats:
    """How many observations lie below a value, as far as the buckets tell."""
    bounds, counts = buckets.bounds, buckets.counts
    total = counts[-1]
    rank = np.zeros(len(value))
    found = total.copy()
    known = np.zeros(len(value), dtype=np.bool_)
    start = 0.0 if bounds[0] > 0 else -np.inf
    for bound, count in zip(bounds, counts, strict=True):
        at_start = ~known & (start >= value)
        inside = ~known & ~at_start & (start < value) & (bound > value)
        # A bucket without a lower end can't be divided: all of it is below.
        divided = count if np.isneginf(start) else rank + (count - rank) * (value - start) / (bound - start)
        found = np.where(at_start, rank, np.where(inside, divided, found))
        known |= at_start | inside
        rank, start = count, float(bound)
    rank_of: Floats = np.where(found > total, total, found)
    return rank_of

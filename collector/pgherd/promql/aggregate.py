"""Aggregations: many series into few, at every step at once.

Those that pick elements or count values instead of computing one are in choices.py. Source: Prometheus documentation,
"Aggregation operators". As there, min and max ignore NaN beside other values, and stddev/stdvar are those of the population.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pgherd.promql.ast import Aggregate, AggregateOp
from pgherd.promql.grid import Floats, Integers, Labels, VectorGrid
from pgherd.promql.quantiles import quantile_of_rows
from pgherd.promql.sums import Mean, group_sums
from pgherd.proto.selectors import NAME_LABEL

SUPPORTED = frozenset(op.value for op in AggregateOp)
Index = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Groups:
    """Which series of a grid belong together; groups are in the order of their first series.

    `grid` has its series ordered by group; the members of group g are `rows[starts[g] : starts[g] + sizes[g]]`.
    """

    labels: Sequence[Labels]
    grid: VectorGrid
    starts: Integers
    sizes: Integers

    @classmethod
    def of(cls, grid: VectorGrid, keys: Sequence[Labels]) -> Groups:
        """Group by equal keys, one per series."""
        positions: dict[Labels, int] = {}
        group_of = np.array([positions.setdefault(key, len(positions)) for key in keys], dtype=np.intp)
        order = np.argsort(group_of, kind="stable")
        sizes = np.bincount(group_of, minlength=len(positions))
        starts = np.concatenate(([0], np.cumsum(sizes)[:-1])).astype(np.int64)
        ordered = grid if bool((order[1:] > order[:-1]).all()) else grid.rows(order)
        return cls(list(positions), ordered, starts, sizes)

    def members(self) -> Iterator[tuple[int, slice]]:
        """Every group and the rows of its members."""
        for group, (start, size) in enumerate(zip(self.starts.tolist(), self.sizes.tolist(), strict=True)):
            yield group, slice(start, start + size)

    def rounds(self) -> Iterator[tuple[tuple[Index, Index], Floats]]:
        """The first sample of every group and step, then the second, …: (groups, steps) and the values there."""
        for place in range(int(self.sizes.max())):
            groups = np.flatnonzero(self.sizes > place)
            rows = self.starts[groups] + place
            which, steps = np.nonzero(self.grid.present[rows])
            yield (groups[which], steps), self.grid.values[rows[which], steps]


def group_keys(labels: Sequence[Labels], names: Sequence[str], *, without: bool) -> list[Labels]:
    """Each series' labels as `by (names)` or `without (names)` leaves them."""
    chosen = frozenset(names) | {NAME_LABEL} if without else frozenset(names)
    return [tuple(pair for pair in series if (pair[0] in chosen) is not without) for series in labels]


def aggregate(node: Aggregate, grid: VectorGrid, quantile: Floats | None = None) -> VectorGrid:
    """`grid` grouped by the node's labels and reduced; `quantile` is φ per step."""
    if not len(grid.labels):
        return grid
    groups = Groups.of(grid, group_keys(grid.labels, node.labels, without=node.without))
    counts = np.add.reduceat(groups.grid.present, groups.starts, axis=0, dtype=np.int64)
    return VectorGrid(groups.labels, _reduce(node.op, groups, counts, quantile), counts > 0)


def _reduce(op: AggregateOp, groups: Groups, counts: Integers, quantile: Floats | None) -> Floats:
    match op:
        case AggregateOp.COUNT:
            return counts.astype(np.float64)
        case AggregateOp.GROUP:
            return np.ones(counts.shape)
        case AggregateOp.MIN:
            return _extreme(np.fmin, groups)
        case AggregateOp.MAX:
            return _extreme(np.fmax, groups)
        case AggregateOp.SUM:
            return group_sums(_filled(groups.grid, -0.0), groups.starts).value()
        case AggregateOp.AVG:
            return _average(groups, counts)
        case AggregateOp.STDVAR:
            return _variance(groups, counts)
        case AggregateOp.STDDEV:
            return np.sqrt(_variance(groups, counts))
        case AggregateOp.QUANTILE if quantile is not None:
            return _quantile(groups, counts, quantile)
        case _:
            raise ValueError(f"{op} doesn't reduce")


def _filled(grid: VectorGrid, absent: float) -> Floats:
    """The values with `absent` where there is none (-0.0 is what adds nothing at all)."""
    return grid.values if bool(grid.present.all()) else np.where(grid.present, grid.values, absent)


def _extreme(ufunc: np.ufunc, groups: Groups) -> Floats:
    extreme: Floats = ufunc.reduceat(_filled(groups.grid, np.nan), groups.starts, axis=0)
    return extreme


def _average(groups: Groups, counts: Integers) -> Floats:
    sums = group_sums(_filled(groups.grid, -0.0), groups.starts)
    if bool(np.isfinite(sums.total).all()):
        return sums.total / counts + sums.error / counts
    # Finite values whose sum overflows still have an average.
    mean = Mean.zeros(counts.shape)
    for cells, values in groups.rounds():
        mean.add(cells, values)
    return mean.value()


def _variance(groups: Groups, counts: Integers) -> Floats:
    """Welford's recurrence in Prometheus' order, since the result's last digits depend on it."""
    seen, mean, squares = np.zeros(counts.shape), np.zeros(counts.shape), np.zeros(counts.shape)
    for cells, values in groups.rounds():
        seen[cells] += 1
        first = seen[cells] == 1
        deviation = values - mean[cells]
        moved = mean[cells] + np.where(first, values, deviation / seen[cells])
        mean[cells] = moved
        # A single value has no deviation, unless it isn't a finite one.
        squares[cells] += np.where(first, np.where(np.isfinite(values), 0.0, np.nan), deviation * (values - moved))
    variance: Floats = squares / counts
    return variance


def _quantile(groups: Groups, counts: Integers, quantile: Floats) -> Floats:
    result = np.zeros(counts.shape)
    for group, rows in groups.members():
        steps = np.flatnonzero(counts[group])
        samples, inside = groups.grid.values[rows][:, steps].T, groups.grid.present[rows][:, steps].T
        result[group, steps] = quantile_of_rows(samples, inside, quantile[steps])
    return result

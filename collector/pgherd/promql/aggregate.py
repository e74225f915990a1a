"""Aggregations: many series into few, at every step at once.

Source: Prometheus documentation, "Aggregation operators". As there, min and max ignore NaN beside other values,
and stddev/stdvar are those of the population.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pgherd.promql.ast import Aggregate, AggregateOp
from pgherd.promql.grid import Floats, Integers, Labels, VectorGrid
from pgherd.promql.sums import group_sums
from pgherd.proto.selectors import NAME_LABEL

SUPPORTED = frozenset(op.value for op in AggregateOp)


def aggregate(node: Aggregate, grid: VectorGrid) -> VectorGrid:
    """`grid` grouped by the node's labels and reduced; groups appear in the order of their first series."""
    if not len(grid.labels):
        return grid
    keys = group_keys(grid.labels, node.labels, without=node.without)
    positions: dict[Labels, int] = {}
    groups = np.array([positions.setdefault(key, len(positions)) for key in keys], dtype=np.intp)
    order = np.argsort(groups, kind="stable")
    sizes = np.bincount(groups)
    starts = np.concatenate(([0], np.cumsum(sizes)[:-1])).astype(np.int64)
    ordered = grid if bool((order[1:] > order[:-1]).all()) else grid.rows(order)
    counts = np.add.reduceat(ordered.present, starts, axis=0, dtype=np.int64)
    values = _reduce(node.op, ordered, starts, sizes, counts)
    return VectorGrid(list(positions), values, counts > 0)


def group_keys(labels: Sequence[Labels], names: Sequence[str], *, without: bool) -> list[Labels]:
    """Each series' labels as `by (names)` or `without (names)` leaves them."""
    chosen = frozenset(names) | {NAME_LABEL} if without else frozenset(names)
    return [tuple(pair for pair in series if (pair[0] in chosen) is not without) for series in labels]


def _reduce(op: AggregateOp, grid: VectorGrid, starts: Integers, sizes: Integers, counts: Integers) -> Floats:
    match op:
        case AggregateOp.COUNT:
            return counts.astype(np.float64)
        case AggregateOp.GROUP:
            return np.ones(counts.shape)
        case AggregateOp.MIN:
            return _extreme(np.fmin, grid, starts)
        case AggregateOp.MAX:
            return _extreme(np.fmax, grid, starts)
        case AggregateOp.SUM:
            return group_sums(_filled(grid, 0.0), starts)
        case AggregateOp.AVG:
            return _average(grid, starts, sizes, counts)
        case AggregateOp.STDVAR:
            return _variance(grid, starts, sizes, counts)
        case AggregateOp.STDDEV:
            return np.sqrt(_variance(grid, starts, sizes, counts))


def _filled(grid: VectorGrid, absent: float) -> Floats:
    return grid.values if bool(grid.present.all()) else np.where(grid.present, grid.values, absent)


def _extreme(ufunc: np.ufunc, grid: VectorGrid, starts: Integers) -> Floats:
    extreme: Floats = ufunc.reduceat(_filled(grid, np.nan), starts, axis=0)
    return extreme


def _average(grid: VectorGrid, starts: Integers, sizes: Integers, counts: Integers) -> Floats:
    values = _filled(grid, 0.0)
    totals = group_sums(values, starts)
    averages = totals / counts
    overflowed = np.isinf(totals)
    if overflowed.any():
        # Finite values whose sum overflows still have an average.
        scaled = np.add.reduceat(values / np.repeat(np.maximum(counts, 1), sizes, axis=0), starts, axis=0)
        averages = np.where(overflowed, scaled, averages)
    return averages


def _variance(grid: VectorGrid, starts: Integers, sizes: Integers, counts: Integers) -> Floats:
    mean = np.repeat(_average(grid, starts, sizes, counts), sizes, axis=0)
    deviations = np.where(grid.present, grid.values - mean, 0.0)
    variance: Floats = np.add.reduceat(deviations * deviations, starts, axis=0) / counts
    return variance

"""Aggregations that choose or count elements: topk, bottomk, limitk, count_values.

Source: Prometheus documentation, "Aggregation operators". Among equal values the first in label order are chosen;
Prometheus promises no order there.
"""

from __future__ import annotations

import math
from decimal import Decimal

import numpy as np
from numpy.typing import NDArray

from pgherd.promql.aggregate import Groups, group_keys
from pgherd.promql.ast import Aggregate, AggregateOp
from pgherd.promql.grid import Bools, Floats, Integers, Labels, VectorGrid
from pgherd.promql.windows import Checkpoint
from pgherd.proto.errors import PreconditionError

_INT64_MAX = float(2**63)


def choose(node: Aggregate, wanted: Floats, grid: VectorGrid) -> VectorGrid:
    """At each step `wanted` elements of every group, with all their labels; at a single step best first."""
    if bool((wanted < 1).all()):
        return VectorGrid.empty(len(wanted))
    wanted = _whole(wanted)
    if not len(grid.labels):
        return grid
    groups = Groups.of(grid, group_keys(grid.labels, node.labels, without=node.without))
    present = np.zeros(groups.grid.present.shape, dtype=np.bool_)
    order: list[NDArray[np.intp]] = []
    for _, rows in groups.members():
        rank = _rank(node.op, groups.grid.values[rows], groups.grid.present[rows])
        present[rows] = groups.grid.present[rows] & (rank < wanted)
        order.append(np.argsort(rank[:, 0]) + rows.start)
    chosen = VectorGrid(groups.grid.labels, groups.grid.values, present)
    return (chosen.rows(np.concatenate(order)) if len(wanted) == 1 else chosen).inhabited()


def _whole(wanted: Floats) -> Floats:
    if bool(np.isnan(wanted).any()):
        raise PreconditionError("promql.execution", "Parameter value is NaN")
    for limit, name in ((wanted.min() <= -_INT64_MAX, "underflows"), (wanted.max() >= _INT64_MAX, "overflows")):
        if limit:
            worst = wanted.min() if name == "underflows" else wanted.max()
            raise PreconditionError("promql.execution", f"Scalar value {worst:g} {name} int64")
    return np.trunc(wanted)


def _rank(op: AggregateOp, values: Floats, present: Bools) -> Integers:
    """Each element's place among its group's at each step; the absent come last, and NaN before them."""
    match op:
        case AggregateOp.TOPK:
            keys: Floats = -values
        case AggregateOp.BOTTOMK:
            keys = values
        case _:
            keys = np.zeros(values.shape)
    undefined = np.isnan(keys)
    order = np.lexsort((np.where(undefined, 0.0, keys), undefined, ~present), axis=0)
    rank = np.empty(order.shape, dtype=np.int64)
    np.put_along_axis(rank, order, np.arange(len(values))[:, np.newaxis], axis=0)
    return rank


def count_values(node: Aggregate, label: str, grid: VectorGrid, cells_max: int, checkpoint: Checkpoint) -> VectorGrid:
    """How many elements have each value, the value as text in `label`.

    Raises `promql.execution` for no label name and `promql.limit` for more than `cells_max` results over all steps.
    """
    if not label:
        raise PreconditionError("promql.execution", f'invalid label name "{label}"')
    names = node.labels if node.without else (*node.labels, label)
    counts: dict[Labels, Floats] = {}
    steps = grid.values.shape[1]
    for row, labels in enumerate(grid.labels):
        checkpoint()
        others = [pair for pair in labels if pair[0] != label]
        values = grid.values[row]
        # By their bits, so that NaN is one value and -0 another than 0.
        bits = np.ascontiguousarray(np.where(np.isnan(values), np.nan, values)).view(np.int64)
        for found in np.unique(bits[grid.present[row]]):
            where = grid.present[row] & (bits == found)
            text = _plain(float(values[np.argmax(where)]))
            (key,) = group_keys([tuple(sorted([*others, (label, text)]))], names, without=node.without)
            if key not in counts and (len(counts) + 1) * steps > cells_max:
                raise PreconditionError("promql.limit", "count_values() finds too many different values")
            counts.setdefault(key, np.zeros(steps))[where] += 1
    if not counts:
        return VectorGrid.empty(steps)
    table = np.stack(list(counts.values()))
    return VectorGrid(list(counts), table, table > 0)


def _plain(value: float) -> str:
    """A float as count_values() writes it: shortest digits, never an exponent."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return format(Decimal(repr(value)), "f").removesuffix(".0")

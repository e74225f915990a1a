"""Arithmetic and comparison, between scalars and vectors; the matching of two vectors is in matching.py.

Source: Prometheus documentation, "Operators". Division and modulo follow IEEE 754, as in Go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pgherd.promql.ast import BinaryOp
from pgherd.promql.grid import Bools, Floats, ScalarGrid, VectorGrid

_ARITHMETIC: Mapping[BinaryOp, Callable[[Floats, Floats], Any]] = {
    BinaryOp.ADD: np.add,
    BinaryOp.SUB: np.subtract,
    BinaryOp.MUL: np.multiply,
    BinaryOp.DIV: np.divide,
    BinaryOp.MOD: np.fmod,
    BinaryOp.POW: np.float_power,
    BinaryOp.ATAN2: np.arctan2,
}
_COMPARISON: Mapping[BinaryOp, Callable[[Floats, Floats], Any]] = {
    BinaryOp.EQUAL: np.equal,
    BinaryOp.NOT_EQUAL: np.not_equal,
    BinaryOp.LESS: np.less,
    BinaryOp.LESS_EQUAL: np.less_equal,
    BinaryOp.GREATER: np.greater,
    BinaryOp.GREATER_EQUAL: np.greater_equal,
}


def calculate(op: BinaryOp, left: Floats, right: Floats) -> Floats:
    """An arithmetic operator on broadcastable arrays."""
    result: Floats = _ARITHMETIC[op](left, right)
    return result


def compare(op: BinaryOp, left: Floats, right: Floats) -> Bools:
    """A comparison on broadcastable arrays; NaN is unequal to everything."""
    result: Bools = _COMPARISON[op](left, right)
    return result


def between_scalars(op: BinaryOp, left: ScalarGrid, right: ScalarGrid) -> ScalarGrid:
    """Arithmetic, or a comparison with `bool` (the language allows no other between scalars)."""
    if op.is_comparison:
        return ScalarGrid(compare(op, left.values, right.values).astype(np.float64))
    return ScalarGrid(calculate(op, left.values, right.values))


def with_scalar(op: BinaryOp, vector: VectorGrid, scalar: ScalarGrid, *, scalar_first: bool, return_bool: bool) -> VectorGrid:
    """Each element against the step's scalar.

    Arithmetic and `bool` drop the metric name; a filtering comparison keeps the elements as they are.
    """
    left, right = (scalar.values, vector.values) if scalar_first else (vector.values, scalar.values)
    if not op.is_comparison:
        return VectorGrid(vector.labels, calculate(op, left, right), vector.present).nameless()
    holds = compare(op, left, right)
    if return_bool:
        return VectorGrid(vector.labels, holds.astype(np.float64), vector.present).nameless()
    return VectorGrid(vector.labels, vector.values, vector.present & holds).inhabited()

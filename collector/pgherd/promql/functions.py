"""Functions of instant vectors and scalars. Source: Prometheus documentation, "Query functions".

Functions of range vectors are in range_functions.py; absent() and its relatives need the selector's matchers and
are in the engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pgherd.promql.grid import Floats, Grid, Integers, ScalarGrid, VectorGrid
from pgherd.promql.range_functions import RANGE_FUNCTIONS
from pgherd.proto.errors import InvariantError

# (steps in ms, evaluated arguments) → result
InstantFunction = Callable[[Integers, Sequence[Grid]], Grid]


def as_vector(grid: Grid) -> VectorGrid:
    """The argument as an instant vector; the parser has checked that it is one."""
    if not isinstance(grid, VectorGrid):
        raise InvariantError("invariant.broken", f"expected an instant vector, found {type(grid).__name__}")
    return grid


def as_scalar(grid: Grid) -> ScalarGrid:
    """The argument as a scalar; the parser has checked that it is one."""
    if not isinstance(grid, ScalarGrid):
        raise InvariantError("invariant.broken", f"expected a scalar, found {type(grid).__name__}")
    return grid


def _elementwise(compute: Callable[..., Floats]) -> InstantFunction:
    """A function of each element; further arguments are scalars, one value per step. Drops the metric name."""

    def apply(_steps: Integers, arguments: Sequence[Grid]) -> VectorGrid:
        vector = as_vector(arguments[0])
        values = compute(vector.values, *(as_scalar(argument).values for argument in arguments[1:]))
        return VectorGrid(vector.labels, values, vector.present).nameless()

    return apply


def _clamp(values: Floats, low: Floats, high: Floats) -> Floats:
    # A NaN limit makes every element NaN, as math.Max and math.Min do in Go.
    return np.maximum(low, np.minimum(high, values))


def _clamp_function(steps: Integers, arguments: Sequence[Grid]) -> VectorGrid:
    low, high = as_scalar(arguments[1]).values, as_scalar(arguments[2]).values
    clamped = as_vector(_elementwise(_clamp)(steps, arguments))
    # An empty interval holds nothing.
    return VectorGrid(clamped.labels, clamped.values, clamped.present & ~(low > high)).inhabited()


def _round(values: Floats, nearest: Floats | float = 1.0) -> Floats:
    # Ties go up. Dividing by the inverse keeps decimal steps such as 0.1 exact where they can be.
    inverse = 1.0 / np.asarray(nearest, dtype=np.float64)
    return np.floor(values * inverse + 0.5) / inverse


def _time(steps: Integers, _arguments: Sequence[Grid]) -> ScalarGrid:
    return ScalarGrid(steps / 1000.0)


def _pi(steps: Integers, _arguments: Sequence[Grid]) -> ScalarGrid:
    return ScalarGrid(np.full(len(steps), math.pi))


def _vector(_steps: Integers, arguments: Sequence[Grid]) -> VectorGrid:
    values = as_scalar(arguments[0]).values[np.newaxis, :]
    return VectorGrid([()], values, np.ones(values.shape, dtype=np.bool_))


def _scalar(steps: Integers, arguments: Sequence[Grid]) -> ScalarGrid:
    vector = as_vector(arguments[0])
    if not len(vector.labels):
        return ScalarGrid(np.full(len(steps), np.nan))
    only = vector.values[np.argmax(vector.present, axis=0), np.arange(len(steps))]
    return ScalarGrid(np.where(vector.present.sum(axis=0) == 1, only, np.nan))


def _sorted(*, descending: bool) -> InstantFunction:
    """Orders an instant query's result; a range query's result has its own order."""

    def apply(steps: Integers, arguments: Sequence[Grid]) -> VectorGrid:
        vector = as_vector(arguments[0])
        if len(steps) != 1:
            return vector
        values = vector.values[:, 0]
        return vector.rows(np.lexsort((-values if descending else values, np.isnan(values))))

    return apply


INSTANT_FUNCTIONS: Mapping[str, InstantFunction] = {
    "time": _time,
    "pi": _pi,
    "vector": _vector,
    "scalar": _scalar,
    "sort": _sorted(descending=False),
    "sort_desc": _sorted(descending=True),
    "clamp": _clamp_function,
    "clamp_min": _elementwise(lambda values, low: np.maximum(low, values)),
    "clamp_max": _elementwise(lambda values, high: np.minimum(high, values)),
    "round": _elementwise(_round),
    "abs": _elementwise(np.abs),
    "ceil": _elementwise(np.ceil),
    "floor": _elementwise(np.floor),
    "exp": _elementwise(np.exp),
    "ln": _elementwise(np.log),
    "log2": _elementwise(np.log2),
    "log10": _elementwise(np.log10),
    "sqrt": _elementwise(np.sqrt),
    "sgn": _elementwise(np.sign),
    "deg": _elementwise(np.degrees),
    "rad": _elementwise(np.radians),
    "sin": _elementwise(np.sin),
    "cos": _elementwise(np.cos),
    "tan": _elementwise(np.tan),
    "asin": _elementwise(np.arcsin),
    "acos": _elementwise(np.arccos),
    "atan": _elementwise(np.arctan),
    "sinh": _elementwise(np.sinh),
    "cosh": _elementwise(np.cosh),
    "tanh": _elementwise(np.tanh),
    "asinh": _elementwise(np.arcsinh),
    "acosh": _elementwise(np.arccosh),
    "atanh": _elementwise(np.arctanh),
}

# Evaluated by the engine itself, because their meaning needs more than argument values.
ENGINE_FUNCTIONS = frozenset(("absent", "absent_over_time", "quantile_over_time"))

SUPPORTED = frozenset(INSTANT_FUNCTIONS) | frozenset(RANGE_FUNCTIONS) | ENGINE_FUNCTIONS

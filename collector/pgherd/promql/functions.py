"""Functions of instant vectors and scalars. Source: Prometheus documentation, "Query functions".

Functions of range vectors are in range_functions.py; absent() and its relatives need the selector itself and are in
the engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pgherd.promql.annotations import Annotations
from pgherd.promql.dates import DATE_FUNCTIONS
from pgherd.promql.grid import Floats, Grid, Integers, ScalarGrid, StringValue, VectorGrid
from pgherd.promql.histograms import histogram_fraction, histogram_quantile
from pgherd.promql.range_functions import RANGE_FUNCTIONS
from pgherd.promql.relabel import label_join, label_replace, sorted_by_labels
from pgherd.proto.errors import InvariantError


@dataclass(frozen=True, slots=True)
class Setting:
    """What a function sees besides its arguments: the steps' times in ms, and where to note what looks wrong."""

    steps: Integers
    annotations: Annotations


InstantFunction = Callable[[Setting, Sequence[Grid]], Grid]
VectorFunction = Callable[[Setting, Sequence[Grid]], VectorGrid]


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


def as_text(grid: Grid) -> str:
    """The argument as a string; the parser has checked that it is one."""
    if not isinstance(grid, StringValue):
        raise InvariantError("invariant.broken", f"expected a string, found {type(grid).__name__}")
    return grid.value


def _elementwise(compute: Callable[..., Floats]) -> VectorFunction:
    """A function of each element; further arguments are scalars, one value per step. Drops the metric name."""

    def apply(_setting: Setting, arguments: Sequence[Grid]) -> VectorGrid:
        vector = as_vector(arguments[0])
        values = compute(vector.values, *(as_scalar(argument).values for argument in arguments[1:]))
        return VectorGrid(vector.labels, values, vector.present).nameless()

    return apply


def _clamp(values: Floats, low: Floats, high: Floats) -> Floats:
    # A NaN limit makes every element NaN, as math.Max and math.Min do in Go.
    return np.maximum(low, np.minimum(high, values))


def _clamp_function(setting: Setting, arguments: Sequence[Grid]) -> VectorGrid:
    low, high = as_scalar(arguments[1]).values, as_scalar(arguments[2]).values
    clamped = as_vector(_elementwise(_clamp)(setting, arguments))
    # An empty interval holds nothing.
    return VectorGrid(clamped.labels, clamped.values, clamped.present & ~(low > high)).inhabited()


def _round(values: Floats, nearest: Floats | float = 1.0) -> Floats:
    # Ties go up. Dividing by the inverse keeps decimal steps such as 0.1 exact where they can be.
    inverse = 1.0 / np.asarray(nearest, dtype=np.float64)
    return np.floor(values * inverse + 0.5) / inverse


def _time(setting: Setting, _arguments: Sequence[Grid]) -> ScalarGrid:
    return ScalarGrid(setting.steps / 1000.0)


def _pi(setting: Setting, _arguments: Sequence[Grid]) -> ScalarGrid:
    return ScalarGrid(np.full(len(setting.steps), math.pi))


def _everywhere(values: Floats) -> VectorGrid:
    """A vector of one element without labels at every step."""
    return VectorGrid([()], values[np.newaxis, :], np.ones((1, len(values)), dtype=np.bool_))


def _vector(_setting: Setting, arguments: Sequence[Grid]) -> VectorGrid:
    return _everywhere(as_scalar(arguments[0]).values)


def _scalar(setting: Setting, arguments: Sequence[Grid]) -> ScalarGrid:
    vector = as_vector(arguments[0])
    if not len(vector.labels):
        return ScalarGrid(np.full(len(setting.steps), np.nan))
    only = vector.values[np.argmax(vector.present, axis=0), np.arange(len(setting.steps))]
    return ScalarGrid(np.where(vector.present.sum(axis=0) == 1, only, np.nan))


def _of_date(part: Callable[[Floats], Floats]) -> InstantFunction:
    """A part of the date that each element is, or of the step's own time when there is no argument."""

    def apply(setting: Setting, arguments: Sequence[Grid]) -> VectorGrid:
        return _elementwise(part)(setting, arguments or [_everywhere(np.floor(setting.steps / 1000.0))])

    return apply


def _timestamp(setting: Setting, arguments: Sequence[Grid]) -> VectorGrid:
    """Of computed elements: the step's time. Those of selectors have their own, which the engine knows."""
    return _elementwise(lambda values: np.broadcast_to(setting.steps / 1000.0, values.shape))(setting, arguments)


def _ordered(order: Callable[[VectorGrid, Sequence[Grid]], VectorGrid]) -> InstantFunction:
    """Orders an instant query's result; a range query's result has its own order."""

    def apply(setting: Setting, arguments: Sequence[Grid]) -> VectorGrid:
        vector = as_vector(arguments[0])
        if len(setting.steps) == 1:
            return order(vector, arguments[1:])
        setting.annotations.warn("sort is ineffective for range queries since results are always ordered by labels")
        return vector

    return apply


def _by_value(vector: VectorGrid, *, descending: bool) -> VectorGrid:
    values = vector.values[:, 0]
    return vector.rows(np.lexsort((-values if descending else values, np.isnan(values))))


def _by_label(vector: VectorGrid, names: Sequence[Grid], *, descending: bool) -> VectorGrid:
    return sorted_by_labels(vector, [as_text(name) for name in names], descending=descending)


def _label_replace(_setting: Setting, arguments: Sequence[Grid]) -> VectorGrid:
    target, replacement, source, pattern = (as_text(argument) for argument in arguments[1:])
    return label_replace(as_vector(arguments[0]), target, replacement, source, pattern)


def _label_join(_setting: Setting, arguments: Sequence[Grid]) -> VectorGrid:
    target, separator, *sources = (as_text(argument) for argument in arguments[1:])
    return label_join(as_vector(arguments[0]), target, separator, sources)


def _histogram_quantile(setting: Setting, arguments: Sequence[Grid]) -> VectorGrid:
    return histogram_quantile(as_scalar(arguments[0]).values, as_vector(arguments[1]), setting.annotations)


def _histogram_fraction(setting: Setting, arguments: Sequence[Grid]) -> VectorGrid:
    lower, upper = as_scalar(arguments[0]).values, as_scalar(arguments[1]).values
    return histogram_fraction(lower, upper, as_vector(arguments[2]), setting.annotations)


INSTANT_FUNCTIONS: Mapping[str, InstantFunction] = {
    "time": _time,
    "pi": _pi,
    "vector": _vector,
    "scalar": _scalar,
    "timestamp": _timestamp,
    "sort": _ordered(lambda vector, _: _by_value(vector, descending=False)),
    "sort_desc": _ordered(lambda vector, _: _by_value(vector, descending=True)),
    "sort_by_label": _ordered(lambda vector, names: _by_label(vector, names, descending=False)),
    "sort_by_label_desc": _ordered(lambda vector, names: _by_label(vector, names, descending=True)),
    "label_replace": _label_replace,
    "label_join": _label_join,
    "histogram_quantile": _histogram_quantile,
    "histogram_fraction": _histogram_fraction,
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
    "deg": _elementwise(lambda values: values * 180 / math.pi),
    "rad": _elementwise(lambda values: values * math.pi / 180),
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
    **{name: _of_date(part) for name, part in DATE_FUNCTIONS.items()},
}

# Evaluated by the engine itself, because their meaning needs more than argument values.
ENGINE_FUNCTIONS = frozenset(("absent", "absent_over_time"))

SUPPORTED = frozenset(INSTANT_FUNCTIONS) | frozenset(RANGE_FUNCTIONS) | ENGINE_FUNCTIONS

"""Where a series is heading: linear regression and double exponential smoothing over every range at once.

Source: Prometheus documentation, "deriv", "predict_linear", "double_exponential_smoothing".
"""

from __future__ import annotations

import numpy as np

from pgherd.promql.grid import Floats, Integers
from pgherd.promql.sums import Compensated
from pgherd.promql.windows import RangeWindow
from pgherd.proto.errors import PreconditionError


def derivative(window: RangeWindow) -> Floats:
    """Slope per second."""
    slope, _ = _regression(window, window.times_ms[window.low])
    return slope


def prediction(window: RangeWindow, ahead_s: Floats) -> Floats:
    """The value that the regression line has `ahead_s` after each step's own time."""
    slope, now = _regression(window, window.at_ms)
    return slope * ahead_s + now


def _regression(window: RangeWindow, zero_ms: Integers) -> tuple[Floats, Floats]:
    """Least squares: slope per second and the line's value at `zero_ms`."""
    shape = (window.values.shape[0], len(window.low))
    sum_y, sum_xy = Compensated.zeros(shape), Compensated.zeros(shape)
    sum_x, sum_xx = Compensated.zeros((1, shape[1])), Compensated.zeros((1, shape[1]))
    first = window.values[:, window.low]
    constant = np.ones(shape, dtype=np.bool_)
    for columns, places in window.rounds():
        x = ((window.times_ms[places] - zero_ms[columns]) / 1e3)[np.newaxis, :]
        y = window.values[:, places]
        sum_x.add(columns, x)
        sum_y.add(columns, y)
        sum_xy.add(columns, x * y)
        sum_xx.add(columns, x * x)
        constant[:, columns] &= y == first[:, columns]
    counts = window.counts
    x, y = sum_x.value(), sum_y.value()
    slope = (sum_xy.value() - x * y / counts) / (sum_xx.value() - x * x / counts)
    level = y / counts - slope * x / counts
    # A constant has no rounding in its slope, and an infinite one has no slope.
    flat = np.where(np.isinf(first), np.nan, 0.0)
    return np.where(constant, flat, slope), np.where(constant, first + flat, level)


def smoothed(window: RangeWindow, smoothing: Floats, trend: Floats) -> Floats:
    """The last smoothed value. Raises `promql.execution` for a factor outside (0, 1)."""
    for name, factor in (("smoothing", smoothing), ("trend", trend)):
        for wrong in factor[(factor <= 0) | (factor >= 1)][:1]:
            raise PreconditionError("promql.execution", f"invalid {name} factor. Expected: 0 < factor < 1, got: {wrong:f}")
    shape = (window.values.shape[0], len(window.low))
    before, level, slope = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for place, (columns, places) in enumerate(window.rounds()):
        samples = window.values[:, places]
        if place == 0:
            level[:, columns] = samples
            continue
        if place == 1:
            slope[:, columns] = samples - level[:, columns]
        else:
            moved = trend[columns] * (level[:, columns] - before[:, columns])
            slope[:, columns] = moved + (1 - trend[columns]) * slope[:, columns]
        after = smoothing[columns] * samples + (1 - smoothing[columns]) * (level[:, columns] + slope[:, columns])
        before[:, columns], level[:, columns] = level[:, columns], after
    return level

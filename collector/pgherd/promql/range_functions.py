"""Functions of range vectors, each over all series and steps of a window at once.

Source: Prometheus documentation, "Query functions"; the extrapolation of rate() and its relatives follows
Prometheus 3 (the distance to the counter's zero shortens the extrapolation after the threshold was applied).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np

from pgherd.promql.grid import Bools, Floats, Integers
from pgherd.promql.quantiles import median_of_rows, quantile_of_rows
from pgherd.promql.smoothing import derivative, prediction, smoothed
from pgherd.promql.sums import Compensated, Mean, sums_are_exact, window_reduce
from pgherd.promql.windows import RangeWindow

# "Close to the boundary": up to 10 % more than the average distance of samples.
_EXTRAPOLATION_SLACK = 1.1
# Elements of a gathered (steps × longest window) matrix that are held at once.
_GATHER_CELLS = 1_000_000


@dataclass(frozen=True, slots=True)
class RangeFunctionInfo:
    """How the engine applies a range function.

    `compute` takes the window and the function's scalar arguments, one value per column of the window.
    """

    compute: Callable[..., Floats]
    samples_min: int = 1
    keeps_name: bool = False
    wants_counter: bool = False


def extrapolated(window: RangeWindow, *, is_counter: bool, per_second: bool) -> Floats:
    """Increase over the whole range, extrapolated from the first and last sample to the range's ends."""
    times, last_index = window.times_ms, window.high - 1
    first = window.values[:, window.low]
    result = window.values[:, last_index] - first
    if is_counter:
        _add_what_resets_took(window, result)
    sampled_s = (times[last_index] - times[window.low]) / 1000.0
    average_s = sampled_s / (window.counts - 1)
    to_start_s = _bounded((times[window.low] - window.start_ms) / 1000.0, average_s)
    to_end_s = _bounded((window.end_ms - times[last_index]) / 1000.0, average_s)
    covered_s = sampled_s + to_start_s + to_end_s
    if is_counter:
        # A counter isn't negative: go back at most to where the observed slope would have started from zero.
        to_zero_s = sampled_s * (first / result)
        shortened = (result > 0) & (first >= 0) & (to_zero_s < to_start_s)
        covered_s = np.where(shortened, sampled_s + to_zero_s + to_end_s, covered_s)
    factor = covered_s / sampled_s
    if per_second:
        factor = factor / ((window.end_ms - window.start_ms) / 1000.0)
    result *= factor
    return result


def _bounded(gap_s: Floats, average_s: Floats) -> Floats:
    return np.where(gap_s >= average_s * _EXTRAPOLATION_SLACK, average_s / 2, gap_s)


def _add_what_resets_took(window: RangeWindow, result: Floats) -> None:
    """Add the value just before each counter reset, one after the other as Prometheus does: the last digits depend on it."""
    rows = np.flatnonzero((window.values[:, 1:] < window.values[:, :-1]).any(axis=1))
    if not len(rows):
        return
    values, total = window.values[rows], result[rows]
    for columns, places in islice(window.rounds(), 1, None):
        before = values[:, places - 1]
        total[:, columns] += np.where(values[:, places] < before, before, 0.0)
    result[rows] = total


def _sum(window: RangeWindow) -> Floats:
    if sums_are_exact(window.values, int(window.counts.max())):
        return window_reduce(np.add, window.values, window.low, window.high)
    sums = Compensated.zeros((window.values.shape[0], len(window.low)))
    for columns, places in window.rounds():
        sums.add(columns, window.values[:, places])
    return sums.value()


def _average(window: RangeWindow) -> Floats:
    if sums_are_exact(window.values, int(window.counts.max())):
        return window_reduce(np.add, window.values, window.low, window.high) / window.counts
    mean = Mean.zeros((window.values.shape[0], len(window.low)))
    for columns, places in window.rounds():
        mean.add((slice(None), columns), window.values[:, places])
    return mean.value()


def _variance(window: RangeWindow) -> Floats:
    """Welford's recurrence over compensated sums: Prometheus' order of operations, since the result's last digits depend on it."""
    shape = (window.values.shape[0], len(window.low))
    mean, squares = Compensated.zeros(shape), Compensated.zeros(shape)
    for count, (columns, places) in enumerate(window.rounds(), start=1):
        samples = window.values[:, places]
        deviation = samples - (mean.total[:, columns] + mean.error[:, columns])
        mean.add(columns, deviation / count)
        squares.add(columns, deviation * (samples - (mean.total[:, columns] + mean.error[:, columns])))
    return squares.value() / window.counts


def _quantile(window: RangeWindow, quantile: Floats) -> Floats:
    result = np.empty((window.values.shape[0], len(window.low)))
    for row, steps, samples, inside in _gathered(window):
        result[row, steps] = quantile_of_rows(samples, inside, quantile[steps])
    return result


def _median_deviation(window: RangeWindow) -> Floats:
    """The median of the distances from the median; NaN as soon as one sample is."""
    result = np.empty((window.values.shape[0], len(window.low)))
    for row, steps, samples, inside in _gathered(window):
        distances = np.abs(samples - median_of_rows(samples, inside)[:, np.newaxis])
        undefined = (inside & np.isnan(samples)).any(axis=1)
        result[row, steps] = np.where(undefined, np.nan, median_of_rows(distances, inside))
    return result


def _gathered(window: RangeWindow) -> Iterator[tuple[int, slice, Floats, Bools]]:
    """Per series and some steps: the windows as rows of a padded matrix, and which of its elements are real."""
    longest = int(window.counts.max())
    lines = max(1, _GATHER_CELLS // longest)
    for start in range(0, len(window.low), lines):
        steps = slice(start, start + lines)
        reach = np.arange(longest)[np.newaxis, :]
        inside = reach < window.counts[steps, np.newaxis]
        index = np.minimum(window.low[steps, np.newaxis] + reach, len(window.times_ms) - 1)
        for row in range(window.values.shape[0]):
            yield row, steps, window.values[row][index], inside


def _instant_delta(window: RangeWindow, *, per_second: bool) -> Floats:
    """irate() and idelta(): from the last two samples only."""
    last, previous = window.values[:, window.high - 1], window.values[:, window.high - 2]
    if not per_second:
        return last - previous
    elapsed_s = (window.times_ms[window.high - 1] - window.times_ms[window.high - 2]) / 1000.0
    return np.where(last < previous, last, last - previous) / elapsed_s


def _count_pairs(window: RangeWindow, happened: Bools) -> Floats:
    """How many neighbouring pairs within each window satisfy `happened` (S, N-1)."""
    running = np.zeros(window.values.shape, dtype=np.int64)
    np.cumsum(happened, axis=1, out=running[:, 1:])
    return (running[:, window.high - 1] - running[:, window.low]).astype(np.float64)


def _changes(window: RangeWindow) -> Floats:
    before, after = window.values[:, :-1], window.values[:, 1:]
    return _count_pairs(window, (before != after) & ~(np.isnan(before) & np.isnan(after)))


def _resets(window: RangeWindow) -> Floats:
    return _count_pairs(window, window.values[:, 1:] < window.values[:, :-1])


def _spread(window: RangeWindow, row: Integers | Floats) -> Floats:
    """A result that is the same for every series."""
    return np.broadcast_to(np.asarray(row, dtype=np.float64), (window.values.shape[0], len(window.low)))


RANGE_FUNCTIONS: Mapping[str, RangeFunctionInfo] = {
    "rate": RangeFunctionInfo(lambda window: extrapolated(window, is_counter=True, per_second=True), 2, wants_counter=True),
    "increase": RangeFunctionInfo(
        lambda window: extrapolated(window, is_counter=True, per_second=False), 2, wants_counter=True
    ),
    "delta": RangeFunctionInfo(lambda window: extrapolated(window, is_counter=False, per_second=False), samples_min=2),
    "irate": RangeFunctionInfo(lambda window: _instant_delta(window, per_second=True), samples_min=2),
    "idelta": RangeFunctionInfo(lambda window: _instant_delta(window, per_second=False), samples_min=2),
    "changes": RangeFunctionInfo(_changes),
    "resets": RangeFunctionInfo(_resets),
    "avg_over_time": RangeFunctionInfo(_average),
    "min_over_time": RangeFunctionInfo(lambda window: window_reduce(np.fmin, window.values, window.low, window.high)),
    "max_over_time": RangeFunctionInfo(lambda window: window_reduce(np.fmax, window.values, window.low, window.high)),
    "sum_over_time": RangeFunctionInfo(_sum),
    "count_over_time": RangeFunctionInfo(lambda window: _spread(window, window.counts)),
    "present_over_time": RangeFunctionInfo(lambda window: _spread(window, np.ones(len(window.low)))),
    "first_over_time": RangeFunctionInfo(lambda window: window.values[:, window.low], keeps_name=True),
    "last_over_time": RangeFunctionInfo(lambda window: window.values[:, window.high - 1], keeps_name=True),
    "stddev_over_time": RangeFunctionInfo(lambda window: np.sqrt(_variance(window))),
    "stdvar_over_time": RangeFunctionInfo(_variance),
    "quantile_over_time": RangeFunctionInfo(_quantile),
    "mad_over_time": RangeFunctionInfo(_median_deviation),
    "deriv": RangeFunctionInfo(derivative, samples_min=2),
    "predict_linear": RangeFunctionInfo(prediction, samples_min=2),
    "double_exponential_smoothing": RangeFunctionInfo(smoothed, samples_min=2),
}

"""Sums over many segments at once, exact where cancellation would show.

`np.add.reduceat` adds every segment in one pass; where large terms cancel, the few cells whose rounding could
exceed a relative 1e-12 are added again exactly. Prometheus uses compensated (Kahan-Neumaier) sums to the same end.
"""

from __future__ import annotations

import math

import numpy as np

from pgherd.promql.grid import Bools, Floats, Integers

_EPSILON = float(np.finfo(np.float64).eps)
_TOLERANCE = 1e-12


def window_reduce(ufunc: np.ufunc, values: Floats, low: Integers, high: Integers) -> Floats:
    """`ufunc` over `values[s, low[t]:high[t]]`: (S, N) → (S, T). Every segment has at least one element."""
    padded = np.concatenate((values, np.zeros((values.shape[0], 1))), axis=1)
    bounds = np.empty(2 * len(low), dtype=np.intp)
    bounds[0::2] = low
    bounds[1::2] = high
    reduced: Floats = ufunc.reduceat(padded, bounds, axis=1)[:, ::2]
    return reduced


def window_sums(values: Floats, low: Integers, high: Integers) -> Floats:
    """Sum of `values[s, low[t]:high[t]]`: (S, N) → (S, T)."""
    totals = window_reduce(np.add, values, low, high)
    if bool((values >= 0).all()):
        return totals
    magnitudes = window_reduce(np.add, np.abs(values), low, high)
    for row, step in np.argwhere(_is_doubtful(totals, magnitudes, (high - low)[np.newaxis, :])):
        totals[row, step] = math.fsum(values[row, low[step] : high[step]])
    return totals


def group_sums(values: Floats, starts: Integers) -> Floats:
    """Sum of rows `values[starts[g]:starts[g + 1]]`, the last group to the end: (S, T) → (G, T)."""
    totals: Floats = np.add.reduceat(values, starts, axis=0)
    if bool((values >= 0).all()):
        return totals
    magnitudes = np.add.reduceat(np.abs(values), starts, axis=0)
    ends = np.append(starts[1:], values.shape[0])
    for group, step in np.argwhere(_is_doubtful(totals, magnitudes, (ends - starts)[:, np.newaxis])):
        totals[group, step] = math.fsum(values[starts[group] : ends[group], step])
    return totals


def _is_doubtful(totals: Floats, magnitudes: Floats, counts: Integers) -> Bools:
    doubtful: Bools = np.isfinite(magnitudes) & (magnitudes * counts * _EPSILON > _TOLERANCE * np.abs(totals))
    return doubtful

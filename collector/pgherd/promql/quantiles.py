"""Quantiles of many small samples at once. Source: Prometheus documentation, "quantile" and "quantile_over_time"."""

from __future__ import annotations

import numpy as np

from pgherd.promql.annotations import Annotations
from pgherd.promql.grid import Bools, Floats


def quantile_of_rows(samples: Floats, inside: Bools, quantile: Floats) -> Floats:
    """The φ-quantile of each row's elements that are `inside`, interpolated linearly: (L, N) and φ of (L,) → (L,).

    ±Inf for φ outside [0, 1], NaN for a NaN φ. Every row has at least one element.
    """
    counts = inside.sum(axis=1)
    # Prometheus sorts NaN before everything, numpy after: NaN inside becomes the least, padding the greatest.
    nans = (inside & np.isnan(samples)).sum(axis=1)
    ordered = np.sort(np.where(inside & ~np.isnan(samples), samples, np.inf), axis=1)
    rank = np.where(np.isnan(quantile), 0.0, np.clip(quantile, 0, 1)) * (counts - 1)
    below = np.floor(rank).astype(np.int64)
    above = np.minimum(below + 1, counts - 1)
    weight = rank - below
    lines = np.arange(len(counts))
    lower = np.where(below < nans, np.nan, ordered[lines, np.maximum(below - nans, 0)])
    upper = np.where(above < nans, np.nan, ordered[lines, np.maximum(above - nans, 0)])
    found = lower * (1 - weight) + upper * weight
    found = np.where(quantile < 0, -np.inf, np.where(quantile > 1, np.inf, found))
    return np.where(np.isnan(quantile), np.nan, found)


def median_of_rows(samples: Floats, inside: Bools) -> Floats:
    """The median of each row's elements that are `inside`."""
    return quantile_of_rows(samples, inside, np.full(samples.shape[0], 0.5))


def judge_quantile(quantile: Floats, annotations: Annotations) -> None:
    """Warn of a φ that is none."""
    for value in np.unique(quantile[np.isnan(quantile) | (quantile < 0) | (quantile > 1)]):
        shown = "NaN" if np.isnan(value) else f"{value:+g}".replace("inf", "Inf") if np.isinf(value) else f"{value:g}"
        annotations.warn(f"quantile value should be between 0 and 1, got {shown}")

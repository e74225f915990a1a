"""Exact binomial bounds without a numerics library. Pure.

Clopper–Pearson, not Wilson: the question is whether a share is above one percent, often with a handful of hits among
a few hundred statements. There Wilson's lower bound says "above" up to twice as often as its confidence allows, and
a wrong page costs more than a late one. Exact bounds are never short of their confidence.

Source: Clopper and Pearson 1934 (bounds as quantiles of the beta distribution); the regularised incomplete beta
function by its continued fraction, DLMF 8.17.22, evaluated by Lentz' method.
"""

from __future__ import annotations

import math
from typing import Final

_TERMS_MAX: Final = 500
_TINY: Final = 1e-300
_PRECISION: Final = 1e-12
_BISECTIONS: Final = 60
_NONE: Final = 1e-6  # of a hit: so small a weight is none, and the fraction doesn't converge for it


def share_bounds(hits: float, trials: float, confidence: float) -> tuple[float, float]:
    """(low, high): each side alone holds the true share with `confidence`.

    Fractions of hits are allowed (weighted counts); no trials at all know nothing: (0, 1).
    """
    if trials <= 0:
        return 0.0, 1.0
    hits = min(max(0.0, hits), trials)
    tail = 1.0 - confidence
    low = 0.0 if hits < _NONE else _beta_quantile(tail, hits, trials - hits + 1)
    high = 1.0 if trials - hits < _NONE else _beta_quantile(1.0 - tail, hits + 1, trials - hits)
    return low, high


def _beta_quantile(probability: float, a: float, b: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if incomplete_beta(middle, a, b) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b)."""
    if x <= 0.0:
        return 0.0
    if x >= 1.0:
        return 1.0
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast only on its own side of the mean
        return 1.0 - incomplete_beta(1.0 - x, b, a)
    log_front = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return math.exp(log_front) * _fraction(x, a, b) / a


def _fraction(x: float, a: float, b: float) -> float:
    c, d = 1.0, _away_from_zero(1.0 - (a + b) * x / (a + 1.0))
    d = 1.0 / d
    value = d
    for m in range(1, _TERMS_MAX):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 / _away_from_zero(1.0 + term * d)
            c = _away_from_zero(1.0 + term / c)
            value *= d * c
        if abs(d * c - 1.0) < _PRECISION:
            break
    return value


def _away_from_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY

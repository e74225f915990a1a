"""Histograms as Prometheus' classic buckets: exponential ones on ladders that the data can't move. Pure.

An exponential histogram names only buckets that something fell into, and changes its resolution while it lives. A
series that appears with its first observation, or whose bound moves, looks to `rate` like a jump. So its counts are
read off at bounds that depend on the metric's unit alone, all of them every time.

Stated error: bounds are powers of two, so a source at least as fine as the ladder gives exact counts, and
`histogram_quantile` is off by at most one step of the ladder (`Ladder.step_ratio` − 1 at that place). A coarser
source's bucket counts as below every bound inside it: then its own width is the error, and no count ever falls.

Source: opentelemetry-proto metrics.proto (ExponentialHistogramDataPoint), OpenTelemetry specification
"Metrics Data Model" (ExponentialHistogram, exponential buckets).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

SCALE_MIN, SCALE_MAX = -10, 20  # the specification's own bounds
_COUNT_MASK = (1 << 64) - 1


@lru_cache(maxsize=4096)
def bound_text(bound: float) -> str:
    """A bound as the value of `le`: the shortest decimal, without an exponent, as Prometheus' OTLP receiver writes it."""
    if math.isinf(bound):
        return "+Inf" if bound > 0 else "-Inf"
    text = format(Decimal(repr(bound)), "f")
    return text.removesuffix(".0")


@dataclass(frozen=True, slots=True, eq=False)
class Ladder:
    """Ascending bounds, as exponents of two and as label values."""

    exponents: tuple[float, ...]
    texts: tuple[str, ...] = ()
    _exponents: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))

    @classmethod
    def of(cls, *spans: tuple[int, int, int]) -> Ladder:
        """Bounds of adjoining spans (first exponent, last exponent, steps per octave)."""
        exponents = [low + step / steps for low, high, steps in spans for step in range((high - low) * steps)]
        exponents.append(spans[-1][1])
        made = tuple(float(exponent) for exponent in exponents)
        return cls(made, tuple(bound_text(2.0**exponent) for exponent in made), np.array(made))

    def step_ratio(self, value: float) -> float:
        """Upper over lower bound of the bucket that `value` falls into; infinite outside the ladder."""
        place = int(np.searchsorted(self._exponents, math.log2(value)))
        if not 0 < place < len(self.exponents):
            return math.inf
        return float(2.0 ** (self.exponents[place] - self.exponents[place - 1]))

    def read(self, point: Any) -> list[float]:
        """How many observations of an ExponentialHistogramDataPoint lie at or below each bound."""
        counts = np.array(point.positive.bucket_counts, np.uint64)
        running = np.concatenate([np.zeros(1, np.uint64), np.cumsum(counts, dtype=np.uint64)])
        below = (point.zero_count + sum(point.negative.bucket_counts)) & _COUNT_MASK
        # Bucket i of scale s holds (2^(i/2^s), 2^((i+1)/2^s)]: below a bound are the buckets that begin below it.
        place = np.ceil(self._exponents * 2.0**point.scale) - point.positive.offset
        at = np.clip(place, 0, len(counts)).astype(np.intp)
        return [float(count) for count in running[at] + np.uint64(below)]


# 15 series more per octave would be finer than anybody reads; these bound what a histogram costs.
_SECONDS = Ladder.of((-17, -10, 1), (-10, 3, 4), (3, 10, 1))  # ±19 % from 1 ms to 8 s, else a factor of two
_SECONDS_FINE = Ladder.of((-17, -10, 2), (-10, 3, 8), (3, 10, 2))  # ±9 % from 1 ms to 8 s, else ±41 %
_MILLISECONDS = Ladder.of((-7, 0, 1), (0, 13, 4), (13, 20, 1))
_ANY = Ladder.of((-16, 48, 1))


def ladder_of(unit: str, *, is_ours: bool) -> Ladder:
    """The ladder of a metric; statement durations of our own agents get the finer one."""
    match unit:
        case "s":
            return _SECONDS_FINE if is_ours else _SECONDS
        case "ms":
            return _MILLISECONDS
        case _:
            return _ANY


@lru_cache(maxsize=1024)
def bound_texts(bounds: tuple[float, ...]) -> tuple[str, ...] | None:
    """Values of `le` for an explicit histogram's bounds; None when they don't ascend or aren't finite."""
    ascending = all(low < high for low, high in pairwise(bounds))
    return tuple(map(bound_text, bounds)) if ascending and all(map(math.isfinite, bounds)) else None


def running_counts(bucket_counts: Sequence[int]) -> list[float]:
    """Cumulative counts of an explicit histogram's buckets, its last (+Inf) left out: modulo 2^64, as they are on the wire."""
    total, running = 0, []
    for count in bucket_counts[:-1]:
        total = (total + count) & _COUNT_MASK
        running.append(float(total))
    return running

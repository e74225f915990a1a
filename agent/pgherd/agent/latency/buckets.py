"""Durations counted in exponential buckets: all that a window remembers of them, in bounded memory. Pure.

Never broken: at most (MAX_INDEX − MIN_INDEX + 1) buckets exist, whatever is added; a value's bucket holds the
value, up to the two ends, where smaller and larger ones are kept too; downscaling moves no count out of a bucket
that holds it. At SCALE a bucket is 1.1 % wide, so a bucket's middle is within 0.6 % of any value in it.

Source: opentelemetry-proto metrics.proto (ExponentialHistogramDataPoint): bucket i of scale s holds
(2^(i/2^s), 2^((i+1)/2^s)].
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Final

SCALE: Final = 6
_PER_OCTAVE: Final = 1 << SCALE
BUCKET_RATIO: Final = 2.0 ** (1 / _PER_OCTAVE)  # a bucket's upper over its lower bound
MIN_INDEX: Final = -20 * _PER_OCTAVE  # about a microsecond, the resolution of PostgreSQL's clock
MAX_INDEX: Final = 20 * _PER_OCTAVE - 1  # twelve days


def index_of(seconds: float) -> int:
    """The bucket that a duration falls into; not positive ones fall into the first."""
    if seconds <= 0.0:
        return MIN_INDEX
    return min(MAX_INDEX, max(MIN_INDEX, math.ceil(math.log2(seconds) * _PER_OCTAVE) - 1))


def lower_bound(index: int) -> float:
    """Seconds above which a bucket begins."""
    return float(2.0 ** (index / _PER_OCTAVE))


def middle(index: int) -> float:
    """The geometric middle of a bucket, seconds."""
    return float(2.0 ** ((index + 0.5) / _PER_OCTAVE))


class Buckets:
    """How many durations fell into each bucket; counts may be weights."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts: dict[int, float] = {}
        self.total = 0.0

    def add(self, seconds: float, weight: float = 1.0) -> None:
        self.add_index(index_of(seconds), weight)

    def add_index(self, index: int, weight: float = 1.0) -> None:
        self.counts[index] = self.counts.get(index, 0.0) + weight
        self.total += weight

    def merge(self, others: Iterable[Buckets]) -> None:
        for other in others:
            for index, weight in other.counts.items():
                self.add_index(index, weight)

    def __iter__(self) -> Iterator[tuple[int, float]]:
        """(index, weight), ascending."""
        return iter(sorted(self.counts.items()))

    def sum(self) -> float:
        """Seconds in all, each at its bucket's middle."""
        return sum(middle(index) * weight for index, weight in self.counts.items())

    def above(self, seconds: float) -> float:
        """Weight of the buckets whose middle lies above `seconds`."""
        return sum(weight for index, weight in self.counts.items() if middle(index) > seconds)

    def quantile(self, share: float) -> float:
        """The duration below which `share` (0 … 1) of the weight lies, interpolated inside its bucket. Needs total > 0."""
        wanted = min(1.0, max(0.0, share)) * self.total
        running = 0.0
        index = MIN_INDEX
        for index, weight in self:
            if running + weight >= wanted:
                return float(2.0 ** ((index + (wanted - running) / weight) / _PER_OCTAVE))
            running += weight
        return lower_bound(index + 1)

"""Results of a query, as callers and the HTTP API see them.

`labels` are plain mappings that include `__name__` where the result has one; times are milliseconds since the epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Scalar:
    """One float without labels."""

    at_ms: int
    value: float


@dataclass(frozen=True, slots=True)
class String:
    """A string literal's value."""

    at_ms: int
    value: str


@dataclass(frozen=True, slots=True)
class VectorSample:
    """One element of an instant vector."""

    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class Vector:
    """An instant vector; label sets are distinct."""

    at_ms: int
    samples: Sequence[VectorSample]


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """One series of a range query: `times_ms` ascending, never empty, as long as `values`."""

    labels: Mapping[str, str]
    times_ms: NDArray[np.int64]
    values: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """Series ordered by labels."""

    series: Sequence[Series]


Value = Scalar | String | Vector | Matrix

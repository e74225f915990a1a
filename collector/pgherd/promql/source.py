"""What the engine asks of a series store: the ports of PromQL.

Implemented structurally (pgherd.storage.series in the product, tests/support/memory_series.py in tests);
the engine fetches everything a query needs first and evaluates afterwards, so a store never waits for arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pgherd.proto.selectors import Matcher

# Times handed to a source stay within ±2^43 ms (the year 2248): a store may hold nanoseconds in 64 bits.
TIME_MAX_MS = 2**43


class SeriesWindow(Protocol):
    """One series' samples within the range that was asked for."""

    @property
    def labels(self) -> Mapping[str, str]:
        """All labels, `__name__` included; no empty values."""
        ...

    @property
    def times_ms(self) -> NDArray[np.int64]:
        """Strictly ascending milliseconds since the epoch. Series of one cycle may share one array."""
        ...

    @property
    def values(self) -> NDArray[np.float64]:
        """As many values; a stale marker keeps its payload bits (proto.samples.STALE_NAN_BITS)."""
        ...


class Metadata(Protocol):
    """What a metric family said about itself."""

    @property
    def kind(self) -> str:
        """gauge, counter, histogram, summary or unknown."""
        ...

    @property
    def help(self) -> str: ...

    @property
    def unit(self) -> str: ...


class SeriesSource(Protocol):
    """Selection of samples: all that evaluation needs."""

    def select(self, matchers: Sequence[Matcher], start_ms: int, end_ms: int) -> Sequence[SeriesWindow]:
        """Every series that satisfies all matchers, with its samples in the closed range [start, end].

        Series without samples in the range may be left out. Raises PgherdError (`store.unavailable`, `query.timeout`).
        """
        ...


class CatalogSource(SeriesSource, Protocol):
    """The source together with the questions that the HTTP API's browsing endpoints ask.

    The time range narrows as far as the store can tell; answering for a wider range is allowed.
    """

    def label_names(self, matchers: Sequence[Matcher], start_ms: int, end_ms: int) -> Sequence[str]:
        """Names of all labels of the matching series (of every series when there are no matchers)."""
        ...

    def label_values(self, name: str, matchers: Sequence[Matcher], start_ms: int, end_ms: int) -> Sequence[str]:
        """Distinct non-empty values of one label among the matching series."""
        ...

    def series(self, matchers: Sequence[Matcher], start_ms: int, end_ms: int) -> Sequence[Mapping[str, str]]:
        """Label sets of the matching series."""
        ...

    def metadata(self) -> Mapping[str, Metadata]:
        """Metadata by metric name."""
        ...

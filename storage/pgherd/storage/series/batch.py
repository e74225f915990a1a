"""What goes into the series store and what the store answers. Pure.

Never broken:
- labels of a series are sorted by name, hold `__name__`, and no label has an empty value;
- a batch's columns have one length, and `series` points into its layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pgherd.proto.samples import Metric
from pgherd.proto.selectors import NAME_LABEL

Labels: TypeAlias = tuple[tuple[str, str], ...]

_LABEL_OVERHEAD_BYTES = 120  # two str headers and a tuple
_POINT_BYTES = 4 + 8 + 8


def labels_of(labels: Mapping[str, str]) -> Labels:
    """The canonical form of a label set: sorted, empty values dropped (they mean "absent" in Prometheus)."""
    return tuple(sorted((name, value) for name, value in labels.items() if value))


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class SeriesLayout:
    """The distinct series of a batch, with what is known of their metrics.

    Identity matters: a sender that ships the same series every cycle passes the same object, and the
    writer resolves it to series ids once.
    """

    labels: tuple[Labels, ...]
    metrics: tuple[Metric, ...] = ()
    deltas: tuple[int, ...] = ()  # places in `labels` whose values are increases, to be added up by the store
    size_bytes: int = 0  # filled from the labels

    def __post_init__(self) -> None:
        for labels in self.labels:
            if not any(name == NAME_LABEL for name, _ in labels):
                raise ValueError(f"series without a name: {labels!r}")
        size = sum(len(name) + len(value) + _LABEL_OVERHEAD_BYTES for labels in self.labels for name, value in labels)
        object.__setattr__(self, "size_bytes", size)


@dataclass(frozen=True, slots=True)
class Shipment:
    """Where a batch stands in its sender's sequence: counted from 1, +1 per shipped batch of an incarnation."""

    agent_id: str
    incarnation: str
    sequence: int

    def __post_init__(self) -> None:
        if not 1 <= self.sequence < 1 << 63:
            raise ValueError(f"shipment sequence out of range: {self.sequence}")

    @property
    def key(self) -> tuple[str, str]:
        return self.agent_id, self.incarnation


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Points in columns: `series[i]` (an index into `layout.labels`) had `values[i]` at `times_ms[i]`.

    int32, int64 (milliseconds since the epoch) and float64 whose NaN payload bits are kept. Without a
    shipment (foreign OTLP clients) it is stored as often as it is sent; readers see one value per time, and an
    increase counts once because its time tells a repeat.
    An empty batch with a shipment still moves the high-water mark.
    """

    layout: SeriesLayout
    series: NDArray[np.int32]
    times_ms: NDArray[np.int64]
    values: NDArray[np.float64]
    shipment: Shipment | None = None
    owner: str = ""  # who sends it: new series count into its share; "" is the collector itself
    # The data point of the shipment that each sample is from, ascending: a histogram's point is many samples. None: each is one.
    origins: NDArray[np.int32] | None = None

    def __post_init__(self) -> None:
        if not len(self.series) == len(self.times_ms) == len(self.values):
            raise ValueError("columns of different length")
        if self.origins is not None and len(self.origins) != len(self.series):
            raise ValueError("origins of another length than the columns")
        dtypes = (self.series.dtype, self.times_ms.dtype, self.values.dtype)
        if dtypes != (np.dtype(np.int32), np.dtype(np.int64), np.dtype(np.float64)):
            raise ValueError(f"columns of wrong types: {dtypes}")
        if len(self.series) and not (self.series.min() >= 0 and self.series.max() < len(self.layout.labels)):
            raise ValueError("a point refers to a series outside the layout")

    @property
    def points(self) -> int:
        return len(self.series)

    def points_sent(self, kept: NDArray[np.bool_] | None) -> int:
        """How many data points of the shipment the kept samples (None: all) are from: what its sender counts."""
        if self.origins is None:
            return self.points if kept is None else int(np.count_nonzero(kept))
        origins = self.origins if kept is None else self.origins[kept]
        return int(np.count_nonzero(np.diff(origins))) + 1 if len(origins) else 0

    @property
    def size_bytes(self) -> int:
        """What it weighs in the queue."""
        return self.points * _POINT_BYTES + self.layout.size_bytes


@dataclass(frozen=True, slots=True, eq=False)
class Receipt:
    """The store's answer once the batch is durable: points = stored + refused + deltas_repeated, unless repeated."""

    stored_points: int
    sent_points_stored: int = 0  # data points of the shipment with a sample among the stored: what its sender counts
    series_refused: int = 0  # distinct new series over series_max, their points not stored
    points_refused: int = 0
    refused: NDArray[np.bool_] | None = None  # which of the batch's points those are
    over_share: bool = False  # they were refused because their owner has its share, not because the store is full
    deltas_repeated: int = 0  # increases no later than what their series had: taken for repeats, not added again
    repeated: bool = False  # the sequence had been stored before; nothing was stored now
    gap: int = 0  # sequences that were skipped just before this one


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What a commit is about to store: repeats left out, increases added up. For who wants to send it on."""

    series_ids: NDArray[np.int32]
    times_ms: NDArray[np.int64]
    values: NDArray[np.float64]
    labels: Callable[[Iterable[int]], Mapping[int, Labels]]  # of the ids that are asked for
    metrics: Mapping[str, Metric]  # by family name


Tap = Callable[[Rows], None]


@dataclass(frozen=True, slots=True)
class ShipmentState:
    """What is durably known of one incarnation of a sender.

    `stored_points` counts every data point of it, as its sender counts them, of which a sample was ever committed, once.
    """

    agent_id: str
    incarnation: str
    last_sequence: int
    gaps: int
    stored_points: int
    committed_unix_ms: int


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """One series' samples in a closed time range: times ascending and distinct, stale markers included."""

    labels: Mapping[str, str]
    times_ms: NDArray[np.int64]
    values: NDArray[np.float64]


def layout_of(series: Iterable[Mapping[str, str]], metrics: Iterable[Metric] = ()) -> SeriesLayout:
    """A layout from label mappings that include `__name__`."""
    return SeriesLayout(tuple(labels_of(labels) for labels in series), tuple(metrics))

"""What one group commit writes: decided here, performed by the writer. Pure.

Never broken:
- of an (agent, incarnation) each sequence is stored at most once, in whatever order batches arrive;
- the high-water mark never goes back, and gaps + distinct stored sequences = high-water mark;
- a receipt's stored points are exactly the rows of its batch in the plan;
- no more than `series_max` series exist after the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pgherd.proto.samples import Metric
from pgherd.storage.series.batch import Batch, Labels, Receipt, SeriesLayout, ShipmentState

_REFUSED = -1
_T = TypeVar("_T", bound=np.generic)


@dataclass(frozen=True, slots=True, eq=False)
class CommitPlan:
    """One transaction: new rows, the samples' columns, moved high-water marks, and the answers.

    `resolved` are layouts whose every series has an id: valid once the transaction is committed.
    """

    new_series: tuple[tuple[int, Labels], ...]
    metrics: tuple[Metric, ...]
    series_ids: NDArray[np.int32]
    times_ms: NDArray[np.int64]
    values: NDArray[np.float64]
    shipments: tuple[ShipmentState, ...]
    receipts: tuple[Receipt, ...]
    resolved: Mapping[SeriesLayout, NDArray[np.int32]]


@dataclass(frozen=True, slots=True)
class Known:
    """What the store knows before the commit."""

    id_of: Callable[[Labels], int | None]
    layout_ids: Callable[[SeriesLayout], NDArray[np.int32] | None]
    shipments: Mapping[tuple[str, str], ShipmentState]
    metrics: Mapping[str, Metric]
    next_series_id: int
    series_count: int


def plan_commit(batches: Sequence[Batch], known: Known, *, series_max: int, now_unix_ms: int) -> CommitPlan:
    """Lay `batches`, in their order of arrival, over what is known."""
    draft = _Draft(known, series_max, now_unix_ms)
    receipts = tuple(draft.add(batch) for batch in batches)
    return CommitPlan(
        new_series=tuple((series_id, labels) for labels, series_id in draft.new_series.items()),
        metrics=tuple(draft.new_metrics.values()),
        series_ids=_joined(draft.ids, np.int32),
        times_ms=_joined(draft.times, np.int64),
        values=_joined(draft.values, np.float64),
        shipments=tuple(draft.shipments.values()),
        receipts=receipts,
        resolved=draft.resolved,
    )


class _Draft:
    """A plan while it grows."""

    def __init__(self, known: Known, series_max: int, now_unix_ms: int) -> None:
        self._known, self._room, self._now_unix_ms = known, series_max - known.series_count, now_unix_ms
        self.new_series: dict[Labels, int] = {}
        self.new_metrics: dict[str, Metric] = {}
        self.shipments: dict[tuple[str, str], ShipmentState] = {}
        self.resolved: dict[SeriesLayout, NDArray[np.int32]] = {}
        self.ids: list[NDArray[np.int32]] = []
        self.times: list[NDArray[np.int64]] = []
        self.values: list[NDArray[np.float64]] = []

    def add(self, batch: Batch) -> Receipt:
        gap = 0
        before: ShipmentState | None = None
        if batch.shipment is not None:
            before = self.shipments.get(batch.shipment.key) or self._known.shipments.get(batch.shipment.key)
            high_water = before.last_sequence if before else 0
            if batch.shipment.sequence <= high_water:
                return Receipt(stored_points=0, repeated=True)
            gap = batch.shipment.sequence - high_water - 1
        stored, series_refused = self._add_points(batch)
        if batch.shipment is not None:
            self.shipments[batch.shipment.key] = ShipmentState(
                batch.shipment.agent_id,
                batch.shipment.incarnation,
                batch.shipment.sequence,
                (before.gaps if before else 0) + gap,
                (before.stored_points if before else 0) + stored,
                self._now_unix_ms,
            )
        return Receipt(stored, series_refused, batch.points - stored, gap=gap)

    def _add_points(self, batch: Batch) -> tuple[int, int]:
        layout_ids = self._resolve(batch.layout)
        ids = layout_ids[batch.series]
        refused = int(np.count_nonzero(layout_ids == _REFUSED))
        if refused:
            kept = ids != _REFUSED
            self._extend(ids[kept], batch.times_ms[kept], batch.values[kept])
            return int(np.count_nonzero(kept)), refused
        self._extend(ids, batch.times_ms, batch.values)
        return len(ids), 0

    def _extend(self, ids: NDArray[np.int32], times: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        self.ids.append(ids)
        self.times.append(times)
        self.values.append(values)

    def _resolve(self, layout: SeriesLayout) -> NDArray[np.int32]:
        ids = self.resolved.get(layout)
        if ids is None:
            ids = self._known.layout_ids(layout)
        if ids is not None:
            return ids
        ids = np.fromiter((self._id(labels) for labels in layout.labels), np.int32, len(layout.labels))
        for metric in layout.metrics:
            if self._known.metrics.get(metric.name) != metric:
                self.new_metrics[metric.name] = metric
        if not np.any(ids == _REFUSED):
            self.resolved[layout] = ids
        return ids

    def _id(self, labels: Labels) -> int:
        series_id = self._known.id_of(labels)
        if series_id is None:
            series_id = self.new_series.get(labels)
        if series_id is not None:
            return series_id
        if len(self.new_series) >= self._room:
            return _REFUSED
        series_id = self._known.next_series_id + len(self.new_series)
        self.new_series[labels] = series_id
        return series_id


def _joined(parts: list[NDArray[_T]], dtype: type[_T]) -> NDArray[_T]:
    return np.concatenate(parts) if parts else np.empty(0, dtype)

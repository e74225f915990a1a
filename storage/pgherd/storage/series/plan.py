"""What one group commit writes: decided here, performed by the writer. Pure.

Never broken:
- of an (agent, incarnation) each sequence is stored at most once, in whatever order batches arrive;
- the high-water mark never goes back, and gaps + distinct stored sequences = high-water mark;
- a receipt's stored points are exactly the rows of its batch in the plan;
- an increase (delta) is added to its series' running total once: only one that is later than the last counts;
- no more than `series_max` series exist after the plan, and no owner makes more than its share of them;
- the last percent of `series_max` is the collector's own: what it says about the herd is not crowded out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from pgherd.proto.samples import STALE_NAN_BITS, Metric
from pgherd.storage.series.batch import Batch, Labels, Receipt, SeriesLayout, ShipmentState

_REFUSED = -1
_T = TypeVar("_T", bound=np.generic)


class NewSeries(NamedTuple):
    """A series that a batch makes; its owner is who sent it first."""

    id: int
    labels: Labels
    owner: str


@dataclass(frozen=True, slots=True)
class SeriesLimits:
    """How many series there may be: in all, and made by one owner."""

    total: int
    per_owner: int


@dataclass(frozen=True, slots=True, eq=False)
class CommitPlan:
    """One transaction: new rows, the samples' columns, moved high-water marks, and the answers.

    `resolved` are layouts whose every series has an id, `totals` the running totals that moved: valid once the
    transaction is committed.
    """

    new_series: tuple[NewSeries, ...]
    metrics: tuple[Metric, ...]
    series_ids: NDArray[np.int32]
    times_ms: NDArray[np.int64]
    values: NDArray[np.float64]
    shipments: tuple[ShipmentState, ...]
    receipts: tuple[Receipt, ...]
    resolved: Mapping[SeriesLayout, NDArray[np.int32]]
    totals: Mapping[int, Total]


class Total(NamedTuple):
    """What a series of increases has come to, and when it last grew."""

    value: float
    time_ms: int


_NOTHING = Total(0.0, -1)


@dataclass(frozen=True, slots=True)
class Known:
    """What the store knows before the commit."""

    id_of: Callable[[Labels], int | None]
    layout_ids: Callable[[SeriesLayout], NDArray[np.int32] | None]
    shipments: Mapping[tuple[str, str], ShipmentState]
    metrics: Mapping[str, Metric]
    next_series_id: int
    series_count: int
    owned_by: Callable[[str], int]  # how many series an owner has made
    totals_of: Callable[[Collection[int]], Mapping[int, Total]]  # of those ids that have one; may ask the disk


def plan_commit(batches: Sequence[Batch], known: Known, *, limits: SeriesLimits, now_unix_ms: int) -> CommitPlan:
    """Lay `batches`, in their order of arrival, over what is known."""
    draft = _Draft(known, limits, now_unix_ms)
    receipts = tuple(draft.add(batch) for batch in batches)
    return CommitPlan(
        new_series=tuple(draft.new_series.values()),
        metrics=tuple(draft.new_metrics.values()),
        series_ids=_joined(draft.ids, np.int32),
        times_ms=_joined(draft.times, np.int64),
        values=_joined(draft.values, np.float64),
        shipments=tuple(draft.shipments.values()),
        receipts=receipts,
        resolved=draft.resolved,
        totals=draft.totals,
    )


class _Draft:
    """A plan while it grows."""

    def __init__(self, known: Known, limits: SeriesLimits, now_unix_ms: int) -> None:
        self._known, self._limits, self._now_unix_ms = known, limits, now_unix_ms
        self._made: Counter[str] = Counter()
        self.new_series: dict[Labels, NewSeries] = {}
        self.new_metrics: dict[str, Metric] = {}
        self.shipments: dict[tuple[str, str], ShipmentState] = {}
        self.resolved: dict[SeriesLayout, NDArray[np.int32]] = {}
        self.totals: dict[int, Total] = {}
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
        receipt = self._add_points(batch, gap)
        if batch.shipment is not None:
            self.shipments[batch.shipment.key] = ShipmentState(
                batch.shipment.agent_id,
                batch.shipment.incarnation,
                batch.shipment.sequence,
                (before.gaps if before else 0) + gap,
                (before.stored_points if before else 0) + receipt.sent_points_stored,
                self._now_unix_ms,
            )
        return receipt

    def _add_points(self, batch: Batch, gap: int) -> Receipt:
        layout_ids = self._resolve(batch.layout, batch.owner)
        ids, times, values = layout_ids[batch.series], batch.times_ms, batch.values
        series_refused = int(np.count_nonzero(layout_ids == _REFUSED))
        refused = ids == _REFUSED if series_refused else None
        kept = ~refused if refused is not None else None
        deltas_repeated = 0
        if batch.layout.deltas:
            values, is_new = self._add_up(batch, ids)
            kept = is_new if kept is None else kept & is_new
            deltas_repeated = len(is_new) - int(np.count_nonzero(is_new))
        if kept is not None:
            ids, times, values = ids[kept], times[kept], values[kept]
        self.ids.append(ids)
        self.times.append(times)
        self.values.append(values)
        points_refused = int(np.count_nonzero(refused)) if refused is not None else 0
        over_share = bool(series_refused) and self._share_left(batch.owner) < 1
        return Receipt(
            len(ids), batch.points_sent(kept), series_refused, points_refused, refused, over_share, deltas_repeated, gap=gap
        )

    def _add_up(self, batch: Batch, ids: NDArray[np.int32]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """The batch's values with its increases turned into running totals, and which points aren't repeats of any."""
        is_delta = np.zeros(len(batch.layout.labels), np.bool_)
        is_delta[list(batch.layout.deltas)] = True
        places = np.flatnonzero(is_delta[batch.series] & (ids != _REFUSED))
        places = places[np.argsort(batch.times_ms[places], kind="stable")]
        unasked = {int(series_id) for series_id in np.unique(ids[places])} - self.totals.keys()
        known = self._known.totals_of(unasked)
        is_marker = batch.values.view(np.uint64) == STALE_NAN_BITS  # stored as it is; the total goes on after it
        values, is_new = batch.values.copy(), np.ones(len(ids), np.bool_)
        for place in places.tolist():
            series_id, time_ms = int(ids[place]), int(batch.times_ms[place])
            total = self.totals.get(series_id) or known.get(series_id, _NOTHING)
            if time_ms <= total.time_ms:
                is_new[place] = False
            elif not is_marker[place]:
                self.totals[series_id] = Total(total.value + float(values[place]), time_ms)
                values[place] = self.totals[series_id].value
        return values, is_new

    def _resolve(self, layout: SeriesLayout, owner: str) -> NDArray[np.int32]:
        ids = self.resolved.get(layout)
        if ids is None:
            ids = self._known.layout_ids(layout)
        if ids is not None:
            return ids
        ids = np.fromiter((self._id(labels, owner) for labels in layout.labels), np.int32, len(layout.labels))
        for metric in layout.metrics:
            if self._known.metrics.get(metric.name) != metric:
                self.new_metrics[metric.name] = metric
        if not np.any(ids == _REFUSED):
            self.resolved[layout] = ids
        return ids

    def _id(self, labels: Labels, owner: str) -> int:
        series_id = self._known.id_of(labels)
        if series_id is not None:
            return series_id
        made = self.new_series.get(labels)
        if made is not None:
            return made.id
        if self._room_left(owner) < 1 or self._share_left(owner) < 1:
            return _REFUSED
        series_id = self._known.next_series_id + len(self.new_series)
        self.new_series[labels] = NewSeries(series_id, labels, owner)
        self._made[owner] += 1
        return series_id

    def _room_left(self, owner: str) -> int:
        reserved = self._limits.total // 100 if owner else 0
        return self._limits.total - reserved - self._known.series_count - len(self.new_series)

    def _share_left(self, owner: str) -> int:
        if not owner:
            return 1
        return self._limits.per_owner - self._known.owned_by(owner) - self._made[owner]


def _joined(parts: list[NDArray[_T]], dtype: type[_T]) -> NDArray[_T]:
    return np.concatenate(parts) if parts else np.empty(0, dtype)

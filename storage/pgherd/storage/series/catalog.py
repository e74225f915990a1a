"""What the writer knows without asking the disk: series, high-water marks, metric metadata.

A mirror of committed rows only; after any doubt it is thrown away and loaded again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from weakref import WeakKeyDictionary

import duckdb
import numpy as np
from numpy.typing import NDArray

from pgherd.proto.samples import Metric, MetricKind
from pgherd.storage.series.batch import Labels, Rows, SeriesLayout, ShipmentState
from pgherd.storage.series.index import SeriesIndex
from pgherd.storage.series.plan import CommitPlan, Known, NewSeries, Total

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # json.dumps would make one per series

# A marker's NaN isn't a total; one that is stored last says only that the series paused.
_LAST_TOTALS = """
    SELECT series_id, arg_max(value, ts_ms), max(ts_ms) FROM samples
    WHERE ts_ms >= ? AND NOT isnan(value) AND series_id IN (SELECT unnest(?::INTEGER[])) GROUP BY 1
"""


class Catalog:
    """Changed by the writer thread only; `index` locks itself, the rest is replaced, never mutated."""

    def __init__(self) -> None:
        self.index = SeriesIndex()
        self.shipments: Mapping[tuple[str, str], ShipmentState] = {}
        self.metrics: Mapping[str, Metric] = {}
        self._owned: Counter[str] = Counter()
        self._totals: dict[int, Total] = {}  # of series that are sent as increases: what the last sample on disk says
        self._connection: duckdb.DuckDBPyConnection | None = None
        self._layout_ids: WeakKeyDictionary[SeriesLayout, NDArray[np.int32]] = WeakKeyDictionary()

    @classmethod
    def load(cls, connection: duckdb.DuckDBPyConnection) -> Catalog:
        """Read everything back; raises duckdb.Error."""
        catalog = cls()
        catalog._connection = connection
        rows = connection.execute("SELECT id, labels, owner FROM series ORDER BY id").fetchall()
        catalog._add(NewSeries(series_id, labels_from_json(text), owner) for series_id, text, owner in rows)
        ranges = connection.execute("SELECT series_id, min(ts_ms) lo, max(ts_ms) hi FROM samples GROUP BY 1").fetchnumpy()
        ids = ranges["series_id"]
        catalog.index.touch(ids, ranges["lo"])
        catalog.index.touch(ids, ranges["hi"])
        states = [ShipmentState(*row) for row in connection.execute("SELECT * FROM shipments").fetchall()]
        catalog.shipments = {(state.agent_id, state.incarnation): state for state in states}
        metrics = connection.execute("SELECT name, kind, help, unit FROM metrics").fetchall()
        catalog.metrics = {name: Metric(name, MetricKind(kind), text, unit) for name, kind, text, unit in metrics}
        return catalog

    def known(self) -> Known:
        """The planner's view."""
        return Known(
            self.index.id_of, self._layout_ids.get, self.shipments, self.metrics, self.index.next_id, len(self.index),
            self._owned.__getitem__, self.totals_of,
        )  # fmt: skip

    def _add(self, made: Iterable[NewSeries]) -> None:
        rows = list(made)
        self.index.add((row.id, row.labels) for row in rows)
        self._owned.update(row.owner for row in rows)

    def totals_of(self, ids: Collection[int]) -> Mapping[int, Total]:
        """Running totals of those series of increases that have samples. Raises duckdb.Error.

        After a start they are read from the samples themselves, which were committed together with what they count:
        a collector's restart neither loses nor repeats an increase, and looks like no reset.
        """
        unknown = self.index.known(series_id for series_id in ids if series_id not in self._totals)
        # Nearly all of them are found near their last sample; where that is a marker, further back.
        for since_ms in (self.index.last_ms(unknown), 0):
            if self._connection is None or not unknown:
                break
            rows = self._connection.execute(_LAST_TOTALS, [since_ms, unknown]).fetchall()
            self._totals |= {series_id: Total(value, time_ms) for series_id, value, time_ms in rows}
            unknown = [series_id for series_id in unknown if series_id not in self._totals]
        return {series_id: self._totals[series_id] for series_id in ids if series_id in self._totals}

    def rows(self, plan: CommitPlan) -> Rows:
        """What `plan` is about to store, readable before it is applied."""
        made = {row.id: row.labels for row in plan.new_series}

        def labels(ids: Iterable[int]) -> Mapping[int, Labels]:
            wanted = set(ids)
            known = np.array([i for i in wanted if i not in made], np.int32)
            return made | dict(zip(known.tolist(), self.index.labels(known), strict=True))

        metrics = {**self.metrics, **{metric.name: metric for metric in plan.metrics}} if plan.metrics else self.metrics
        return Rows(plan.series_ids, plan.times_ms, plan.values, labels, metrics)

    def apply(self, plan: CommitPlan) -> None:
        """Take over what was just committed."""
        self._add(plan.new_series)
        self.index.touch(plan.series_ids, plan.times_ms)
        self._layout_ids.update(plan.resolved)
        self._totals |= plan.totals
        if plan.shipments:
            self.shipments = {**self.shipments, **{(row.agent_id, row.incarnation): row for row in plan.shipments}}
        if plan.metrics:
            self.metrics = {**self.metrics, **{metric.name: metric for metric in plan.metrics}}

    def forget_series(self, ids: list[int], owners: Iterable[str]) -> None:
        """Series whose samples and rows were just deleted; their owners have room again."""
        self._owned.subtract(owners)
        self._layout_ids.clear()
        self.index.remove(ids)
        for series_id in ids:
            self._totals.pop(series_id, None)

    def forget_shipments(self, before_unix_ms: int) -> None:
        """Incarnations whose rows were just deleted."""
        self.shipments = {key: row for key, row in self.shipments.items() if row.committed_unix_ms >= before_unix_ms}


def labels_to_json(labels: Labels) -> str:
    """Sorted JSON object: what the `series` table holds, readable with stock DuckDB."""
    return _ENCODER.encode(dict(labels))


def labels_from_json(text: str) -> Labels:
    return tuple(sorted(json.loads(text).items()))

"""Selecting series and their samples: a short read each, plain numpy afterwards.

Duplicates: DuckDB keeps every row that was committed; when a series has several values at one time (a foreign
client's retry, two batches that overlap) the one that was committed last is read. Late samples are sorted in here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pgherd.proto.errors import PreconditionError
from pgherd.proto.samples import Metric
from pgherd.proto.selectors import Matcher
from pgherd.storage.series.batch import Window
from pgherd.storage.series.catalog import Catalog
from pgherd.storage.series.database import Database

# Up to here series are named in the statement: half the time of a join with a registered table.
_NAMED_MAX = 64


class SeriesReader:
    """What PromQL and the HTTP API ask; safe from any thread, blocking (call it from a worker thread)."""

    def __init__(self, database: Database, catalog: Callable[[], Catalog], samples_max: int) -> None:
        self._database = database
        self._catalog = catalog
        self._samples_max = samples_max

    def select(self, matchers: Sequence[Matcher], start_ms: int, end_ms: int) -> list[Window]:
        """Samples of every matching series in the closed range, one window per series that has any.

        Raises ConfigError promql.parse (regular expression), PreconditionError promql.limit (more than
        samples_max samples, or memory), TransientError query.timeout | store.unavailable.
        """
        index = self._catalog().index
        ids = index.select(matchers, start_ms, end_ms)
        if not len(ids) or start_ms > end_ms:
            return []
        labels_of = dict(zip(ids.tolist(), index.labels(ids), strict=True))
        with self._database.read() as cursor:
            if len(ids) <= _NAMED_MAX:
                wanted = f"WHERE series_id IN ({', '.join(map(str, ids.tolist()))}) AND"
            else:
                cursor.register("wanted", pa.table({"series_id": ids}))
                wanted = "SEMI JOIN wanted USING (series_id) WHERE"
            statement = (
                f"SELECT series_id, ts_ms, value, samples.rowid AS arrival FROM samples {wanted} ts_ms BETWEEN ? AND ? LIMIT ?"  # noqa: S608 - our own numbers
            )
            rows = cursor.execute(statement, [start_ms, end_ms, self._samples_max + 1]).fetchnumpy()
        if len(rows["ts_ms"]) > self._samples_max:
            raise PreconditionError(
                "promql.limit",
                f"the selector reads more than {self._samples_max} samples",
                hint="select fewer series or less time",
            )
        series, times, values = _sorted_distinct(rows["series_id"], rows["ts_ms"], rows["value"], rows["arrival"])
        if not len(series):
            return []
        starts = np.concatenate([[0], np.flatnonzero(np.diff(series)) + 1, [len(series)]])
        return [
            Window(dict(labels_of[int(series[low])]), times[low:high], values[low:high])
            for low, high in itertools.pairwise(starts.tolist())
            if labels_of[int(series[low])]  # expired since the index was asked
        ]

    def series(
        self, matchers: Sequence[Matcher], start_ms: int | None = None, end_ms: int | None = None
    ) -> list[dict[str, str]]:
        """Label sets of the matching series that may have samples in the range (their first and last are looked at)."""
        index = self._catalog().index
        return [dict(labels) for labels in index.labels(index.select(matchers, start_ms, end_ms)) if labels]

    def label_names(self, matchers: Sequence[Matcher], start_ms: int | None = None, end_ms: int | None = None) -> list[str]:
        """Sorted label names of the matching series, `__name__` included."""
        index = self._catalog().index
        sets = index.labels(index.select(matchers, start_ms, end_ms))
        return sorted({name for labels in sets for name, _ in labels})

    def label_values(
        self, name: str, matchers: Sequence[Matcher], start_ms: int | None = None, end_ms: int | None = None
    ) -> list[str]:
        """Sorted values of one label over the matching series."""
        index = self._catalog().index
        sets = index.labels(index.select(matchers, start_ms, end_ms))
        return sorted({value for labels in sets for label, value in labels if label == name})

    def metadata(self) -> dict[str, Metric]:
        """Kind, help and unit by metric name."""
        return dict(self._catalog().metrics)


def _sorted_distinct(
    series: NDArray[np.int32], times: NDArray[np.int64], values: NDArray[np.float64], arrival: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.float64]]:
    """By series, then time; of equal times the row that arrived last."""
    order = np.lexsort((arrival, times, series))
    series, times, values = series[order], times[order], values[order]
    last = np.ones(len(series), np.bool_)
    last[:-1] = (series[1:] != series[:-1]) | (times[1:] != times[:-1])
    if last.all():
        return series, times, values
    return series[last], times[last], values[last]

"""Committed samples as remote write requests: what the queues hold. Pure, apart from a cache of encoded labels.

Written by hand, because it happens in the writer's thread: building the messages would cost three times as much.
Requests that follow each other can be joined by putting their bytes one after the other.

Never broken: labels are sorted, samples of a series keep their order, a stale marker keeps its bits.

Source: Prometheus remote write specification 1.0; protocol buffers encoding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np

from pgherd.proto.remote.v1 import remote_pb2 as pb
from pgherd.proto.samples import Metric, MetricKind
from pgherd.proto.selectors import NAME_LABEL
from pgherd.storage.series.batch import Labels, Rows

POINTS_MAX = 5_000  # of one record: about 1 MiB, which every receiver takes
SUFFIXES = ("_bucket", "_count", "_sum")

_TIMESERIES, _METADATA = b"\x0a", b"\x1a"
_TYPES = {
    MetricKind.COUNTER: pb.METRIC_TYPE_COUNTER, MetricKind.GAUGE: pb.METRIC_TYPE_GAUGE,
    MetricKind.HISTOGRAM: pb.METRIC_TYPE_HISTOGRAM, MetricKind.SUMMARY: pb.METRIC_TYPE_SUMMARY,
}  # fmt: skip


def records(rows: Rows, points_max: int = POINTS_MAX) -> Iterator[tuple[bytes, int]]:
    """Encoded WriteRequests with the number of samples in each, which together hold all rows."""
    order = np.argsort(rows.series_ids, kind="stable")
    ids, times, values = rows.series_ids[order], rows.times_ms[order], rows.values[order]
    low = 0
    while low < len(ids):
        high = min(low + points_max, len(ids))
        while high < len(ids) and high < low + 2 * points_max and _is_histogram_part(rows, int(ids[high])):
            high += 1  # its parts were made together: they stay together
        yield _record(rows, ids[low:high].tolist(), times[low:high].tolist(), values[low:high].tobytes()), high - low
        low = high


def _is_histogram_part(rows: Rows, series_id: int) -> bool:
    metric = family_of(rows.labels([series_id])[series_id], rows)
    return metric is not None and metric.kind is MetricKind.HISTOGRAM


def _record(rows: Rows, ids: list[int], times_ms: list[int], values: bytes) -> bytes:
    parts: list[bytes] = []
    families: dict[str, Metric] = {}
    labels_by_id = rows.labels(ids)
    place, count = 0, len(ids)
    while place < count:
        series_id = ids[place]
        labels = labels_by_id[series_id]
        body = [_labels(labels)]
        while place < count and ids[place] == series_id:
            stamp = _time(times_ms[place])
            # The value's eight bytes are taken as they are: a float on the way might lose a marker's payload.
            body.append(b"\x12" + bytes((9 + len(stamp), 0x09)) + values[8 * place : 8 * place + 8] + stamp)
            place += 1
        series = b"".join(body)
        parts += (_TIMESERIES, _varint(len(series)), series)
        metric = family_of(labels, rows)
        if metric is not None:
            families[metric.name] = metric
    for metric in families.values():
        encoded = pb.MetricMetadata(
            type=_TYPES[metric.kind], metric_family_name=metric.name, unit=metric.unit
        ).SerializeToString()
        parts += (_METADATA, _varint(len(encoded)), encoded)
    return b"".join(parts)


def family_of(labels: Labels, rows: Rows) -> Metric | None:
    """What is known of a series' metric; of a histogram's or summary's part it is the family's."""
    name = next(value for key, value in labels if key == NAME_LABEL)
    return next((metric for stem in stems(name) if (metric := rows.metrics.get(stem)) is not None), None)


def stems(name: str) -> Iterable[str]:
    """The names under which a series' family may be known."""
    yield name
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            yield name.removesuffix(suffix)


@lru_cache(maxsize=100_000)
def _labels(labels: Labels) -> bytes:
    message = pb.TimeSeries(labels=[pb.Label(name=name, value=value) for name, value in labels])
    encoded: bytes = message.SerializeToString()
    return encoded


@lru_cache(maxsize=1024)
def _time(unix_ms: int) -> bytes:
    return b"\x10" + _varint(unix_ms)


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append((number & 0x7F) | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)

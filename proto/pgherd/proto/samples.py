"""The sample: what a probe read, before it becomes OTLP, and after the collector decoded it."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

# Prometheus' staleness marker: "this series has no value any more", as opposed to a value that is NaN.
# Its payload bits matter, not its being NaN. Source: Prometheus, model/value (StaleNaN).
STALE_NAN_BITS = 0x7FF0000000000002
STALE_NAN: float = struct.unpack("<d", struct.pack("<Q", STALE_NAN_BITS))[0]


class MetricKind(StrEnum):
    """Prometheus' own words. Histograms and summaries name a family; their series end in _bucket, _sum, _count."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"
    SUMMARY = "summary"


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric family: name in postgres_exporter's spelling, base units, one line of help."""

    name: str
    kind: MetricKind
    help: str
    unit: str = ""  # UCUM: "By", "s", "1"


@dataclass(frozen=True, slots=True)
class ExponentialBuckets:
    """What an exponential histogram has counted since its start: bucket offset + i holds (b^(offset+i), b^(offset+i+1)].

    b is 2^(2^-scale); `zero_count` are those at or below `zero_threshold`. Source: OTLP ExponentialHistogramDataPoint.
    """

    scale: int
    offset: int
    counts: tuple[int, ...]
    zero_count: int
    zero_threshold: float
    sum: float

    @property
    def count(self) -> int:
        return self.zero_count + sum(self.counts)


@dataclass(frozen=True, slots=True)
class Sample:
    """One value of one series at the time of its cycle.

    `labels` holds what the probe knows (datname, state …); job, instance, cluster and node are added
    from the resource. `start_unix_ns` is a counter's last reset, 0 when the server doesn't tell. A histogram's sample
    has `buckets`, and its `value` is their count.
    """

    metric: Metric
    labels: Mapping[str, str]
    value: float
    start_unix_ns: int = 0
    buckets: ExponentialBuckets | None = None

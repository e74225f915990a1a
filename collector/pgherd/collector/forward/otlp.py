"""Remote write requests as OTLP. Pure.

Job and instance become the resource, all other labels attributes of the point. Names stay Prometheus' own: the scope says so,
which another pgherd collector understands. Counters are cumulative monotonic sums; the classic buckets of a histogram, with its
count and sum, become one histogram again; the rest are gauges, the parts of summaries too. The stale marker becomes NO_RECORDED_VALUE.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from itertools import pairwise

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import (
    AggregationTemporality,
    HistogramDataPoint,
    Metric,
    NumberDataPoint,
    ResourceMetrics,
)

from pgherd.collector.forward.record import stems
from pgherd.proto.remote.v1 import remote_pb2 as pb
from pgherd.proto.samples import STALE_NAN_BITS
from pgherd.proto.selectors import NAME_LABEL

PGHERD_JOB = "pgherd"
SCOPE = "pgherd.agent"
_NO_RECORDED_VALUE = 1
_RESOURCE_LABELS = {"job", "instance", NAME_LABEL}
_CUMULATIVE = AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
_STALE_BYTES = STALE_NAN_BITS.to_bytes(8, "little")

_Attributes = tuple[tuple[str, str], ...]


@dataclass(slots=True)
class _Parts:
    """What was stored of one histogram at one time: running counts by bound, count, sum."""

    buckets: dict[float, float] = field(default_factory=dict)
    count: float | None = None
    total: float | None = None

    @property
    def is_whole(self) -> bool:
        return self.count is not None and math.inf in self.buckets


def export_request(encoded: bytes, service_name: str) -> ExportMetricsServiceRequest:
    """The same samples; `service_name` is what series of our own agents are sent under."""
    request = pb.WriteRequest.FromString(encoded)
    draft = _Draft({one.metric_family_name: one for one in request.metadata}, service_name)
    for series in request.timeseries:
        draft.take(series)
    return draft.finished()


class _Draft:
    """A request while it grows."""

    def __init__(self, families: dict[str, pb.MetricMetadata], service_name: str) -> None:
        self._families, self._service_name = families, service_name
        self._export = ExportMetricsServiceRequest()
        self._resources: dict[tuple[str, str], ResourceMetrics] = {}
        self._metrics: dict[tuple[str, str, str], Metric] = {}
        self._histograms: dict[tuple[str, str, str, _Attributes], dict[int, _Parts]] = {}

    def take(self, series: pb.TimeSeries) -> None:
        labels = {label.name: label.value for label in series.labels}
        job, instance, name = labels.get("job", ""), labels.get("instance", ""), labels[NAME_LABEL]
        family = next((self._families[stem] for stem in stems(name) if stem in self._families), None)
        attributes = tuple((key, value) for key, value in labels.items() if key not in _RESOURCE_LABELS)
        if family is not None and family.type == pb.METRIC_TYPE_HISTOGRAM and name != family.metric_family_name:
            suffix = name.removeprefix(family.metric_family_name)
            if suffix != "_bucket" or "le" in labels:
                self._take_part((job, instance, family.metric_family_name), suffix, labels.get("le", ""), attributes, series)
                return
        is_counter = family is not None and family.type == pb.METRIC_TYPE_COUNTER
        metric = self._metric(job, instance, name)
        if is_counter:
            metric.sum.is_monotonic, metric.sum.aggregation_temporality = True, _CUMULATIVE
        else:
            metric.gauge.SetInParent()
        if family is not None and family.metric_family_name == name:
            metric.unit = family.unit
        for sample in series.samples:
            point = (metric.sum if is_counter else metric.gauge).data_points.add()
            _stamp(point, sample.timestamp, attributes)
            if _is_stale(sample.value):
                point.flags = _NO_RECORDED_VALUE
            else:
                point.as_double = sample.value

    def _take_part(
        self, key: tuple[str, str, str], suffix: str, bound: str, attributes: _Attributes, series: pb.TimeSeries
    ) -> None:
        shared = tuple(pair for pair in attributes if pair[0] != "le") if suffix == "_bucket" else attributes
        by_time = self._histograms.setdefault((*key, shared), {})
        for sample in series.samples:
            parts = by_time.setdefault(sample.timestamp, _Parts())
            match suffix:
                case "_bucket":
                    parts.buckets[float(bound)] = sample.value
                case "_count":
                    parts.count = sample.value
                case "_sum":
                    parts.total = sample.value

    def finished(self) -> ExportMetricsServiceRequest:
        for (job, instance, family, attributes), by_time in self._histograms.items():
            for unix_ms, parts in by_time.items():
                if parts.is_whole:
                    metric = self._metric(job, instance, family)
                    metric.unit = self._families[family].unit
                    metric.histogram.aggregation_temporality = _CUMULATIVE
                    _stamp(point := metric.histogram.data_points.add(), unix_ms, attributes)
                    _fill_histogram(point, parts)
                else:
                    self._loose_parts(job, instance, family, attributes, unix_ms, parts)
        return self._export

    def _loose_parts(self, job: str, instance: str, family: str, attributes: _Attributes, unix_ms: int, parts: _Parts) -> None:
        """A histogram that a limit tore: what there is of it, under its own names."""
        loose = [("_bucket", (*attributes, ("le", f"{bound:g}")), value) for bound, value in parts.buckets.items()]
        loose += [("_count", attributes, parts.count)] if parts.count is not None else []
        loose += [("_sum", attributes, parts.total)] if parts.total is not None else []
        for suffix, attributes_of, value in loose:
            metric = self._metric(job, instance, family + suffix)
            metric.gauge.SetInParent()
            _stamp(point := metric.gauge.data_points.add(), unix_ms, attributes_of)
            if _is_stale(value):
                point.flags = _NO_RECORDED_VALUE
            else:
                point.as_double = value

    def _metric(self, job: str, instance: str, name: str) -> Metric:
        key = (job, instance, name)
        if key not in self._metrics:
            if (job, instance) not in self._resources:
                self._resources[job, instance] = self._resource(self._service_name if job == PGHERD_JOB else job, instance)
            self._metrics[key] = self._resources[job, instance].scope_metrics[0].metrics.add(name=name)
        return self._metrics[key]

    def _resource(self, job: str, instance: str) -> ResourceMetrics:
        made = self._export.resource_metrics.add()
        namespace, _, service = job.rpartition("/")
        for key, value in (("service.namespace", namespace), ("service.name", service), ("service.instance.id", instance)):
            if value:
                made.resource.attributes.add(key=key).value.string_value = value
        made.scope_metrics.add().scope.name = SCOPE
        return made


def _fill_histogram(point: HistogramDataPoint, parts: _Parts) -> None:
    assert parts.count is not None, "only whole ones come here"
    bounds = sorted(bound for bound in parts.buckets if bound != math.inf)
    point.explicit_bounds.extend(bounds)
    running = [0.0, *(parts.buckets[bound] for bound in bounds), parts.buckets[math.inf]]
    if any(math.isnan(value) for value in (*running, parts.count)):
        point.flags = _NO_RECORDED_VALUE
        point.bucket_counts.extend([0] * (len(bounds) + 1))
        return
    point.count = int(parts.count)
    point.bucket_counts.extend(max(0, int(high) - int(low)) for low, high in pairwise(running))
    if parts.total is not None:
        point.sum = parts.total


def _stamp(point: NumberDataPoint | HistogramDataPoint, unix_ms: int, attributes: _Attributes) -> None:
    point.time_unix_nano = unix_ms * 1_000_000
    for name, value in attributes:
        point.attributes.add(key=name).value.string_value = value


def _is_stale(value: float) -> bool:
    return struct.pack("<d", value) == _STALE_BYTES

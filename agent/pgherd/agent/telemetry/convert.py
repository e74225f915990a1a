"""Samples of one cycle as one serialised OTLP ExportMetricsServiceRequest. Pure.

Never broken: every point of a request carries the same timestamp; a series occurs at most once; a
series that was in the last cycle and isn't in this one gets exactly one NO_RECORDED_VALUE point, so that
"unknown now" reaches the collector instead of a frozen value. An unchanged set of gauges and counters gives the same
byte layout every cycle (values are fixed-width), which the collector's decoder lives on. Histograms don't: their
buckets are as many as were filled, so they travel in batches of their own.

Source: opentelemetry-proto metrics/v1; Prometheus staleness markers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import (
    AggregationTemporality,
    DataPointFlags,
    ScopeMetrics,
)

from pgherd.proto.samples import Metric, MetricKind, Sample

SCOPE_NAME: Final = "pgherd.agent"
SERVICE_NAME: Final = "pgherd"

_STALE: Final = DataPointFlags.DATA_POINT_FLAGS_NO_RECORDED_VALUE_MASK

SeriesKey = tuple[str, tuple[tuple[str, str], ...]]
Series = dict[SeriesKey, Sample]


@dataclass(frozen=True, slots=True)
class Source:
    """Who the samples are about: becomes the resource of the request."""

    agent_id: str
    node_id: str
    node: str
    cluster: str
    instance: str

    def attributes(self) -> dict[str, str]:
        return {
            "service.name": SERVICE_NAME,
            "service.instance.id": self.instance,
            "pgherd.agent.id": self.agent_id,
            "pgherd.node.id": self.node_id,
            "pgherd.node": self.node,
            "pgherd.cluster": self.cluster,
        }


def series_key(sample: Sample) -> SeriesKey:
    """Identity of a sample's series within its node."""
    return sample.metric.name, tuple(sorted(sample.labels.items()))


def series_of(samples: Iterable[Sample]) -> Series:
    """Samples by series; of several for one series the first stays."""
    series: Series = {}
    sorted_labels: dict[int, tuple[Mapping[str, str], tuple[tuple[str, str], ...]]] = {}  # by identity: rows share theirs
    for sample in samples:
        known = sorted_labels.get(id(sample.labels))
        if known is None:
            known = sorted_labels[id(sample.labels)] = (sample.labels, tuple(sorted(sample.labels.items())))
        series.setdefault((sample.metric.name, known[1]), sample)
    return series


def vanished(previous: Mapping[SeriesKey, Sample], current: Mapping[SeriesKey, Sample]) -> list[Sample]:
    """The series of `previous` that `current` lacks."""
    return [sample for key, sample in previous.items() if key not in current]


def encode(source: Source, current: Series, stale: Sequence[Sample], unix_ns: int) -> bytes:
    """One request with a point per sample of `current` and a NO_RECORDED_VALUE point per sample of `stale`."""
    request = ExportMetricsServiceRequest()
    resource_metrics = request.resource_metrics.add()
    resource_metrics.resource.attributes.extend(_attributes(source.attributes()))
    scope = resource_metrics.scope_metrics.add()
    scope.scope.name = SCOPE_NAME
    samples_of: dict[Metric, list[tuple[Sample, bool]]] = {}
    for sample in current.values():
        samples_of.setdefault(sample.metric, []).append((sample, False))
    for sample in stale:
        samples_of.setdefault(sample.metric, []).append((sample, True))
    wire_labels: dict[int, list[KeyValue]] = {}  # by identity: the samples of one row share their labels
    for metric, samples in samples_of.items():
        points = _metric_points(scope, metric)
        for sample, is_stale in samples:
            attributes = wire_labels.get(id(sample.labels))
            if attributes is None:
                attributes = wire_labels[id(sample.labels)] = _attributes(sample.labels)
            _add_point(points, sample, unix_ns, is_stale=is_stale).attributes.extend(attributes)
    data: bytes = request.SerializeToString()
    return data


def _metric_points(scope: ScopeMetrics, metric: Metric) -> Any:
    """A new metric of the scope; where its points go, of the class that its kind has."""
    wire = scope.metrics.add()
    wire.name, wire.description, wire.unit = metric.name, metric.help, metric.unit
    if metric.kind is MetricKind.COUNTER:
        wire.sum.aggregation_temporality = AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
        wire.sum.is_monotonic = True
        return wire.sum.data_points
    if metric.kind is MetricKind.HISTOGRAM:
        wire.exponential_histogram.aggregation_temporality = AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
        return wire.exponential_histogram.data_points
    return wire.gauge.data_points


def _add_point(points: Any, sample: Sample, unix_ns: int, *, is_stale: bool) -> Any:
    """A point without its labels, of the class that `points` holds."""
    if is_stale:
        return points.add(time_unix_nano=unix_ns, flags=_STALE)
    if (buckets := sample.buckets) is not None:
        point = points.add(
            time_unix_nano=unix_ns,
            count=buckets.count,
            sum=buckets.sum,
            scale=buckets.scale,
            zero_count=buckets.zero_count,
            zero_threshold=buckets.zero_threshold,
        )
        point.positive.offset = buckets.offset
        point.positive.bucket_counts.extend(buckets.counts)
    else:
        point = points.add(time_unix_nano=unix_ns, as_double=sample.value)
    if sample.start_unix_ns:
        point.start_time_unix_nano = sample.start_unix_ns
    return point


def _attributes(labels: Mapping[str, str]) -> list[KeyValue]:
    wire = []
    for name, value in labels.items():
        pair = KeyValue(key=name)
        pair.value.string_value = value
        wire.append(pair)
    return wire


def with_agent_id(payload: bytes, agent_id: str) -> bytes:
    """A spooled request under the identity that ships it now.

    An agent that joined again (after a revocation, or after it ran standalone) still holds samples of its nodes; the
    collector refuses a request that names another agent than the certificate does. Raises ValueError for bytes that
    aren't a request.
    """
    if agent_id.encode() in payload:
        return payload
    try:
        request = ExportMetricsServiceRequest.FromString(payload)
    except DecodeError as error:
        raise ValueError("the spooled batch isn't an ExportMetricsServiceRequest") from error
    for resource_metrics in request.resource_metrics:
        for attribute in resource_metrics.resource.attributes:
            if attribute.key == "pgherd.agent.id":
                attribute.value.string_value = agent_id
    return request.SerializeToString()

"""Remote write requests as OTLP. Pure.

Job and instance become the resource, all other labels attributes of the point. Names stay Prometheus' own: the scope says so,
which another pgherd collector understands. Counters, and the `_bucket`, `_count` and `_sum` of histograms and summaries, are
cumulative monotonic sums (the `_sum` of a histogram may fall, but only when something negative is observed); the rest are gauges. The stale marker becomes
NO_RECORDED_VALUE.
"""

from __future__ import annotations

import struct

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality, Metric, NumberDataPoint, ResourceMetrics

from pgherd.collector.forward.record import stems
from pgherd.proto.remote.v1 import remote_pb2 as pb
from pgherd.proto.samples import STALE_NAN_BITS
from pgherd.proto.selectors import NAME_LABEL

PGHERD_JOB = "pgherd"
SCOPE = "pgherd.agent"
_NO_RECORDED_VALUE = 1
_RESOURCE_LABELS = {"job", "instance", NAME_LABEL}
_CUMULATIVE = {pb.METRIC_TYPE_HISTOGRAM, pb.METRIC_TYPE_SUMMARY}


def export_request(encoded: bytes, service_name: str) -> ExportMetricsServiceRequest:
    """The same samples; `service_name` is what series of our own agents are sent under."""
    request = pb.WriteRequest.FromString(encoded)
    families = {one.metric_family_name: one for one in request.metadata}
    export = ExportMetricsServiceRequest()
    resources: dict[tuple[str, str], ResourceMetrics] = {}
    metrics: dict[tuple[str, str, str], Metric] = {}
    for series in request.timeseries:
        labels = {label.name: label.value for label in series.labels}
        job, instance, name = labels.get("job", ""), labels.get("instance", ""), labels[NAME_LABEL]
        if (job, instance) not in resources:
            resources[job, instance] = _resource(export, service_name if job == PGHERD_JOB else job, instance)
        metric = metrics.get((job, instance, name))
        if metric is None:
            metric = metrics[job, instance, name] = _metric(resources[job, instance], name, families)
        points = metric.sum.data_points if metric.HasField("sum") else metric.gauge.data_points
        for sample in series.samples:
            _fill(points.add(), labels, sample)
    return export


def _resource(export: ExportMetricsServiceRequest, job: str, instance: str) -> ResourceMetrics:
    made = export.resource_metrics.add()
    namespace, _, service = job.rpartition("/")
    for key, value in (("service.namespace", namespace), ("service.name", service), ("service.instance.id", instance)):
        if value:
            made.resource.attributes.add(key=key).value.string_value = value
    made.scope_metrics.add().scope.name = SCOPE
    return made


def _metric(resource: ResourceMetrics, name: str, families: dict[str, pb.MetricMetadata]) -> Metric:
    metric = resource.scope_metrics[0].metrics.add(name=name)
    family = next((families[stem] for stem in stems(name) if stem in families), None)
    is_part = family is not None and family.type in _CUMULATIVE and family.metric_family_name != name
    if is_part or (family is not None and family.type == pb.METRIC_TYPE_COUNTER):
        metric.sum.is_monotonic = True
        metric.sum.aggregation_temporality = AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
    else:
        metric.gauge.SetInParent()
    if family is not None:
        metric.unit = family.unit if family.metric_family_name == name else ""
    return metric


def _fill(point: NumberDataPoint, labels: dict[str, str], sample: pb.Sample) -> None:
    point.time_unix_nano = sample.timestamp * 1_000_000
    if struct.pack("<d", sample.value) == _STALE_BYTES:
        point.flags = _NO_RECORDED_VALUE
    else:
        point.as_double = sample.value
    for name, value in labels.items():
        if name not in _RESOURCE_LABELS:
            point.attributes.add(key=name).value.string_value = value


_STALE_BYTES = STALE_NAN_BITS.to_bytes(8, "little")

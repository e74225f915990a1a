"""OTLP requests for tests, written with the official protobuf."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

AGENT = "5f0c1f9e-8f0b-4c58-9d6a-0d6a3b1f4e01"
NODE = "0a9b3f0e-17c8-4c30-8f6e-6a2f2f1c9d11"
INCARNATION = "7d6d6a8e-1111-4222-8333-444455556666"

Point = tuple[Mapping[str, str], float | int | None]


def resource(request: Any, *, agent: str = AGENT, node: str = NODE, instance: str = "db1:5432", **more: str) -> Any:
    """Append a ResourceMetrics as our agent writes it; keyword `service_name` etc. are attributes with dots."""
    made = request.resource_metrics.add()
    facts = {
        "service.name": "pgherd", "service.instance.id": instance, "pgherd.agent.id": agent,
        "pgherd.node.id": node, "pgherd.node": "db1", "pgherd.cluster": "shop",
    }  # fmt: skip
    facts |= {key.replace("_", "."): value for key, value in more.items()}
    for key, value in facts.items():
        if value:
            made.resource.attributes.add(key=key).value.string_value = value
    return made


def metric(
    made: Any,
    name: str,
    points: Iterable[Point],
    *,
    time_ns: int,
    scope: str = "pgherd.agent",
    counter: bool = False,
    unit: str = "",
) -> Any:
    """Append a gauge (or cumulative monotonic sum); a value of None is NO_RECORDED_VALUE."""
    scope_metrics = made.scope_metrics.add()
    scope_metrics.scope.name = scope
    added = scope_metrics.metrics.add(name=name, unit=unit, description=f"help of {name}")
    data = added.sum if counter else added.gauge
    if counter:
        data.aggregation_temporality, data.is_monotonic = 2, True
    for labels, value in points:
        point = data.data_points.add(time_unix_nano=time_ns, start_time_unix_nano=time_ns - 10 if counter else 0)
        for key, text in labels.items():
            point.attributes.add(key=key).value.string_value = text
        if value is None:
            point.flags = 1
        elif isinstance(value, int):
            point.as_int = value
        else:
            point.as_double = value
    return added


def histogram(
    made: Any,
    name: str,
    bounds: Sequence[float],
    counts: Sequence[int],
    *,
    time_ns: int,
    scope: str = "pgherd.agent",
    delta: bool = False,
    unit: str = "",
    total: float | None = None,
) -> Any:
    """Append an explicit histogram of one point."""
    scope_metrics = made.scope_metrics.add()
    scope_metrics.scope.name = scope
    added = scope_metrics.metrics.add(name=name, unit=unit)
    added.histogram.aggregation_temporality = 1 if delta else 2
    point = added.histogram.data_points.add(
        time_unix_nano=time_ns, count=sum(counts), explicit_bounds=bounds, bucket_counts=counts
    )
    if total is not None:
        point.sum = total
    return added


def simple(values: Sequence[float], time_ns: int, *, agent: str = AGENT, node: str = NODE, instance: str = "db1:5432") -> bytes:
    """One gauge with one series per value."""
    request = ExportMetricsServiceRequest()
    made = resource(request, agent=agent, node=node, instance=instance)
    metric(made, "pg_stat_x", [({"i": str(i)}, value) for i, value in enumerate(values)], time_ns=time_ns)
    body: bytes = request.SerializeToString()
    return body

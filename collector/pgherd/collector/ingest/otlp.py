"""ExportMetricsServiceRequest → columns: the slow path, and the meaning that the fast path must keep. Pure.

Gauges and cumulative sums are taken. Metrics of the scope `pgherd.agent` carry Prometheus names already; all
others are translated. Integers become floats (above 2^53 the nearest one). Start times, exemplars, scope attributes
and resource attributes besides job, instance, cluster and node aren't kept.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from pgherd.collector.ingest.admit import AGENT_KIND, AdmitLimits, Claim, Reason
from pgherd.collector.ingest.names import LABEL_NAME_RE, METRIC_NAME_RE, RESERVED_LABELS, label_name, metric_name
from pgherd.proto.errors import PeerError
from pgherd.proto.samples import STALE_NAN, Metric, MetricKind
from pgherd.storage.series.batch import Labels, SeriesLayout

AGENT_SCOPE = "pgherd.agent"
_CUMULATIVE = 2  # AggregationTemporality
_NO_RECORDED_VALUE = 1  # DataPointFlags


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """A request in columns, before its timestamps are judged.

    `ordinals[i]` is point i's place among all number data points of the request; rejected ones are left out.
    """

    layout: SeriesLayout
    series: NDArray[np.int32]
    times_ns: NDArray[np.uint64]
    values: NDArray[np.float64]
    claims: frozenset[Claim]
    rejected: Mapping[Reason, int]
    ordinals: NDArray[np.int32]


def decode(body: bytes, peer_kind: str, limits: AdmitLimits) -> Decoded:
    """Decode one request's bytes. Raises PeerError ingest.malformed | ingest.too_large."""
    try:
        request = ExportMetricsServiceRequest.FromString(body)
    except DecodeError as error:
        raise PeerError("ingest.malformed", "the request isn't an ExportMetricsServiceRequest") from error
    walk = _Walk(limits)
    for resource_metrics in request.resource_metrics:
        walk.resource(resource_metrics, is_agent=peer_kind == AGENT_KIND)
    return walk.decoded()


class _Walk:
    """Columns while they grow."""

    def __init__(self, limits: AdmitLimits) -> None:
        self._limits = limits
        self._index: dict[Labels, int] = {}
        self._metrics: dict[str, Metric] = {}
        self._claims: set[Claim] = set()
        self._rejected: Counter[Reason] = Counter()
        self._series: list[int] = []
        self._times: list[int] = []
        self._values: list[float] = []
        self._ordinals: list[int] = []
        self._ordinal = 0
        self._points = 0

    def decoded(self) -> Decoded:
        return Decoded(
            SeriesLayout(tuple(self._index), tuple(self._metrics.values())),
            np.array(self._series, np.int32),
            np.array(self._times, np.uint64),
            np.array(self._values, np.float64),
            frozenset(self._claims),
            dict(+self._rejected),
            np.array(self._ordinals, np.int32),
        )

    def resource(self, resource_metrics: Any, *, is_agent: bool) -> None:
        facts = {attribute.key: _text(attribute.value) for attribute in resource_metrics.resource.attributes}
        namespace, service = facts.get("service.namespace", ""), facts.get("service.name", "")
        job = f"{namespace}/{service}" if namespace else service
        node_id = facts.get("pgherd.node.id", "")
        self._claims.add(Claim(facts.get("pgherd.agent.id", ""), node_id, job))
        origin = {"job": job, "instance": facts.get("service.instance.id", "")}
        if is_agent:
            origin["cluster"] = facts.get("pgherd.cluster", "")
            origin["node"] = facts.get("pgherd.node", "") if node_id else ""
        origin = {name: value for name, value in origin.items() if value}
        for scope_metrics in resource_metrics.scope_metrics:
            is_ours = scope_metrics.scope.name == AGENT_SCOPE
            for metric in scope_metrics.metrics:
                self._metric(metric, origin, is_ours=is_ours)

    def _metric(self, metric: Any, origin: dict[str, str], *, is_ours: bool) -> None:
        field = metric.WhichOneof("data")
        if field is None:
            return
        points = getattr(metric, field).data_points
        self._points += len(points)
        if self._points > self._limits.points_max:
            raise PeerError("ingest.too_large", f"more than {self._limits.points_max} data points in one request")
        if field not in ("gauge", "sum"):
            self._rejected[Reason.KIND] += len(points)
            return
        first_ordinal, self._ordinal = self._ordinal, self._ordinal + len(points)
        if field == "sum" and metric.sum.aggregation_temporality != _CUMULATIVE:
            self._rejected[Reason.DELTA] += len(points)
            return
        is_counter = field == "sum" and metric.sum.is_monotonic
        name = (
            metric.name if is_ours else metric_name(metric.name, metric.unit, is_counter=is_counter, is_gauge=field == "gauge")
        )
        if len(name) > self._limits.name_chars_max or METRIC_NAME_RE.fullmatch(name) is None:
            self._rejected[Reason.NAME] += len(points)
            return
        kept_before = len(self._series)
        self._data_points(points, first_ordinal, {**origin, "__name__": name}, is_ours=is_ours)
        if len(self._series) > kept_before:
            kind = MetricKind.COUNTER if is_counter else MetricKind.GAUGE
            self._metrics[name] = Metric(name, kind, metric.description[: self._limits.label_value_chars_max], metric.unit[:64])

    def _data_points(self, points: Sequence[Any], first_ordinal: int, origin: dict[str, str], *, is_ours: bool) -> None:
        index, rejected = self._index, self._rejected
        for ordinal, point in enumerate(points, first_ordinal):
            if point.flags & _NO_RECORDED_VALUE:
                value = STALE_NAN
            elif point.HasField("as_double"):
                value = point.as_double
            elif point.HasField("as_int"):
                value = float(point.as_int)
            else:
                rejected[Reason.NO_VALUE] += 1
                continue
            labels = self._labels(point.attributes, origin, is_ours=is_ours)
            if labels is None:
                rejected[Reason.LABELS] += 1
                continue
            self._series.append(index.setdefault(labels, len(index)))
            self._times.append(point.time_unix_nano)
            self._values.append(value)
            self._ordinals.append(ordinal)

    def _labels(self, attributes: Iterable[Any], origin: dict[str, str], *, is_ours: bool) -> Labels | None:
        limits = self._limits
        labels: dict[str, str] = {}
        for attribute in attributes if is_ours else sorted(attributes, key=lambda attribute: attribute.key):
            name, value = attribute.key, _text(attribute.value)
            if not is_ours:
                name = label_name(name)
            if name in RESERVED_LABELS:
                name = f"exported_{name}"
            if len(name) > limits.name_chars_max or LABEL_NAME_RE.fullmatch(name) is None or name.startswith("__"):
                return None
            if len(value) > limits.label_value_chars_max:
                return None
            if name in labels:  # two keys with one translation: joined, as the specification says
                value = f"{labels[name]};{value}"
            if value:
                labels[name] = value
        labels.update(origin)
        if len(labels) > limits.labels_max:
            return None
        return tuple(sorted(labels.items()))


def _text(value: Any) -> str:
    """An AnyValue as a label's value."""
    kind = value.WhichOneof("value")
    if kind == "string_value":
        text: str = value.string_value
        return text
    if kind is None:
        return ""
    plain = _plain(value)
    return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False, separators=(",", ":"))


def _plain(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_plain(item) for item in value.array_value.values]
    if kind == "kvlist_value":
        return {item.key: _plain(item.value) for item in value.kvlist_value.values}
    if kind == "bytes_value":
        return base64.b64encode(value.bytes_value).decode("ascii")
    return getattr(value, kind) if kind else None

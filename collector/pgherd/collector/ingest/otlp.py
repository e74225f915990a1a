"""ExportMetricsServiceRequest → columns: the slow path, and the meaning that the fast path must keep. Pure.

Metrics of the scope `pgherd.agent` carry Prometheus names already; all others are translated.

    gauge, sum              one sample a point; delta sums are marked, the store adds them up
    histogram               `_bucket{le}` per explicit bound and `+Inf`, `_sum` when it is sent, `_count`
    exponential histogram   the same on the bounds of a fixed ladder (buckets.py)
    summary                 the series itself per `quantile`, `_sum`, `_count`

Integers become floats (above 2^53 the nearest one). Start times, min and max, exemplars, scope attributes and
resource attributes besides job, instance, cluster and node aren't kept. A delta of what isn't monotonic is rejected:
after its sender's restart nothing tells what it counts from.
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

from pgherd.collector.ingest.admit import AGENT_KIND, AdmitLimits, Claim, Reason, Said
from pgherd.collector.ingest.buckets import SCALE_MAX, SCALE_MIN, bound_text, bound_texts, ladder_of, running_counts
from pgherd.collector.ingest.names import LABEL_NAME_RE, METRIC_NAME_RE, RESERVED_LABELS, label_name, metric_name
from pgherd.proto.errors import PeerError
from pgherd.proto.samples import STALE_NAN, Metric, MetricKind
from pgherd.proto.selectors import NAME_LABEL
from pgherd.storage.series.batch import Labels, SeriesLayout

AGENT_SCOPE = "pgherd.agent"
COUNT_PART, SUM_PART = -1, -2
_DELTA, _CUMULATIVE = 1, 2  # AggregationTemporality
_NO_RECORDED_VALUE = 1  # DataPointFlags
_LONGEST_SUFFIX = len("_bucket")

_KINDS = {
    "gauge": MetricKind.GAUGE, "histogram": MetricKind.HISTOGRAM, "exponential_histogram": MetricKind.HISTOGRAM,
    "summary": MetricKind.SUMMARY,
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """A request in columns, before its timestamps are judged.

    `ordinals[i]` is the place, among all data points of the request, of the one that sample i is from; rejected ones
    are left out. `parts[i]` says which part of it: 0 for a number, bucket k, COUNT_PART or SUM_PART of a histogram.
    """

    layout: SeriesLayout
    series: NDArray[np.int32]
    times_ns: NDArray[np.uint64]
    values: NDArray[np.float64]
    claims: frozenset[Claim]
    rejected: Mapping[Reason, int]
    ordinals: NDArray[np.int32]
    parts: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class _Origin:
    """What a resource and its scope say about a metric's points."""

    labels: Mapping[str, str]
    is_ours: bool
    is_takable: bool = True  # its labels are within the limits


@dataclass(frozen=True, slots=True)
class _Family:
    """A metric that is taken."""

    name: str
    unit: str
    is_delta: bool
    origin: _Origin


def decode(body: bytes, peer_kind: str, limits: AdmitLimits) -> Decoded:
    """Decode one request's bytes. Raises PeerError ingest.malformed | ingest.too_large."""
    try:
        request = ExportMetricsServiceRequest.FromString(body)
    except DecodeError as error:
        raise PeerError("ingest.malformed", "the request isn't an ExportMetricsServiceRequest") from error
    walk = _Walk(limits)
    walk.begin(request)
    for resource_metrics in request.resource_metrics:
        walk.resource(resource_metrics, is_agent=peer_kind == AGENT_KIND)
    return walk.decoded()


class _Walk:
    """Columns while they grow."""

    def __init__(self, limits: AdmitLimits) -> None:
        self._limits = limits
        self._index: dict[tuple[Labels, bool], int] = {}
        self._metrics: dict[str, Metric] = {}
        self._claims: set[Claim] = set()
        self._rejected: Counter[Reason] = Counter()
        self._series: list[int] = []
        self._times: list[int] = []
        self._values: list[float] = []
        self._ordinals: list[int] = []
        self._parts: list[int] = []
        self._points = 0
        self._containers = 0

    def decoded(self) -> Decoded:
        deltas = tuple(place for place, (_, is_delta) in enumerate(self._index) if is_delta)
        return Decoded(
            SeriesLayout(tuple(labels for labels, _ in self._index), tuple(self._metrics.values()), deltas),
            np.array(self._series, np.int32),
            np.array(self._times, np.uint64),
            np.array(self._values, np.float64),
            frozenset(self._claims),
            dict(+self._rejected),
            np.array(self._ordinals, np.int32),
            np.array(self._parts, np.int32),
        )

    def begin(self, request: Any) -> None:
        """Refuse what holds too much, before any of it is walked."""
        self._contains(len(request.resource_metrics))

    def resource(self, resource_metrics: Any, *, is_agent: bool) -> None:
        self._contains(len(resource_metrics.scope_metrics))
        facts = {attribute.key: _text(attribute.value) for attribute in resource_metrics.resource.attributes}
        namespace, service = facts.get("service.namespace", ""), facts.get("service.name", "")
        job = f"{namespace}/{service}" if namespace else service
        node_id = facts.get("pgherd.node.id", "")
        instance = facts.get("service.instance.id", "")
        cluster, node = (facts.get("pgherd.cluster", ""), facts.get("pgherd.node", "")) if is_agent else ("", "")
        said = Said(node_id, cluster, node if node_id else "", instance)
        self._claims.add(Claim(facts.get("pgherd.agent.id", ""), said, job))
        origin = {"job": job, "instance": said.instance, "cluster": said.cluster, "node": said.node}
        origin = {name: value for name, value in origin.items() if value}
        # Every series of the resource carries them: a megabyte here would be gigabytes in the store.
        is_takable = all(len(value) <= self._limits.label_value_chars_max for value in origin.values())
        for scope_metrics in resource_metrics.scope_metrics:
            self._contains(len(scope_metrics.metrics))
            from_scope = _Origin(origin, scope_metrics.scope.name == AGENT_SCOPE, is_takable)
            for metric in scope_metrics.metrics:
                self._metric(metric, from_scope)

    def _metric(self, metric: Any, origin: _Origin) -> None:
        field = metric.WhichOneof("data")
        if field is None:
            return
        data = getattr(metric, field)
        points = data.data_points
        first_ordinal, self._points = self._points, self._points + len(points)
        self._check_size(self._points)
        is_counter = field == "sum" and data.is_monotonic
        name = (
            metric.name
            if origin.is_ours
            else metric_name(metric.name, metric.unit, is_counter=is_counter, is_gauge=field == "gauge")
        )
        temporality = getattr(data, "aggregation_temporality", _CUMULATIVE)
        refusal = self._refusal(name, field, temporality, is_counter=is_counter) if origin.is_takable else Reason.LABELS
        if refusal is not None:
            self._rejected[refusal] += len(points)
            return
        family = _Family(name, metric.unit, temporality == _DELTA, origin)
        kept_before = len(self._series)
        take = {
            "gauge": self._number, "sum": self._number, "histogram": self._histogram,
            "exponential_histogram": self._exponential, "summary": self._summary,
        }[field]  # fmt: skip
        for ordinal, point in enumerate(points, first_ordinal):
            self._refuse_or_take(take, family, ordinal, point)
        if len(self._series) > kept_before:
            kind = MetricKind.COUNTER if is_counter else _KINDS.get(field, MetricKind.GAUGE)
            self._metrics[name] = Metric(name, kind, metric.description[: self._limits.label_value_chars_max], metric.unit[:64])

    def _contains(self, containers: int) -> None:
        """Count what costs time without being a point, before it is walked."""
        self._containers += containers
        if self._containers > self._limits.containers_max:
            raise PeerError(
                "ingest.too_large", f"more than {self._limits.containers_max} resources, scopes and metrics in one request"
            )

    def _check_size(self, points: int) -> None:
        if points > self._limits.points_max:
            raise PeerError("ingest.too_large", f"more than {self._limits.points_max} data points or samples in one request")

    def _refusal(self, name: str, field: str, temporality: int, *, is_counter: bool) -> Reason | None:
        """Why none of a metric's points can be taken."""
        if temporality not in (_DELTA, _CUMULATIVE):
            return Reason.TEMPORALITY
        if field == "sum" and temporality == _DELTA and not is_counter:
            return Reason.DELTA
        if len(name) + _LONGEST_SUFFIX > self._limits.name_chars_max or METRIC_NAME_RE.fullmatch(name) is None:
            return Reason.NAME
        return None

    def _refuse_or_take(self, take: Any, family: _Family, ordinal: int, point: Any) -> None:
        labels = self._labels(point.attributes, family.origin)
        if labels is None:
            self._rejected[Reason.LABELS] += 1
            return
        refusal = take(family, labels, ordinal, point)
        if refusal is not None:
            self._rejected[refusal] += 1

    # --- one kind of point each: its samples, or why it can't be taken --------------------------

    def _number(self, family: _Family, labels: dict[str, str], ordinal: int, point: Any) -> Reason | None:
        if point.flags & _NO_RECORDED_VALUE:
            value = STALE_NAN
        elif point.HasField("as_double"):
            value = point.as_double
        elif point.HasField("as_int"):
            value = float(point.as_int)
        else:
            return Reason.NO_VALUE
        self._sample(family, labels, ordinal, point, 0, value)
        return None

    def _histogram(self, family: _Family, labels: dict[str, str], ordinal: int, point: Any) -> Reason | None:
        bounds, counts = point.explicit_bounds, point.bucket_counts
        fits = len(counts) == len(bounds) + 1 or not (counts or bounds)  # without buckets it has count and sum only
        texts = bound_texts(tuple(bounds)) if fits and len(counts) <= self._limits.buckets_max else None
        if texts is None:
            return Reason.BUCKETS
        self._classic(family, labels, ordinal, point, texts, running_counts(counts))
        return None

    def _exponential(self, family: _Family, labels: dict[str, str], ordinal: int, point: Any) -> Reason | None:
        if not SCALE_MIN <= point.scale <= SCALE_MAX:
            return Reason.BUCKETS
        ladder = ladder_of(family.unit, is_ours=family.origin.is_ours)
        self._classic(family, labels, ordinal, point, ladder.texts, ladder.read(point))
        return None

    def _classic(
        self, family: _Family, labels: dict[str, str], ordinal: int, point: Any, bounds: Sequence[str], counts: Sequence[float]
    ) -> None:
        is_stale = bool(point.flags & _NO_RECORDED_VALUE)
        for part, (bound, count) in enumerate(zip(bounds, counts, strict=True)):
            self._sample(family, labels | {"le": bound}, ordinal, point, part, count, "_bucket", is_stale=is_stale)
        count = float(point.count)
        self._sample(family, labels | {"le": "+Inf"}, ordinal, point, COUNT_PART, count, "_bucket", is_stale=is_stale)
        self._sample(family, labels, ordinal, point, COUNT_PART, count, "_count", is_stale=is_stale)
        if point.HasField("sum") or is_stale:  # a marker's point carries no sum, and yet ends that series too
            self._sample(family, labels, ordinal, point, SUM_PART, point.sum, "_sum", is_stale=is_stale)

    def _summary(self, family: _Family, labels: dict[str, str], ordinal: int, point: Any) -> Reason | None:
        if len(point.quantile_values) > self._limits.buckets_max:
            return Reason.BUCKETS
        is_stale = bool(point.flags & _NO_RECORDED_VALUE)
        for part, quantile in enumerate(point.quantile_values):
            with_quantile = labels | {"quantile": bound_text(quantile.quantile)}
            self._sample(family, with_quantile, ordinal, point, part, quantile.value, is_stale=is_stale)
        self._sample(family, labels, ordinal, point, COUNT_PART, float(point.count), "_count", is_stale=is_stale)
        self._sample(family, labels, ordinal, point, SUM_PART, point.sum, "_sum", is_stale=is_stale)
        return None

    def _sample(
        self,
        family: _Family,
        labels: Mapping[str, str],
        ordinal: int,
        point: Any,
        part: int,
        value: float,
        suffix: str = "",
        *,
        is_stale: bool = False,
    ) -> None:
        key = tuple(sorted({**labels, NAME_LABEL: family.name + suffix}.items())), family.is_delta
        self._series.append(self._index.setdefault(key, len(self._index)))
        self._check_size(len(self._series))
        self._times.append(point.time_unix_nano)
        self._values.append(STALE_NAN if is_stale else value)
        self._ordinals.append(ordinal)
        self._parts.append(part)

    def _labels(self, attributes: Iterable[Any], origin: _Origin) -> dict[str, str] | None:
        """A point's labels without its name; None when they can't be taken."""
        limits = self._limits
        labels: dict[str, str] = {}
        for attribute in attributes if origin.is_ours else sorted(attributes, key=lambda attribute: attribute.key):
            name, value = attribute.key, _text(attribute.value)
            if not origin.is_ours:
                name = label_name(name)
            if name in RESERVED_LABELS:
                name = f"exported_{name}"
            if len(name) > limits.name_chars_max or LABEL_NAME_RE.fullmatch(name) is None or name.startswith("__"):
                return None
            if name in labels:  # two keys with one translation: joined, as the specification says
                value = f"{labels[name]};{value}"
            if len(value) > limits.label_value_chars_max:
                return None
            if value:
                labels[name] = value
        labels.update(origin.labels)
        return labels if len(labels) + 2 <= limits.labels_max else None  # its name, and perhaps `le`


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

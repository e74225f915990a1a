"""The fast path gives what the slow path gives: for any request, any numbers in its holes, any changed byte."""

from __future__ import annotations

import os
import struct
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from pgherd.collector.ingest import otlp
from pgherd.collector.ingest.admit import AdmitLimits
from pgherd.collector.ingest.otlp import Decoded
from pgherd.collector.ingest.shape import ShapeCache, scan, template_of
from pgherd.proto.errors import PeerError
from pgherd.proto.samples import STALE_NAN_BITS
from support.mutations import mutated
from support.otlp import histogram, resource

LIMITS = AdmitLimits(points_max=1000)
TEXT = st.text(max_size=8)
KEYS = st.sampled_from(["datname", "job", "node", "a.b", "a_b", "__name__", "9x", ""])
SPECIAL_BITS = st.sampled_from([STALE_NAN_BITS, 0x7FF8000000000000, 0, 1 << 63, (1 << 64) - 1, 0x7FF0000000000000])
TEMPORALITY: st.SearchStrategy[Any] = st.sampled_from([0, 1, 2, 2, 2])
WORDS = st.one_of(SPECIAL_BITS, st.integers(0, (1 << 64) - 1))


def _real() -> list[bytes]:
    bodies = []
    for series in (1, 3, 20):
        request = ExportMetricsServiceRequest()
        made = resource(request)
        gauge = made.scope_metrics.add().metrics.add(name="pg_up").gauge
        total = made.scope_metrics[0].metrics.add(name="pg_commits").sum
        total.is_monotonic, total.aggregation_temporality = True, 2
        for number in range(series):
            for points in (gauge.data_points, total.data_points):
                point = points.add(as_double=number / 3, time_unix_nano=1_900_000_000_000_000_000)
                point.attributes.add(key="datname").value.string_value = f"db{number}"
        histogram(made, "latency", [0.1, 1.0], [3, 2, 1], time_ns=1_900_000_000_000_000_000, total=2.5, delta=False)
        bodies.append(request.SerializeToString())
    return bodies


REAL = _real()


class AnyPeer:
    def __init__(self, kind: str) -> None:
        self.kind, self.id = kind, "someone"


def fill_value(draw: st.DrawFn, value: Any) -> None:
    match draw(st.integers(0, 6)):
        case 0:
            value.int_value = draw(st.integers(-5, 5))
        case 1:
            value.bool_value = draw(st.booleans())
        case 2:
            value.bytes_value = draw(st.binary(max_size=3))
        case 3:
            value.array_value.values.add().string_value = draw(TEXT)
        case 4:
            pass
        case _:
            value.string_value = draw(TEXT)


def fill_point(draw: st.DrawFn, point: Any) -> None:
    for key in draw(st.lists(KEYS, max_size=3)):
        fill_value(draw, point.attributes.add(key=key).value)
    point.time_unix_nano = draw(WORDS)
    point.start_time_unix_nano = draw(st.one_of(st.just(0), WORDS))
    match draw(st.integers(0, 4)):
        case 0:
            point.as_int = draw(st.integers(-(1 << 63), (1 << 63) - 1))
        case 1:
            pass
        case _:
            point.as_double = struct.unpack("<d", struct.pack("<Q", draw(WORDS)))[0]
    point.flags = draw(st.sampled_from([0, 0, 0, 1]))
    if draw(st.integers(0, 30)) == 0:
        point.exemplars.add(as_double=1.0)


def fill_histogram(draw: st.DrawFn, point: Any) -> None:
    for key in draw(st.lists(KEYS, max_size=2)):
        fill_value(draw, point.attributes.add(key=key).value)
    point.time_unix_nano = draw(WORDS)
    point.count = draw(st.one_of(st.just(0), WORDS))
    if draw(st.booleans()):
        point.sum = struct.unpack("<d", struct.pack("<Q", draw(WORDS)))[0]
    bounds = sorted(draw(st.lists(st.sampled_from([-1.0, 0.0, 0.005, 1.0, 1e10, float("inf")]), max_size=4)))
    point.explicit_bounds.extend(bounds)
    buckets = len(bounds) + draw(st.sampled_from([1, 1, 1, 0, 2])) if bool(bounds) or draw(st.booleans()) else 0
    point.bucket_counts.extend(draw(st.lists(WORDS, min_size=buckets, max_size=buckets)))
    point.flags = draw(st.sampled_from([0, 0, 0, 1]))
    if draw(st.booleans()):
        point.min, point.max = 1.0, 2.0


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    request = ExportMetricsServiceRequest()
    for _ in range(draw(st.integers(0, 2))):
        resource_metrics = request.resource_metrics.add()
        names = ["service.name", "service.instance.id", "pgherd.agent.id", "pgherd.node.id", "pgherd.node", "pgherd.cluster"]
        for key in draw(st.lists(st.sampled_from(names), max_size=4)):
            fill_value(draw, resource_metrics.resource.attributes.add(key=key).value)
        for _ in range(draw(st.integers(0, 2))):
            scope = resource_metrics.scope_metrics.add()
            scope.scope.name = draw(st.sampled_from(["pgherd.agent", "other", ""]))
            for _ in range(draw(st.integers(0, 3))):
                metric = scope.metrics.add(
                    name=draw(st.sampled_from(["pg_up", "a.b", "é", "", "x" * 300])),
                    unit=draw(st.sampled_from(["", "By", "1"])),
                )
                kind = draw(
                    st.sampled_from(
                        ["gauge", "gauge", "sum", "sum", "histogram", "histogram", "exponential", "summary", "none"]
                    )
                )
                if kind == "gauge":
                    metric.gauge.SetInParent()
                    for _ in range(draw(st.integers(0, 4))):
                        fill_point(draw, metric.gauge.data_points.add())
                elif kind == "sum":
                    metric.sum.aggregation_temporality = draw(TEMPORALITY)
                    metric.sum.is_monotonic = draw(st.booleans())
                    for _ in range(draw(st.integers(0, 4))):
                        fill_point(draw, metric.sum.data_points.add())
                elif kind == "histogram":
                    metric.histogram.aggregation_temporality = draw(TEMPORALITY)
                    for _ in range(draw(st.integers(0, 3))):
                        fill_histogram(draw, metric.histogram.data_points.add())
                elif kind == "exponential" and draw(st.integers(0, 3)) == 0:
                    metric.exponential_histogram.aggregation_temporality = draw(TEMPORALITY)
                    metric.exponential_histogram.data_points.add(count=1, scale=draw(st.integers(-11, 21)), time_unix_nano=5)
                elif kind == "summary" and draw(st.integers(0, 3)) == 0:
                    metric.summary.data_points.add(count=1, time_unix_nano=5).quantile_values.add(quantile=0.5, value=2.0)
    body: bytes = request.SerializeToString()
    return body


def facts(decoded: Decoded) -> object:
    return (
        decoded.layout.labels, decoded.layout.metrics, decoded.series.tolist(), decoded.times_ns.tolist(),
        decoded.values.view(np.uint64).tolist(), decoded.claims, dict(decoded.rejected), decoded.layout.deltas,
        decoded.ordinals.tolist(), decoded.parts.tolist(),
    )  # fmt: skip


def slow(body: bytes, kind: str) -> object:
    try:
        return facts(otlp.decode(body, kind, LIMITS))
    except PeerError as error:
        return error.code


@settings(max_examples=150, deadline=None)
@given(body=requests(), kind=st.sampled_from(["agent", "client"]), data=st.data())
def test_fast_path_equals_slow_path(body: bytes, kind: str, data: st.DataObject) -> None:
    cache, peer = ShapeCache(LIMITS), AnyPeer(kind)
    for _ in range(2):  # the second sight makes the template
        assert facts(cache.decode(body, peer)) == slow(body, kind)
    changed = bytearray(body)
    holes = [at for point in scan(body) or () for at in point.all()]
    for at in holes:
        changed[at : at + 8] = data.draw(WORDS).to_bytes(8, "little")
    hits = cache.hits
    assert facts(cache.decode(bytes(changed), peer)) == slow(bytes(changed), kind)
    if template_of(body, otlp.decode(body, kind, LIMITS)) is not None:
        assert cache.hits == hits + 1
    for _ in range(3):
        if not changed:
            break
        changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        expected = slow(bytes(changed), kind)
        try:
            found: object = facts(cache.decode(bytes(changed), peer))
        except PeerError as error:
            found = error.code
        assert found == expected


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(st.binary(max_size=200), requests().map(lambda body: body[:-1]), requests().map(lambda body: body + b"\x0a\xff"))
)
def test_any_bytes_are_decoded_or_refused(body: bytes) -> None:
    scan(body)
    assert not isinstance(slow(body, "client"), str) or slow(body, "client") in ("ingest.malformed", "ingest.too_large")


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A request that real exporters send, with pieces cut out, doubled and exchanged."""
    atoms = [b"\x00", b"\xff" * 10, b"\x0a\xff", b"\x12\x7f", b"\x80" * 11 + b"\x01", b"\x0a\x00"]
    return mutated(draw, draw(st.sampled_from(REAL)), REAL, atoms)


@settings(max_examples=int(os.environ.get("PGHERD_FUZZ_EXAMPLES", "300")), deadline=None)
@given(body=damaged(), kind=st.sampled_from(["agent", "client"]))
def test_a_damaged_request_is_decoded_alike_or_refused(body: bytes, kind: str) -> None:
    expected = slow(body, kind)
    assert not isinstance(expected, str) or expected in ("ingest.malformed", "ingest.too_large")
    cache, peer = ShapeCache(LIMITS), AnyPeer(kind)
    for whole in (*REAL, *REAL):  # templates of the undamaged ones are known
        cache.decode(whole, peer)
    for _ in range(2):
        try:
            found: object = facts(cache.decode(body, peer))
        except PeerError as error:
            found = error.code
        assert found == expected


def test_no_part_of_a_request_is_taken_twice() -> None:
    """A message set twice is merged by protobuf: such bytes must not get a template."""
    request = ExportMetricsServiceRequest()
    metric = request.resource_metrics.add().scope_metrics.add().metrics.add(name="x")
    metric.gauge.data_points.add(as_double=1.0, time_unix_nano=5)
    body = request.SerializeToString()
    assert template_of(body, otlp.decode(body, "client", LIMITS)) is not None
    inner = metric.SerializeToString()
    for extra in (metric.gauge.data_points[0].SerializeToString(), b""):
        gauge_again = (
            inner
            + b"\x2a"
            + bytes([len(extra) + 2 if extra else 0])
            + (b"\x0a" + bytes([len(extra)]) + extra if extra else b"")
        )
        scope = b"\x12" + bytes([len(gauge_again)]) + gauge_again
        resource = b"\x12" + bytes([len(scope)]) + scope
        merged = b"\x0a" + bytes([len(resource)]) + resource
        assert len(otlp.decode(merged, "client", LIMITS).series) == (2 if extra else 1)
        assert scan(merged) is None


def test_explicit_histograms_take_the_fast_path() -> None:
    def body(counts: list[int], total: float, time_ns: int) -> bytes:
        request = ExportMetricsServiceRequest()
        made = resource(request)
        for delta in (True, False):
            histogram(made, f"h{delta:d}", [1.0, 2.0], counts, time_ns=time_ns, total=total, delta=delta)
        encoded: bytes = request.SerializeToString()
        return encoded

    cache, peer = ShapeCache(LIMITS), AnyPeer("agent")
    for n in range(1, 6):
        request = body([n, 0, 1 << 60], n / 3, n * 1000)
        assert facts(cache.decode(request, peer)) == slow(request, "agent")
    assert cache.hits == 3


def test_cache_stays_within_its_bound() -> None:
    def body(series: int) -> bytes:
        request = ExportMetricsServiceRequest()
        metric = request.resource_metrics.add().scope_metrics.add().metrics.add(name="x")
        for i in range(series):
            metric.gauge.data_points.add(as_double=1.0, time_unix_nano=5).attributes.add(key="i").value.string_value = str(i)
        encoded: bytes = request.SerializeToString()
        return encoded

    cache = ShapeCache(AdmitLimits(), bytes_max=480_000)
    peer, calm = AnyPeer("client"), AnyPeer("agent")
    for _ in range(2):
        cache.decode(body(9), calm)
    for series in range(10, 60):
        for _ in range(2):
            cache.decode(body(series), peer)
        assert 0 < cache.size_bytes <= 70_000
    assert cache.hits == 0
    cache.decode(body(59), peer)
    assert cache.hits == 1
    cache.decode(body(10), peer)
    assert cache.hits == 1  # long gone
    cache.decode(body(9), calm)
    assert cache.hits == 2  # the other sender's is still there

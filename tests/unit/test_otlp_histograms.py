"""Histograms as classic buckets: which series, which counts, and how far a quantile of them can be off."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import ExponentialHistogramDataPoint

from pgherd.collector.ingest import otlp
from pgherd.collector.ingest.admit import AdmitLimits
from pgherd.collector.ingest.buckets import bound_text, bound_texts, ladder_of
from pgherd.proto.samples import STALE_NAN_BITS, MetricKind
from support.otlp import histogram, resource

NOW_NS = 1_795_000_000_000_000_000
FINE, SECONDS = ladder_of("s", is_ours=True), ladder_of("s", is_ours=False)


def decode(request: Any, kind: str = "client") -> otlp.Decoded:
    return otlp.decode(request.SerializeToString(), kind, AdmitLimits())


def values_of(decoded: otlp.Decoded) -> dict[tuple[str, str], float]:
    """(name, le or quantile) → value."""
    labels = [dict(decoded.layout.labels[place]) for place in decoded.series]
    return {
        (one["__name__"], one.get("le", one.get("quantile", ""))): value
        for one, value in zip(labels, decoded.values.tolist(), strict=True)
    }


def test_explicit_buckets_run_up_to_the_count() -> None:
    request = ExportMetricsServiceRequest()
    made = resource(request, agent="", node="", service_name="shop")
    histogram(made, "http.duration", [0.005, 1.0, 1e-7 + 1e3], [1, 2, 0, 4], time_ns=NOW_NS, scope="x", unit="s", total=9.5)
    decoded = decode(request)
    name = "http_duration_seconds"
    assert values_of(decoded) == {
        (f"{name}_bucket", "0.005"): 1.0, (f"{name}_bucket", "1"): 3.0, (f"{name}_bucket", "1000.0000001"): 3.0,
        (f"{name}_bucket", "+Inf"): 7.0, (f"{name}_count", ""): 7.0, (f"{name}_sum", ""): 9.5,
    }  # fmt: skip
    assert decoded.layout.deltas == ()
    assert set(decoded.ordinals.tolist()) == {0}
    assert [(metric.name, metric.kind) for metric in decoded.layout.metrics] == [(name, MetricKind.HISTOGRAM)]


def test_without_bounds_or_sum_there_are_only_count_and_inf() -> None:
    request = ExportMetricsServiceRequest()
    histogram(resource(request), "h", [], [], time_ns=NOW_NS)
    assert values_of(decode(request, "agent")) == {("h_bucket", "+Inf"): 0.0, ("h_count", ""): 0.0}


def test_delta_series_are_marked_and_kept_apart_from_cumulative_ones() -> None:
    request = ExportMetricsServiceRequest()
    made = resource(request)
    histogram(made, "h", [1.0], [2, 1], time_ns=NOW_NS, delta=True)
    histogram(made, "h", [1.0], [2, 1], time_ns=NOW_NS)
    decoded = decode(request, "agent")
    assert decoded.layout.deltas == (0, 1, 2)
    assert len(decoded.layout.labels) == 6


def test_a_summary_keeps_its_quantiles() -> None:
    request = ExportMetricsServiceRequest()
    added = resource(request).scope_metrics.add().metrics.add(name="rpc.time", unit="s")
    point = added.summary.data_points.add(count=3, sum=6.0, time_unix_nano=NOW_NS)
    point.quantile_values.add(quantile=0.99, value=4.0)
    name = "rpc_time_seconds"
    assert values_of(decode(request, "agent")) == {(name, "0.99"): 4.0, (f"{name}_count", ""): 3.0, (f"{name}_sum", ""): 6.0}


def test_a_histogram_without_a_recorded_value_is_stale_in_every_series() -> None:
    request = ExportMetricsServiceRequest()
    made = resource(request)
    histogram(made, "h", [1.0], [0, 0], time_ns=NOW_NS, total=0.0).histogram.data_points[0].flags = 1
    exponential = made.scope_metrics.add().metrics.add(name="e", unit="s").exponential_histogram
    exponential.aggregation_temporality = 2
    exponential.data_points.add(time_unix_nano=NOW_NS, flags=1)
    bits = decode(request, "agent").values.view(np.uint64)
    assert len(bits) == 4 + len(SECONDS.texts) + 3, "its sum ends too, though the point carries none"
    assert set(bits.tolist()) == {STALE_NAN_BITS}


def test_bounds_are_written_as_prometheus_writes_them() -> None:
    assert [bound_text(b) for b in (1.0, 0.25, 1e-7, 2.0**48, 1e22, math.inf)] == [
        "1", "0.25", "0.0000001", "281474976710656", "10000000000000000000000", "+Inf",
    ]  # fmt: skip
    assert bound_texts((1.0, 1.0)) is None
    assert "1" in FINE.texts  # P99 > 1000 ms is a count at a bound, not an interpolation
    assert len(FINE.texts) == 133
    assert len(SECONDS.texts) == 67


# --- exponential histograms ---------------------------------------------------------------------


def exponential(observations: list[float], scale: int) -> ExponentialHistogramDataPoint:
    """As an SDK would record them."""
    point = ExponentialHistogramDataPoint(scale=scale, count=len(observations), time_unix_nano=NOW_NS)
    places = [math.ceil(math.log2(value) * 2.0**scale) - 1 for value in observations if value > 0]
    point.zero_count = sum(value == 0 for value in observations)
    if places:
        point.positive.offset = min(places)
        point.positive.bucket_counts.extend(places.count(place) for place in range(min(places), max(places) + 1))
    if negative := sum(value < 0 for value in observations):
        point.negative.bucket_counts.append(negative)
    return point


def quantile(q: float, texts: tuple[str, ...], counts: list[float], count: float) -> float:
    """Prometheus' histogram_quantile over classic buckets."""
    rank = q * count
    place = next((i for i, below in enumerate(counts) if below >= rank), None)
    if place is None:
        return float(texts[-1])
    low = float(texts[place - 1]) if place else 0.0
    before = counts[place - 1] if place else 0.0
    return low + (float(texts[place]) - low) * (rank - before) / (counts[place] - before)


# Powers of two with their neighbours are where a bucket's closed end matters; log2 of them is exact here.
DURATIONS = st.lists(st.one_of(st.floats(2e-5, 1000.0), st.integers(-12, 9).map(lambda k: 2.0**k)), min_size=1, max_size=60)


@given(DURATIONS, st.integers(3, 12), st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
def test_quantiles_are_within_one_step_of_the_ladder(observations: list[float], scale: int, q: float) -> None:
    for ladder in (FINE, SECONDS):
        found = quantile(q, ladder.texts, ladder.read(exponential(observations, scale)), len(observations))
        true = sorted(observations)[max(math.ceil(q * len(observations)) - 1, 0)]
        assert max(found / true, true / found) <= ladder.step_ratio(true) * (1 + 1e-9)


def test_the_stated_steps() -> None:
    assert FINE.step_ratio(1.0) == pytest.approx(1.0905, abs=1e-4)
    assert FINE.step_ratio(60.0) == pytest.approx(math.sqrt(2))
    assert SECONDS.step_ratio(0.1) == pytest.approx(1.1892, abs=1e-4)
    assert FINE.step_ratio(5000.0) == math.inf


@given(DURATIONS, DURATIONS, st.integers(-2, 8), st.integers(0, 8))
def test_no_count_falls_while_observations_come_and_the_scale_goes_down(
    first: list[float], more: list[float], scale: int, coarser: int
) -> None:
    """A count that fell would look like a restart of its counter."""
    for ladder in (FINE, SECONDS):
        before = ladder.read(exponential(first, scale))
        after = ladder.read(exponential(first + more, max(scale - coarser, -10)))
        assert before == sorted(before)
        assert all(low <= high for low, high in zip(before, after, strict=True))
        assert len(before) == len(after) == len(ladder.texts)


def test_zeros_and_negatives_lie_below_every_bound_and_giants_above() -> None:
    counts = SECONDS.read(exponential([0.0, -5.0, 1e-9, 1e9], 0))
    assert set(counts) == {3.0}


def test_extreme_wire_values_are_read_without_fuss() -> None:
    for scale in (-10, 20):
        for offset in (-(1 << 31), (1 << 31) - 1):
            point = ExponentialHistogramDataPoint(scale=scale, zero_count=(1 << 64) - 1)
            point.positive.offset = offset
            point.positive.bucket_counts.extend([(1 << 64) - 1, 5])
            assert len(FINE.read(point)) == len(FINE.texts)


def test_an_agents_statement_durations_get_the_fine_ladder() -> None:
    request = ExportMetricsServiceRequest()
    scope = resource(request).scope_metrics.add()
    scope.scope.name = "pgherd.agent"
    added = scope.metrics.add(name="pgherd_statement_duration_seconds", unit="s").exponential_histogram
    added.aggregation_temporality = 1
    rng = random.Random(5)
    added.data_points.append(exponential([rng.lognormvariate(-4, 2) for _ in range(500)], 5))
    decoded = decode(request, "agent")
    values = values_of(decoded)
    assert values["pgherd_statement_duration_seconds_bucket", "+Inf"] == 500.0
    assert len(values) == len(FINE.texts) + 2
    assert decoded.layout.deltas == tuple(range(len(values)))

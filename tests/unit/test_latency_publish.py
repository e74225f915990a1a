"""From counters to traffic, and from estimates to what goes over the wire."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality

from pgherd.agent.latency.buckets import Buckets
from pgherd.agent.latency.count import Count
from pgherd.agent.latency.estimate import Estimate, Quantile
from pgherd.agent.latency.publish import BUCKETS_MAX, Grown, samples_of
from pgherd.agent.latency.traffic import Counters, Traffic, counters_of, traffic_between
from pgherd.agent.telemetry.convert import Source, encode, series_of
from pgherd.proto.samples import Sample

SOURCE = Source("a", "n", "alias", "cluster", "host:5432")
BEFORE = Counters(1000, 10.0, "k", 5000, 100, "s", 3)
AFTER = Counters(2500, 30.0, "k", 9000, 700, "s", 3)


def difference(after: Counters, *, shared: bool = False) -> Traffic:
    return traffic_between(BEFORE, after, own_looks=590, own_active_s=0.5, role_is_shared=shared)


def test_the_agents_own_statements_are_taken_off() -> None:
    assert difference(AFTER) == Traffic(3400, "", 900, 19.5, 0.5)
    assert difference(AFTER, shared=True).statements == 4000 - 590


def test_a_counter_that_began_anew_has_no_difference() -> None:
    restarted = difference(replace(AFTER, database_key="other", statements_key="other"))
    assert restarted == Traffic(None, "statements_reset", None, None, 0.5)
    assert difference(replace(AFTER, transactions=5)).transactions is None
    assert difference(replace(AFTER, statements=5)).statements_reason == "statements_reset"
    assert difference(replace(AFTER, statements_evictions=4)).statements_reason == "statements_evicted"
    assert difference(replace(AFTER, active_s=1.0)).active_s is None
    gone = difference(replace(AFTER, statements=None, statements_reason="statements_not_installed"))
    assert (gone.statements, gone.statements_reason, gone.transactions) == (None, "statements_not_installed", 910)
    assert traffic_between(None, AFTER, own_looks=0, own_active_s=0, role_is_shared=False).statements_reason == "not_read"


def test_rows_of_an_old_server_lack_what_it_doesnt_count() -> None:
    row = {"transactions": 5.0, "active_ms": None, "sessions": None, "key": "k"}
    assert counters_of(row, None, "statements_too_old") == Counters(5, None, "k", None, statements_reason="statements_too_old")


# ---- the histogram


weights = st.dictionaries(st.floats(1e-7, 1e6), st.floats(0.0, 50.0), max_size=60)


@settings(deadline=None)
@given(st.lists(weights, min_size=1, max_size=6))
def test_the_histogram_only_grows_in_whole_statements_and_stays_short(windows: list[dict[float, float]]) -> None:
    grown, total, before = Grown(7), 0.0, 0
    for window in windows:
        distribution = Buckets()
        for seconds, weight in window.items():
            distribution.add(seconds, weight)
        grown.add(distribution)
        total += distribution.total
        buckets = grown.sample().buckets
        assert buckets is not None
        assert buckets.count >= before
        assert len(buckets.counts) <= BUCKETS_MAX
        assert all(count >= 0 for count in buckets.counts)
        before = buckets.count
    assert abs(before - total) <= 0.5 * len(windows) + 1e-6


def test_the_histogram_on_the_wire_is_cumulative_and_of_the_stated_scale() -> None:
    grown = Grown(7)
    distribution = Buckets()
    for milliseconds in (0.05, 1.0, 4.0, 4.1, 1200.0):
        distribution.add(milliseconds / 1000)
    grown.add(distribution)
    grown.add(distribution)
    series = series_of([grown.sample()])
    request = ExportMetricsServiceRequest.FromString(encode(SOURCE, series, [], 9))
    (metric,) = request.resource_metrics[0].scope_metrics[0].metrics
    histogram = metric.exponential_histogram
    assert histogram.aggregation_temporality == AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
    (point,) = histogram.data_points
    assert (metric.name, metric.unit, point.count, point.scale) == ("pgherd_statement_duration_seconds", "s", 10, 4)
    assert (point.start_time_unix_nano, point.time_unix_nano) == (7, 9)
    assert abs(point.sum - 2 * 1.20915) < 0.02
    filled = [point.positive.offset + place for place, count in enumerate(point.positive.bucket_counts) for _ in range(count)]
    bounds = [(2 ** (index / 16), 2 ** ((index + 1) / 16)) for index in filled]
    wanted = sorted([0.00005, 0.001, 0.004, 0.0041, 1.2] * 2)
    assert all(low * 0.99 < value <= high * 1.01 for value, (low, high) in zip(wanted, bounds, strict=True))
    stale = ExportMetricsServiceRequest.FromString(encode(SOURCE, {}, [grown.sample()], 10))
    (point,) = stale.resource_metrics[0].scope_metrics[0].metrics[0].exponential_histogram.data_points
    assert (point.flags, point.count) == (1, 0)


# ---- gauges

SUFFICIENT = Quantile(0.5, 0.004, 0.0038, 0.0043, "stratified/statements")
WIDE = Quantile(0.95, None, 0.01, 0.09, "age_density/statements", "wide_interval")
NOTHING = Quantile(0.99, None, None, None, "insufficient", "few_finished_seen")


def found(samples: list[Sample], name: str) -> list[tuple[dict[str, str], float]]:
    return [(dict(sample.labels), sample.value) for sample in samples if sample.metric.name == name]


def test_an_insufficient_percentile_has_no_value_but_says_so() -> None:
    distribution = Buckets()
    distribution.add(0.004, 100)
    result = Estimate(
        0.0, 60.0, Count(990, 1000, 1010, "statements"), (SUFFICIENT, WIDE, NOTHING), (3, 5), {9: 2, 8: 3}, 7, (0.001, 0.012),
        distribution, ("few_finished_seen",), 0.9, 700, 598, 2,
    )  # fmt: skip
    samples = samples_of(result, Grown(1), 1.0)
    labels = {"quantile": "0.5", "estimator": "stratified/statements"}
    assert found(samples, "pgherd_statement_latency_seconds") == [(labels, 0.004)]
    assert [value for _, value in found(samples, "pgherd_statement_latency_ci_low_seconds")] == [0.0038, 0.01]
    assert [value for _, value in found(samples, "pgherd_statement_latency_insufficient")] == [0.0, 1.0, 1.0]
    assert found(samples, "pgherd_statements_window") == [({}, 1007)]
    assert found(samples, "pgherd_statements_over_threshold") == [({}, 3)]
    assert found(samples, "pgherd_statements_over_ratio_low") == [({}, 0.001)]
    assert [labels["queryid"] for labels, _ in found(samples, "pgherd_statements_over_threshold_by_query")] == ["8", "9"]
    reasons = [labels["reason"] for labels, _ in found(samples, "pgherd_probe_unknown")]
    assert reasons == ["few_finished_seen", "wide_interval"]
    assert found(samples, "pgherd_statement_duration_seconds") == [({}, 100)]


def test_unknown_is_absent_and_a_window_without_distribution_adds_nothing() -> None:
    grown = Grown(1)
    nothing = Estimate(0.0, 60.0, None, (NOTHING,), None, {}, 0, None, None, ("gaps",), 0.0, 0, 0, 600)
    samples = samples_of(nothing, grown, 1.0)
    names = {sample.metric.name for sample in samples}
    assert not names & {"pgherd_statements_window", "pgherd_statements_over_threshold", "pgherd_statements_over_ratio_low"}
    assert found(samples, "pgherd_statement_duration_seconds") == [({}, 0)]

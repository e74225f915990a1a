"""An estimate as samples: gauges of the window, and one histogram that only grows. Pure.

Never broken: an insufficient percentile has no value (its interval may be there); the histogram's counts are integers
and never fall, one window adds as many as the window had statements, and a window whose distribution isn't known adds
nothing; it has at most BUCKETS_MAX buckets and gets coarser instead of longer.

`rate` and `histogram_quantile` over the histogram work across nodes and windows, as they do not over the gauges.
"""

from __future__ import annotations

from typing import Final

from pgherd.agent.latency.buckets import MIN_INDEX, SCALE, Buckets, lower_bound
from pgherd.agent.latency.estimate import Estimate
from pgherd.agent.probes.rows import unknown_sample
from pgherd.proto.samples import ExponentialBuckets, Metric, MetricKind, Sample

WIRE_SCALE: Final = 4  # buckets 4.4 % wide
BUCKETS_MAX: Final = 320
QUERIES_MAX: Final = 5

_GAUGE: Final = MetricKind.GAUGE
LATENCY: Final = Metric("pgherd_statement_latency_seconds", _GAUGE, "Duration that this share of statements didn't exceed", "s")
CI_LOW: Final = Metric("pgherd_statement_latency_ci_low_seconds", _GAUGE, "Low end of the percentile's 95 % interval", "s")
CI_HIGH: Final = Metric("pgherd_statement_latency_ci_high_seconds", _GAUGE, "High end of the percentile's 95 % interval", "s")
INSUFFICIENT: Final = Metric(
    "pgherd_statement_latency_insufficient", _GAUGE, "Whether what was seen doesn't suffice for the percentile"
)
STATEMENTS: Final = Metric(
    "pgherd_statements_window", _GAUGE, "Statements of the last window: ended, or above the threshold and still running"
)
OVER: Final = Metric("pgherd_statements_over_threshold", _GAUGE, "Statements of the window surely above the threshold")
OVER_HIGH: Final = Metric(
    "pgherd_statements_over_threshold_high", _GAUGE, "Statements of the window possibly above the threshold"
)
RATIO_LOW: Final = Metric(
    "pgherd_statements_over_ratio_low", _GAUGE, "Low binomial bound of the share above the threshold", "1"
)
RATIO_HIGH: Final = Metric(
    "pgherd_statements_over_ratio_high", _GAUGE, "High binomial bound of the share above the threshold", "1"
)
THRESHOLD: Final = Metric("pgherd_statements_threshold_seconds", _GAUGE, "What the statements are counted against", "s")
BY_QUERY: Final = Metric(
    "pgherd_statements_over_threshold_by_query", _GAUGE, "Statements of the window above the threshold, most frequent queries"
)
LOOKS: Final = Metric("pgherd_latency_looks", _GAUGE, "Looks at pg_stat_activity in the window, by what became of them")
SAMPLED: Final = Metric(
    "pgherd_latency_sampled_statements", _GAUGE, "Equally weighted statements that the body's sample is worth"
)
COVERAGE: Final = Metric(
    "pgherd_latency_coverage_ratio", _GAUGE, "Share of the statements that the body's sample stands for", "1"
)
DURATION: Final = Metric(
    "pgherd_statement_duration_seconds", MetricKind.HISTOGRAM, "Estimated durations of all statements, server side", "s"
)


class Grown:
    """The histogram since the start: integer counts that never fall."""

    def __init__(self, start_unix_ns: int) -> None:
        self._start_unix_ns = start_unix_ns
        self._scale = WIRE_SCALE
        self._counts: dict[int, int] = {}
        self._zero_count = 0
        self._sum_s = 0.0

    def add(self, distribution: Buckets) -> None:
        """A window's statements; its weights are rounded so that their sum is kept to half a statement."""
        owed = 0.0
        for index, weight in distribution:
            owed += weight
            whole = int(owed + 0.5)
            owed -= whole
            if whole and index <= MIN_INDEX:
                self._zero_count += whole
            elif whole:
                coarse = index >> (SCALE - self._scale)
                self._counts[coarse] = self._counts.get(coarse, 0) + whole
        self._sum_s += distribution.sum()
        while self._counts and max(self._counts) - min(self._counts) >= BUCKETS_MAX:
            self._coarsen()

    def _coarsen(self) -> None:
        self._scale -= 1
        coarse: dict[int, int] = {}
        for index, count in self._counts.items():
            coarse[index >> 1] = coarse.get(index >> 1, 0) + count
        self._counts = coarse

    def sample(self) -> Sample:
        first, last = min(self._counts, default=0), max(self._counts, default=-1)
        counts = tuple(self._counts.get(index, 0) for index in range(first, last + 1))
        buckets = ExponentialBuckets(self._scale, first, counts, self._zero_count, lower_bound(MIN_INDEX + 1), self._sum_s)
        return Sample(DURATION, {}, float(buckets.count), self._start_unix_ns, buckets)


def samples_of(estimate: Estimate, grown: Grown, threshold_s: float) -> list[Sample]:
    """What a window has to say. Takes its distribution into `grown` first."""
    if estimate.distribution is not None:
        grown.add(estimate.distribution)
    samples = [
        Sample(LOOKS, {"outcome": "answered"}, float(estimate.looks)),
        Sample(LOOKS, {"outcome": "missed"}, float(estimate.missed)),
        Sample(SAMPLED, {}, estimate.sampled),
        Sample(COVERAGE, {}, estimate.coverage),
        Sample(THRESHOLD, {}, threshold_s),
        grown.sample(),
    ]
    for quantile in estimate.quantiles:
        labels = {"quantile": f"{quantile.share:g}"}
        samples.append(Sample(INSUFFICIENT, labels, 0.0 if quantile.is_sufficient else 1.0))
        labels = {**labels, "estimator": quantile.estimator}
        for metric, value_s in ((LATENCY, quantile.value_s), (CI_LOW, quantile.low_s), (CI_HIGH, quantile.high_s)):
            if value_s is not None:
                samples.append(Sample(metric, labels, value_s))
    if estimate.count is not None:
        samples.append(Sample(STATEMENTS, {}, estimate.count.best + estimate.running_over))
    if estimate.over is not None:
        samples += [Sample(OVER, {}, estimate.over[0]), Sample(OVER_HIGH, {}, estimate.over[1])]
        often = sorted(estimate.over_by_query.items(), key=lambda item: -item[1])[:QUERIES_MAX]
        samples += [Sample(BY_QUERY, {"queryid": str(query_id)}, float(count)) for query_id, count in often]
    if estimate.ratio is not None:
        samples += [Sample(RATIO_LOW, {}, estimate.ratio[0]), Sample(RATIO_HIGH, {}, estimate.ratio[1])]
    reasons = [*estimate.notes, *(quantile.reason for quantile in estimate.quantiles if quantile.reason)]
    return samples + [unknown_sample("latency", reason) for reason in dict.fromkeys(reasons)]

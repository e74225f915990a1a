"""The agent's histogram of statement durations, through the collector's decoder, answers histogram_quantile over nodes and windows."""

from __future__ import annotations

import math
import random

import pytest

from pgherd.agent.latency.buckets import Buckets
from pgherd.agent.latency.publish import Grown
from pgherd.agent.telemetry.convert import Source, encode, series_of
from pgherd.collector.ingest import otlp
from pgherd.collector.ingest.admit import AGENT_KIND, AdmitLimits
from pgherd.collector.ingest.buckets import ladder_of
from pgherd.promql.engine import evaluate_instant
from pgherd.promql.values import Vector
from support.memory_series import MemorySeries

WINDOW_MS, WINDOWS = 60_000, 6
START_MS = 1_795_000_000_000


def test_the_p99_of_two_nodes_over_five_minutes_is_that_of_all_their_statements() -> None:
    """One node is quick, one slow; a mean of their percentiles would be off by far more than a step of the ladder."""
    rng = random.Random(5)
    drawn: list[float] = []
    series: dict[tuple[tuple[str, str], ...], list[tuple[int, float]]] = {}
    for node, median_s, statements in (("quick", 0.002, 3000), ("slow", 0.08, 400)):
        grown = Grown(START_MS * 1_000_000)
        for window in range(WINDOWS):
            at_ms = START_MS + window * WINDOW_MS
            if window:  # the first point is the state before the range
                distribution = Buckets()
                for _ in range(statements):
                    took_s = median_s * math.exp(rng.gauss(0.0, 0.9))
                    drawn.append(took_s)
                    distribution.add(took_s)
                grown.add(distribution)
            source = Source("agent", node, node, "c", f"{node}:5432")
            decoded = otlp.decode(encode(source, series_of([grown.sample()]), [], at_ms * 1_000_000), AGENT_KIND, AdmitLimits())
            for place, value in zip(decoded.series, decoded.values.tolist(), strict=True):
                labels = tuple(sorted(dict(decoded.layout.labels[place]).items()))
                series.setdefault(labels, []).append((at_ms, value))
    store = MemorySeries()
    for labels, samples in series.items():
        store.add(dict(labels), samples)
    end_ms = START_MS + (WINDOWS - 1) * WINDOW_MS
    name = "pgherd_statement_duration_seconds"
    ladder = ladder_of("s", is_ours=True)
    for share in (0.5, 0.95, 0.99):
        question = f"histogram_quantile({share}, sum by (le) (increase({name}_bucket[301s])))"
        answer = evaluate_instant(question, end_ms, store)
        assert isinstance(answer, Vector)
        true_s = sorted(drawn)[int(share * len(drawn))]
        assert answer.samples[0].value == pytest.approx(true_s, rel=ladder.step_ratio(true_s) - 1)
    counted = evaluate_instant(f"sum({name}_count)", end_ms, store)
    summed = evaluate_instant(f"sum({name}_sum)", end_ms, store)
    assert isinstance(counted, Vector)
    assert isinstance(summed, Vector)
    assert counted.samples[0].value == len(drawn)
    assert summed.samples[0].value == pytest.approx(sum(drawn), rel=0.01)

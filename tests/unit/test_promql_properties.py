"""Properties that hold for every expression and all data, checked on generated ones."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy, composite

from pgherd.promql.engine import Limits, evaluate_instant, evaluate_range
from pgherd.promql.values import Matrix, Scalar, Vector
from pgherd.proto.errors import PgherdError, PreconditionError, TransientError
from pgherd.proto.samples import STALE_NAN
from pgherd.proto.selectors import Matcher, MatchOp
from support.memory_series import MemorySeries
from support.promql_queries import START_S, Queries, dataset

Labels = frozenset[tuple[str, str]]
_STEP_MS = 7_000


@composite
def _sources(draw: DrawFn) -> MemorySeries:
    """A few series with holes, resets, stale markers and odd values; some share their timestamps."""
    source = MemorySeries()
    shared = sorted(draw(st.sets(st.integers(0, 120_000), min_size=1, max_size=25)))
    values = st.one_of(
        st.integers(-5, 1000).map(float),
        st.floats(-1e6, 1e6),
        st.sampled_from([STALE_NAN, math.nan, math.inf, -math.inf, 0.0]),
    )
    for name, host, db in draw(
        st.sets(st.tuples(*(st.sampled_from(pair) for pair in ("xy", "ab", "pq"))), min_size=1, max_size=6)
    ):
        times = shared if draw(st.booleans()) else sorted(draw(st.sets(st.integers(0, 120_000), min_size=1, max_size=25)))
        column = draw(st.lists(values, min_size=len(times), max_size=len(times)))
        source.add({"__name__": name, "host": host, "db": db}, zip(times, column, strict=True))
    return source


_SELECTORS = st.sampled_from(["x", "y", 'x{host="a"}', '{__name__=~"x|y",db="p"}', "x offset 20s", "y offset -15s"])
_RANGES = st.builds(
    lambda selector, seconds: (selector.split(" ")[0] + f"[{seconds}s] " + " ".join(selector.split(" ")[1:])).strip(),
    _SELECTORS,
    st.sampled_from([5, 30, 90]),
)


def _deeper(inner: SearchStrategy[str]) -> SearchStrategy[str]:
    numeric = st.sampled_from(["+", "-", "*", "/", "%", "^", "atan2", "==", "!=", "<", ">=", "> bool"])
    operators = numeric | st.sampled_from(["and", "or", "unless"])
    matching = st.sampled_from(["", " on (host)", " ignoring (db)", " on ()"])
    aggregations = st.sampled_from(["sum", "min", "max", "avg", "count", "group", "stddev", "stdvar"])
    grouping = st.sampled_from(["", " by (host)", " without (db)", " by (__name__)"])
    return st.one_of(
        st.builds("({}) {}{} ({})".format, inner, operators, matching, inner),
        st.builds("({}) {} {}".format, inner, numeric, st.sampled_from(["2", "-0.5", "time()"])),
        st.builds("{}{} ({})".format, aggregations, grouping, inner),
        st.builds("{}({})".format, st.sampled_from(["abs", "ceil", "-", "absent", "sqrt", "sgn", "round"]), inner),
        st.builds("vector(scalar({}))".format, inner),
    )


_FUNCTIONS = st.sampled_from(
    [
        "rate",
        "increase",
        "delta",
        "irate",
        "idelta",
        "changes",
        "resets",
        "avg_over_time",
        "min_over_time",
        "max_over_time",
        "sum_over_time",
        "count_over_time",
        "last_over_time",
        "stddev_over_time",
        "stdvar_over_time",
        "present_over_time",
        "absent_over_time",
    ]
)
_EXPRESSIONS = st.recursive(_SELECTORS | st.builds("{}({})".format, _FUNCTIONS, _RANGES), _deeper, max_leaves=4)


@given(_sources(), _EXPRESSIONS)
def test_a_range_query_equals_its_instants(source: MemorySeries, expr: str) -> None:
    limits = Limits(lookback_ms=25_000)
    steps = range(3_000, 130_000, _STEP_MS)
    try:
        whole = evaluate_range(expr, steps[0], steps[-1], _STEP_MS, source, limits)
    except PreconditionError:
        # Labels that collide do so at a step, never between steps.
        assert any(_fails(expr, step, source, limits) for step in steps)
        return
    for step in steps:
        instant = evaluate_instant(expr, step, source, limits)
        assert isinstance(instant, Vector)
        expected = {frozenset(sample.labels.items()): sample.value for sample in instant.samples}
        assert len(expected) == len(instant.samples)
        assert _same(_at(whole, step), expected), (step, expr)


def _fails(expr: str, step: int, source: MemorySeries, limits: Limits) -> bool:
    try:
        evaluate_instant(expr, step, source, limits)
    except PreconditionError as error:
        return error.code == "promql.execution"
    return False


def _at(matrix: Matrix, step: int) -> Mapping[Labels, float]:
    found: dict[Labels, float] = {}
    for series in matrix.series:
        where = np.flatnonzero(series.times_ms == step)
        if len(where):
            labels = frozenset(series.labels.items())
            assert labels not in found
            found[labels] = float(series.values[where[0]])
    return found


def _same(left: Mapping[Labels, float], right: Mapping[Labels, float]) -> bool:
    return left.keys() == right.keys() and all(_close(left[labels], right[labels]) for labels in left)


def _close(left: float, right: float) -> bool:
    return (math.isnan(left) and math.isnan(right)) or math.isclose(left, right, rel_tol=1e-9, abs_tol=1e-9)


@given(_sources(), st.integers(0, 130_000), st.sampled_from(["sum", "min", "max", "count", "avg"]))
def test_aggregation_equals_manual_grouping(source: MemorySeries, at_ms: int, op: str) -> None:
    elements = evaluate_instant('{__name__=~"x|y"}', at_ms, source)
    grouped = evaluate_instant(f'{op} by (host) ({{__name__=~"x|y"}})', at_ms, source)
    assert isinstance(elements, Vector)
    assert isinstance(grouped, Vector)
    groups: dict[str, list[float]] = {}
    for sample in elements.samples:
        groups.setdefault(sample.labels["host"], []).append(sample.value)
    found = {sample.labels["host"]: sample.value for sample in grouped.samples}
    assert found.keys() == groups.keys()
    for host, members in groups.items():
        assert _close(found[host], _manual(op, members)), (op, members, found[host])


def _manual(op: str, members: list[float]) -> float:
    real = [value for value in members if not math.isnan(value)]
    match op:
        case "sum":
            return sum(members)
        case "avg":
            return sum(members) / len(members)
        case "count":
            return len(members)
        case "min":
            return min(real, default=math.nan)
        case _:
            return max(real, default=math.nan)


@given(
    st.lists(st.tuples(st.integers(1, 40_000), st.floats(0, 1e6)), min_size=2, max_size=40),
    st.integers(1_000, 600_000),
    st.floats(1e3, 1e9),
)
def test_increase_of_a_counter_without_resets_is_bounded(pairs: list[tuple[int, float]], range_ms: int, start: float) -> None:
    """At least what was observed, at most 1.1 average intervals more on either side."""
    times = np.cumsum([gap for gap, _ in pairs])
    values = start + np.cumsum([growth for _, growth in pairs])
    source = MemorySeries()
    source.add({"__name__": "c"}, zip(times.tolist(), values.tolist(), strict=True))
    at_ms = int(times[-1])
    result = evaluate_instant(f"increase(c[{range_ms}ms])", at_ms, source)
    assert isinstance(result, Vector)
    inside = np.flatnonzero(times > at_ms - range_ms)
    if len(inside) < 2:
        assert not result.samples
        return
    observed = float(values[inside[-1]] - values[inside[0]])
    intervals = len(inside) - 1
    (sample,) = result.samples
    assert observed * (1 - 1e-9) <= sample.value <= observed * (1 + 2.2 / intervals) * (1 + 1e-9)
    rate = evaluate_instant(f"rate(c[{range_ms}ms])", at_ms, source)
    assert isinstance(rate, Vector)
    assert rate.samples[0].value == pytest.approx(sample.value / (range_ms / 1000))


@given(_sources(), _EXPRESSIONS, st.integers(0, 130_000))
def test_results_depend_on_the_fetched_range_only(source: MemorySeries, expr: str, at_ms: int) -> None:
    """Fetches are minimal but sufficient: a source with nothing else gives the same answer."""
    source.asked.clear()
    try:
        before = evaluate_instant(expr, at_ms, source)
    except PreconditionError:
        return
    reduced = MemorySeries()
    low = min((start for _, start, _ in source.asked), default=0)
    high = max((end for _, _, end in source.asked), default=0)
    for window in source.windows:
        inside = (window.times_ms >= low) & (window.times_ms <= high)
        if inside.any():
            reduced.add_arrays(window.labels, window.times_ms[inside], window.values[inside])
    after = evaluate_instant(expr, at_ms, reduced)
    assert isinstance(before, Vector)
    assert isinstance(after, Vector)
    assert _same(_elements(before), _elements(after))


def _elements(vector: Vector) -> dict[Labels, float]:
    return {frozenset(sample.labels.items()): sample.value for sample in vector.samples}


def test_each_selector_is_fetched_once_over_the_smallest_range() -> None:
    source = MemorySeries()
    source.add({"__name__": "x"}, [(0, 1.0)])
    evaluate_range("x / x + rate(x[1m] offset 30s)", 100_000, 200_000, 10_000, source, Limits(lookback_ms=5_000))
    name = (Matcher("__name__", MatchOp.EQUAL, "x"),)
    assert source.asked == [(name, 95_001, 200_000), (name, 10_001, 170_000)]


def test_the_checkpoint_ends_an_evaluation() -> None:
    source = MemorySeries()
    source.add({"__name__": "x"}, [(0, 1.0)])
    calls = 0

    def checkpoint() -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise TransientError("query.timeout", "enough")

    with pytest.raises(TransientError):
        evaluate_instant("x + x + x", 0, source, Limits(checkpoint=checkpoint))
    assert isinstance(evaluate_instant("1", 0, source), Scalar)


@pytest.mark.parametrize("first", range(0, 240, 40))
def test_generated_queries_in_a_range_equal_their_instants(first: int) -> None:
    """Subqueries, @, many-to-one, choices, histograms, labels: at every step what an instant query there gives."""
    source = MemorySeries()
    for (metric, labels), samples in dataset(11).items():
        source.add({"__name__": metric, **dict(labels)}, samples)
    compared = 0
    for number in range(first, first + 40):
        expr = str(Queries.numbered(11, number).query()["query"]).replace("holt_winters", "double_exponential_smoothing")
        if "start()" in expr or "end()" in expr or "sort" in expr:
            continue  # these mean something else in a range query
        start_ms = (START_S + 1500 + 7 * number) * 1000 + 500
        steps = range(start_ms, start_ms + 300_001, 60_000)
        try:
            whole = evaluate_range(expr, steps[0], steps[-1], 60_000, source)
        except PgherdError as error:
            if error.code == "promql.execution":
                assert any(_fails(expr, step, source, Limits()) for step in steps), expr
            continue
        for step in steps:
            instant = evaluate_instant(expr, step, source)
            if isinstance(instant, Vector):
                expected = {frozenset(sample.labels.items()): sample.value for sample in instant.samples}
                assert _same(_at(whole, step), expected), (expr, step)
                compared += 1
    assert compared > 50


def test_all_that_is_held_at_once_counts_against_the_limit() -> None:
    source = MemorySeries()
    for number in range(10):
        source.add({"__name__": "x", "n": str(number)}, [(0, 1.0)])
    held = Limits(samples_max=400)
    evaluate_range("x + x", 0, 90_000, 10_000, source, held)  # 100 cells a side and 100 of the sum
    for expr in ("x + (x + (x + (x + x)))", "sum_over_time(x[10m:10s])"):
        with pytest.raises(PreconditionError) as caught:
            evaluate_range(expr, 0, 90_000, 10_000, source, held)
        assert caught.value.code == "promql.limit", expr

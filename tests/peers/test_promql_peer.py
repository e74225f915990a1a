"""Debian's Prometheus as the oracle: the same samples, generated queries, answers equal to 1e-9.

Masks, because Debian 12 has Prometheus 2.42 and pgherd follows 3.x:
- 2.42's ranges and lookback are closed on the left, ours are open: no sample lies on a boundary (samples end in odd
  milliseconds, evaluation times, ranges and offsets are whole seconds);
- 2.42 shortens an extrapolation to the counter's zero before it applies the threshold, 3.x after: counters stay far from zero
  (tests/golden/rates.promql covers the zero by hand);
- 2.42 keeps the metric name under atan2, 3.x drops it: not generated;
- OpenMetrics text carries no staleness markers: series end by silence (tests/golden/selectors.promql covers markers);
- 2.42 answers 0 for the deviation of a single NaN or Inf, 3.x NaN: stddev and stdvar aggregate finite values only;
- 2.42 refuses a range function whose series lose their only distinction even when they never overlap; we answer that.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import pytest

from pgherd.collector.api.prometheus_json import encode_result
from pgherd.promql.engine import evaluate_instant, evaluate_range
from pgherd.promql.values import Value
from pgherd.proto.errors import PgherdError
from support.memory_series import MemorySeries
from support.prometheus import Dataset, prometheus

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("promtool") is None or shutil.which("prometheus") is None, reason="needs Debian's prometheus"
    ),
]

SEED = int(os.environ.get("PGHERD_PEER_SEED", "20261123"))
QUERIES = int(os.environ.get("PGHERD_PEER_QUERIES", "300"))
START_S = 1_700_000_000
SPAN_S = 5_400


def _dataset(rng: random.Random) -> Dataset:
    data: dict[tuple[str, tuple[tuple[str, str], ...]], list[tuple[int, float]]] = {}
    for metric in ("commits_total", "reads_total", "sessions", "size_bytes", "odd"):
        for host in ("a", "b", "c"):
            for db in ("app", "audit", "postgres")[: 1 + rng.randrange(3)]:
                labels = (("db", db), ("host", host), *((("shard", "1"),) if rng.random() < 0.3 else ()))
                data[metric, labels] = list(_samples(metric, rng))
    return data


def _samples(metric: str, rng: random.Random) -> Iterator[tuple[int, float]]:
    value = rng.uniform(5e5, 2e6) if metric.endswith("_total") else rng.uniform(0, 100)
    if metric == "commits_total":
        value = float(int(value))
    jitter = rng.random() < 0.5
    pause_from = rng.randrange(SPAN_S)
    pause_to = pause_from + rng.choice([0, 200, 900])
    for second in range(rng.randrange(0, 600), SPAN_S - rng.randrange(0, 900), 15):
        if metric.endswith("_total"):
            value += rng.randrange(10) if metric == "commits_total" else rng.random()
            if rng.random() < 0.01:
                value *= 0.5
                value = float(int(value)) if metric == "commits_total" else value
        elif metric == "odd":
            value = rng.choice([0.0, -0.0, 1.5, -2.0, math.nan, math.inf, -math.inf, 7.0])
        else:
            value = max(0.0, value + rng.choice([-1, 0, 0, 0, 1, 2.5]))
        if not pause_from <= second < pause_to:
            yield (START_S + second) * 1000 + (2 * rng.randrange(250) + 1 if jitter else 7), value


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return _dataset(random.Random(SEED))


@pytest.fixture(scope="module")
def ours(dataset: Dataset) -> MemorySeries:
    source = MemorySeries()
    for (metric, labels), samples in dataset.items():
        source.add({"__name__": metric, **dict(labels)}, samples)
    return source


@pytest.fixture(scope="module")
def peer(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A Prometheus that holds the data set."""
    with prometheus(dataset, tmp_path_factory.mktemp("prometheus")) as client:
        yield client


class Expressions:
    """Random expressions that are valid PromQL and within what pgherd evaluates."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def selector(self) -> str:
        pick = self._rng.choice
        metric = pick(["commits_total", "reads_total", "sessions", "size_bytes", "odd"])
        matcher = pick(["", "", '{host="a"}', '{db!="app"}', '{host=~"a|b"}', '{shard=""}', '{db!~"a.*"}', '{db=~".+"}'])
        return metric + matcher

    def offset(self) -> str:
        return self._rng.choice(["", "", "", " offset 3m", " offset -90s"])

    def over_range(self) -> str:
        pick = self._rng.choice
        function = pick(
            ["rate", "increase", "delta", "irate", "idelta", "changes", "resets", "absent_over_time", "quantile_over_time"]
            + [f"{name}_over_time" for name in ("avg", "min", "max", "sum", "count", "last", "stddev", "stdvar", "present")]
        )
        selector = self.selector()
        if function in ("rate", "increase", "irate", "resets"):
            for gauge in ("odd", "sessions", "size_bytes"):
                selector = selector.replace(gauge, "reads_total")
        lead = f"{pick(['0.5', '0.99', '0', '1', '-1', '2'])}, " if function == "quantile_over_time" else ""
        return f"{function}({lead}{selector}[{pick(['40s', '1m', '5m', '17m'])}]{self.offset()})"

    def vector(self, depth: int) -> str:
        pick = self._rng.choice
        if depth == 0:
            return self.over_range() if self._rng.random() < 0.5 else self.selector() + self.offset()
        inner = self.vector(depth - 1)
        match self._rng.randrange(6):
            case 0 | 1:
                operation = pick(["sum", "min", "max", "avg", "count", "group", "stddev", "stdvar"])
                if operation.startswith("std"):
                    inner = self.selector().replace("odd", "sessions")
                return (
                    f"{operation}{pick(['', ' by (host)', ' by (db, nothing)', ' without (shard)', ' without ()'])} ({inner})"
                )
            case 2:
                operator = pick(["+", "-", "*", "/", "%", "^", "==", "!=", "<", ">", "<=", ">= bool", "< bool"])
                sides = [f"({inner})", pick(["2", "-0.5", "1e6", "time()", "scalar(sum(sessions))", "NaN"])]
                self._rng.shuffle(sides)
                return f"{sides[0]} {operator} {sides[1]}"
            case 3:
                operator = pick(["+", "-", "/", "*", ">", "<=", "!= bool", "and", "or", "unless"])
                matching = pick(["", " on (host, db)", " ignoring (shard)", " on (host)", " on (db, host, shard)"])
                return f"({inner}) {operator}{matching} ({self.vector(depth - 1)})"
            case 4:
                function = pick(
                    ["abs", "ceil", "floor", "exp", "ln", "log2", "log10", "sqrt", "sgn", "round", "absent", "-", "+"]
                )
                return f"{function}({inner})"
            case _:
                function = pick(
                    ["clamp({}, 1, 50)", "clamp_min({}, 3)", "clamp_max({}, 1e6)", "round({}, 0.25)", "vector(scalar({}))"]
                )
                return function.format(inner)


def test_generated_queries_agree_with_prometheus(peer: httpx.Client, ours: MemorySeries) -> None:
    print(f"seed {SEED} (PGHERD_PEER_SEED), {QUERIES} queries")
    rng = random.Random(SEED + 1)
    expressions = Expressions(rng)
    full = empty = refused = 0
    for number in range(QUERIES):
        expr = expressions.vector(rng.randrange(3))
        at_s = START_S + rng.randrange(-60, SPAN_S + 600)
        if number % 3 == 0:
            step_s = rng.choice([7, 15, 60, 300])
            parameters = {"query": expr, "start": at_s, "end": at_s + 40 * step_s, "step": step_s}
            theirs = peer.post("/api/v1/query_range", data=parameters).json()
        else:
            parameters = {"query": expr, "time": at_s}
            theirs = peer.post("/api/v1/query", data=parameters).json()
        found = _answer(parameters, ours)
        if isinstance(found, PgherdError):
            assert theirs["status"] == "error", f"{parameters}: we refuse ({found}), Prometheus answers"
            refused += 1
            continue
        if theirs["status"] == "error":
            assert "same labelset" in theirs["error"], f"{parameters}: Prometheus refuses: {theirs['error']}"
            assert "step" in parameters
            continue
        _compare(parameters, found, theirs["data"])
        full, empty = full + bool(found["result"]), empty + (not found["result"])
    print(f"{full} answers with data, {empty} empty, {refused} refused by both")
    assert full > QUERIES / 2


def _answer(parameters: Mapping[str, Any], source: MemorySeries) -> dict[str, Any] | PgherdError:
    """Our `data`, decoded from the JSON that the API would send."""
    try:
        if "step" in parameters:
            start_ms, end_ms, step_ms = (parameters[name] * 1000 for name in ("start", "end", "step"))
            value: Value = evaluate_range(parameters["query"], start_ms, end_ms, step_ms, source)
        else:
            value = evaluate_instant(parameters["query"], parameters["time"] * 1000, source)
    except PgherdError as error:
        return error
    data: dict[str, Any] = json.loads(encode_result(value))
    return data


def _compare(parameters: Mapping[str, Any], found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert found["resultType"] == expected["resultType"]
    mine, theirs = _by_labels(found), _by_labels(expected)
    assert mine.keys() == theirs.keys(), parameters
    for labels, samples in theirs.items():
        assert [time for time, _ in mine[labels]] == [time for time, _ in samples], (parameters, labels)
        for (time, left), (_, right) in zip(mine[labels], samples, strict=True):
            assert _close(float(left), float(right)), f"{parameters} {dict(labels)} at {time}: {left}, Prometheus {right}"


def _by_labels(data: Mapping[str, Any]) -> dict[frozenset[tuple[str, str]], list[tuple[float, str]]]:
    key = "values" if data["resultType"] == "matrix" else "value"
    return {frozenset(one["metric"].items()): one[key] if key == "values" else [one[key]] for one in data["result"]}


def _close(left: float, right: float) -> bool:
    return (math.isnan(left) and math.isnan(right)) or math.isclose(left, right, rel_tol=1e-9, abs_tol=1e-9)


def test_numbers_are_written_alike(peer: httpx.Client) -> None:
    """Byte for byte, as elements of a vector (scalars are always without an exponent there, which says the same)."""
    rng = random.Random(SEED + 2)
    numbers = [0.0, -0.0, 1e-6, 1e-7, 1e20, 1e21, 5e-324, 1.7976931348623157e308, 2.0**53, 2.0**60, 0.1, 100.0]
    numbers += [rng.uniform(-1, 1) * 10.0 ** rng.randrange(-12, 25) for _ in range(100)]
    for number in numbers:
        expr = f"vector({number!r})"
        theirs = peer.get("/api/v1/query", params={"query": expr, "time": "1700000000.5"}).text
        value = evaluate_instant(expr, 1_700_000_000_500, MemorySeries())
        assert f'"data":{encode_result(value).decode()}' in theirs, number


def test_error_shapes_are_alike(peer: httpx.Client) -> None:
    """Status and errorType that our API's table promises are Prometheus' own."""
    for path, parameters, status, error_type in (
        ("query", {"query": "up{"}, 400, "bad_data"),
        ("query", {"query": ""}, 400, "bad_data"),
        ("query", {"query": "nosuch(up)"}, 400, "bad_data"),
        ("query", {"query": "1", "time": "yesterday"}, 400, "bad_data"),
        ("query", {"query": "sessions + on() sessions", "time": str(START_S + 1800)}, 422, "execution"),
        ("query_range", {"query": "1", "start": "0", "end": "1", "step": "0"}, 400, "bad_data"),
        ("query_range", {"query": "1", "start": "0", "end": "11001", "step": "1"}, 400, "bad_data"),
        ("query_range", {"query": "x[1m]", "start": "0", "end": "1", "step": "1"}, 400, "bad_data"),
        ("series", {}, 400, "bad_data"),
    ):
        response = peer.get(f"/api/v1/{path}", params=parameters)
        assert (response.status_code, response.json()["errorType"]) == (status, error_type), (path, parameters)
    assert peer.get("/api/v1/query_range", params={"query": "1", "start": "0", "end": "11000", "step": "1"}).status_code == 200

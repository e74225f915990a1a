"""Debian's Prometheus as the oracle: the same samples, generated queries, the same answers.

Both are asked over HTTP, ours over the real series store. Values are equal to 1e-9, and to the last bit where the arithmetic
of both versions is defined to it (support/promql_queries.py knows where). Labels, errors, their class and the HTTP status are equal.
Replay: PGHERD_PEER_SEED and PGHERD_PEER_NUMBER, as the failure prints them.

Masks, because Debian 12 has Prometheus 2.42 and pgherd follows 3.x. None drops a difference; each keeps the generator away from one:
- 2.42's ranges and lookback are closed on the left, ours are open: no sample and no inner step lies on an edge (samples at odd
  milliseconds, queries at half seconds, inner steps at whole ones, subqueries offset by half a second);
- 2.42 shortens an extrapolation to the counter's zero before it applies the threshold, 3.x after: counters stay far from zero
  (tests/golden/rates.promql covers the zero by hand);
- 2.42 keeps the metric name under atan2, 3.x drops it: not generated;
- 2.42's timestamp() of a selector with both an offset and @ looks at the wrong range: it gets offsets only;
- 2.42 evaluates a function whose meaning changes with the step over a subquery with @ at other times than @'s: without @ there;
- 2.42 calls double_exponential_smoothing holt_winters: renamed in the text that each gets;
- 2.42 answers 0 for the deviation of a single NaN or Inf, 3.x NaN: stddev and stdvar aggregate finite values only;
- 2.42 refuses a range function whose series lose their only distinction even when they never overlap: one metric per selector;
- 2.42 overlooks a many-to-one match when a comparison filters the surplus away: filters match on all labels;
- 2.42 adds and averages across series without compensation, averages over time incrementally, and Go's exp, ln, ^ and trigonometry
  differ from C's in the last digit: nothing that jumps (round, ==, %, count_values …) follows them;
- which zero min and max give of 0 and -0 isn't defined: the data has no -0;
- 2.42's compensation makes NaN of Inf in a regression, 3.x keeps it: deriv and predict_linear get finite values;
- the order among equal values isn't defined: topk and bottomk choose among values that are all different.
"""

from __future__ import annotations

import math
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from pgherd.collector.api.prometheus import prometheus_router
from pgherd.collector.api.prometheus_json import encode_result
from pgherd.collector.api.query_pool import QueryPool
from pgherd.collector.config import QueryConfig
from pgherd.promql.engine import evaluate_instant
from pgherd.runtime.clock import SystemClock
from pgherd.storage.series.batch import Batch, layout_of
from pgherd.storage.series.store import SeriesSettings, SeriesStore
from pgherd.storage.series.writer import WriterSettings
from support.asgi import AsgiClient
from support.memory_series import MemorySeries
from support.prometheus import Dataset, prometheus, remote_write
from support.promql_queries import START_S, Queries, dataset

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("promtool") is None or shutil.which("prometheus") is None, reason="needs Debian's prometheus"
    ),
]

SEED = int(os.environ.get("PGHERD_PEER_SEED", "20261123"))
QUERIES = int(os.environ.get("PGHERD_PEER_QUERIES", "2000"))
NUMBER = os.environ.get("PGHERD_PEER_NUMBER")


@pytest.fixture(scope="module")
def samples() -> Dataset:
    return dataset(SEED)


@pytest.fixture(scope="module")
def peer(samples: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A Prometheus that holds the data set."""
    with prometheus({}, tmp_path_factory.mktemp("prometheus")) as client:
        remote_write(client, samples)
        yield client


@pytest.fixture(scope="module")
def ours(samples: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsgiClient]:
    """Our API over a real store with the same samples."""
    settings = SeriesSettings(writer=WriterSettings(retention_s=50 * 365 * 86400.0))
    store = SeriesStore.open(tmp_path_factory.mktemp("store") / "series.duckdb", settings, SystemClock())
    pool = QueryPool(SystemClock(), 2)
    try:
        _fill(store, samples)
        app = FastAPI()
        app.include_router(prometheus_router(store, pool, QueryConfig(), SystemClock(), "peer"))
        with AsgiClient(app) as client:
            yield client
    finally:
        pool.close()
        store.close()


def _fill(store: SeriesStore, samples: Dataset) -> None:
    layout = layout_of({"__name__": metric, **dict(labels)} for metric, labels in samples)
    rows = [(row, ms, value) for row, column in enumerate(samples.values()) for ms, value in column]
    series, times, values = (np.array([entry[part] for entry in rows]) for part in range(3))
    store.append(Batch(layout, series.astype(np.int32), times.astype(np.int64), values)).result(60)


@pytest.mark.timeout(600)
def test_generated_queries_agree_with_prometheus(peer: httpx.Client, ours: AsgiClient) -> None:
    print(f"PGHERD_PEER_SEED={SEED}, {QUERIES} queries")
    numbers = range(QUERIES) if NUMBER is None else [int(NUMBER)]
    tally = {"with data": 0, "empty": 0, "refused by both": 0, "equal to the last bit": 0}
    differences = []
    for number in numbers:
        queries = Queries.numbered(SEED, number)
        parameters = queries.query()
        difference = _difference(parameters, peer, ours, tally, exact=queries.exact)
        if difference:
            differences.append(f"PGHERD_PEER_SEED={SEED} PGHERD_PEER_NUMBER={number} {dict(parameters)}\n  {difference}")
    print(tally)
    assert not differences, f"{len(differences)} of {len(numbers)} differ\n" + "\n".join(differences[:20])
    assert NUMBER is not None or tally["with data"] > QUERIES / 2


def _difference(
    parameters: Mapping[str, Any], peer: httpx.Client, ours: AsgiClient, tally: dict[str, int], *, exact: bool
) -> str | None:
    """What is different between the two answers."""
    path = "/api/v1/query_range" if "step" in parameters else "/api/v1/query"
    renamed = {**parameters, "query": parameters["query"].replace("holt_winters", "double_exponential_smoothing")}
    theirs, mine = peer.post(path, data=parameters), ours.post(path, data=renamed)
    expected, found = theirs.json(), mine.json()
    if (mine.status_code, found["status"], found.get("errorType")) != (
        theirs.status_code,
        expected["status"],
        expected.get("errorType"),
    ):
        return f"pgherd {mine.status_code} {mine.text[:300]}\n  Prometheus {theirs.status_code} {theirs.text[:300]}"
    if found["status"] == "error":
        tally["refused by both"] += 1
        return None
    tally["with data" if found["data"]["result"] else "empty"] += 1
    if found["data"] == expected["data"]:
        tally["equal to the last bit"] += 1
        return None
    return _difference_of_data(parameters, found["data"], expected["data"], exact=exact)


def _difference_of_data(
    parameters: Mapping[str, Any], found: Mapping[str, Any], expected: Mapping[str, Any], *, exact: bool
) -> str | None:
    if found["resultType"] != expected["resultType"]:
        return f"{found['resultType']} instead of {expected['resultType']}"
    if found["resultType"] == "scalar":
        return None if _close(found["result"][1], expected["result"][1]) else f"{found} instead of {expected}"
    mine, theirs = _by_labels(found), _by_labels(expected)
    if mine.keys() != theirs.keys():
        return f"only pgherd {sorted(map(sorted, mine.keys() - theirs.keys()))[:3]}, only Prometheus {sorted(map(sorted, theirs.keys() - mine.keys()))[:3]}"
    for labels, samples in theirs.items():
        if [time for time, _ in mine[labels]] != [time for time, _ in samples]:
            return f"other steps of {sorted(labels)}: {mine[labels][:5]} instead of {samples[:5]}"
        for (time, left), (_, right) in zip(mine[labels], samples, strict=True):
            if not (float(left) == float(right) or left == right if exact else _close(left, right)):
                return f"{sorted(labels)} at {time}: {left} instead of {right}"
    if parameters["query"].startswith("sort"):
        mine_ordered, theirs_ordered = ([one["value"][1] for one in data["result"]] for data in (found, expected))
        if not all(map(_close, mine_ordered, theirs_ordered)):
            return f"the order {mine_ordered[:9]} instead of {theirs_ordered[:9]}"
    return None


def _by_labels(data: Mapping[str, Any]) -> dict[frozenset[tuple[str, str]], list[tuple[float, str]]]:
    key = "values" if data["resultType"] == "matrix" else "value"
    return {frozenset(one["metric"].items()): one[key] if key == "values" else [one[key]] for one in data["result"]}


def _close(left: str, right: str) -> bool:
    mine, theirs = float(left), float(right)
    return (math.isnan(mine) and math.isnan(theirs)) or math.isclose(mine, theirs, rel_tol=1e-9, abs_tol=1e-9)


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

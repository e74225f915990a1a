"""The Prometheus HTTP API over an in-memory source: shapes, parameters, errors and limits."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgherd.collector.api.prometheus import prometheus_router
from pgherd.collector.api.prometheus_json import encode_result, format_time, format_value
from pgherd.collector.api.prometheus_request import decode_label_name
from pgherd.collector.api.query_pool import QueryPool
from pgherd.collector.config import QueryConfig
from pgherd.promql.values import Matrix, Series
from pgherd.proto.errors import IntegrityError
from pgherd.proto.selectors import Matcher
from pgherd.runtime.clock import SystemClock
from support.asgi import AsgiClient
from support.memory_series import MemoryMetadata, MemorySeries, MemoryWindow
from support.waiting import wait_until

NOW_MS = 1_700_000_600_000
CONFIG = QueryConfig()


class FixedClock(SystemClock):
    """Wall time stands still; monotonic time runs, or deadlines would never come."""

    def wall_unix_ns(self) -> int:
        return NOW_MS * 1_000_000


def _source() -> MemorySeries:
    source = MemorySeries(
        families={"up": MemoryMetadata("gauge", "Whether it is.", ""), "x_total": MemoryMetadata("counter", "Xs.", "1")}
    )
    times = np.arange(NOW_MS - 600_000, NOW_MS + 1, 15_000, dtype=np.int64)
    for instance in "ab":
        source.add_arrays({"__name__": "up", "instance": instance}, times, np.ones(len(times)))
        source.add_arrays(
            {"__name__": "x_total", "instance": instance, "pg.db": "ü"}, times, np.arange(len(times), dtype=np.float64) * 1.5
        )
    return source


class Api:
    """A client of one router."""

    def __init__(self, source: MemorySeries, config: QueryConfig = CONFIG, waiting_max: int = 100) -> None:
        self.pool = QueryPool(SystemClock(), config.concurrency, waiting_max)
        app = FastAPI()
        app.include_router(prometheus_router(source, self.pool, config, FixedClock(), "0.1.0"), prefix="/prometheus")
        self.client = AsgiClient(app)

    def __enter__(self) -> Api:
        self.client.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.client.__exit__(*error)
        self.pool.close()

    def get(self, path: str, **parameters: object) -> tuple[int, Any]:
        response = self.client.get(f"/prometheus/api/v1/{path}", params=parameters)
        return response.status_code, response.json()

    def data(self, path: str, **parameters: object) -> Any:
        status, document = self.get(path, **parameters)
        assert (status, document["status"]) == (200, "success"), document
        return document["data"]


@pytest.fixture
def api() -> Iterator[Api]:
    with Api(_source()) as made:
        yield made


def test_instant_query_answers_now_by_default(api: Api) -> None:
    assert api.data("query", query="up{instance='a'}") == {
        "resultType": "vector",
        "result": [{"metric": {"__name__": "up", "instance": "a"}, "value": [1700000600, "1"]}],
    }


def test_scalar_string_and_matrix_results(api: Api) -> None:
    assert api.data("query", query="1+1", time="1700000000.5") == {"resultType": "scalar", "result": [1700000000.5, "2"]}
    assert api.data("query", query='"é\\n"')["result"] == [1700000600, "é\n"]
    found = api.data("query", query="up[30s]")
    assert found["resultType"] == "matrix"
    assert found["result"][0]["values"] == [[1700000585, "1"], [1700000600, "1"]]


def test_range_query_by_get_and_form(api: Api) -> None:
    parameters = {"query": "sum(x_total)", "start": "2023-11-14T22:23:00Z", "end": "1700000600", "step": "15s"}
    expected = {
        "resultType": "matrix",
        "result": [{"metric": {}, "values": [[1700000580, "114"], [1700000595, "117"]]}],
    }
    assert api.data("query_range", **parameters) == expected
    response = api.client.post("/prometheus/api/v1/query_range", data=parameters)
    assert response.json() == {"status": "success", "data": expected}
    assert response.headers["content-type"] == "application/json"
    # Both at once: the form wins, the rest is taken from the URL.
    response = api.client.post(
        "/prometheus/api/v1/query_range",
        params={"query": "nonsense(", "step": "15"},
        data={k: parameters[k] for k in ("query", "start", "end")},
    )
    assert response.json()["data"] == expected


def test_lookback_delta_and_limit(api: Api) -> None:
    assert len(api.data("query", query="up", time=1700000610)["result"]) == 2
    assert api.data("query", query="up", time=1700000610, lookback_delta="10s")["result"] == []
    status, document = api.get("query", query="up", limit=1)
    assert status == 200
    assert len(document["data"]["result"]) == 1
    assert document["warnings"] == ["results truncated due to limit"]
    status, document = api.get("query_range", query="up", start=1700000000, end=1700000060, step=60, limit=1)
    assert len(document["data"]["result"]) == 1
    assert "warnings" in document
    assert "warnings" not in api.get("query", query="up", limit=2)[1]


def test_browsing(api: Api) -> None:
    assert api.data("labels") == ["__name__", "instance", "pg.db"]
    assert api.data("labels", **{"match[]": "up"}) == ["__name__", "instance"]
    assert api.data("label/__name__/values") == ["up", "x_total"]
    assert api.data("label/instance/values", **{"match[]": ["up{instance='b'}", "nothing"]}) == ["b"]
    assert api.data("label/U__pg_2e_db/values") == ["ü"]
    assert api.data("label/pg.db/values", start=0, end=1) == []
    assert api.data("series", **{"match[]": ["up", "up{instance='a'}"]}) == [
        {"__name__": "up", "instance": "a"},
        {"__name__": "up", "instance": "b"},
    ]
    status, document = api.get("series", **{"match[]": "up"}, limit=1)
    assert status == 200
    assert document["warnings"] == ["results truncated due to limit"]
    assert api.client.post("/prometheus/api/v1/series", data={"match[]": "up"}).json()["status"] == "success"
    assert api.client.post("/prometheus/api/v1/labels").json()["data"] == ["__name__", "instance", "pg.db"]


def test_metadata_buildinfo_exemplars(api: Api) -> None:
    assert api.data("metadata") == {
        "up": [{"type": "gauge", "help": "Whether it is.", "unit": ""}],
        "x_total": [{"type": "counter", "help": "Xs.", "unit": "1"}],
    }
    assert list(api.data("metadata", limit=1)) == ["up"]
    assert list(api.data("metadata", metric="x_total")) == ["x_total"]
    assert api.data("metadata", metric="none") == {}
    info = api.data("status/buildinfo")
    assert info["version"] == "3.0.0"
    assert info["revision"] == "pgherd 0.1.0"
    assert "application" not in info
    assert "features" not in info
    assert api.data("query_exemplars", query="up", start=1, end=2) == []


@pytest.mark.parametrize(
    ("path", "parameters", "status", "error_type", "words"),
    [
        ("query", {}, 400, "bad_data", "no expression"),
        ("query", {"query": "up{"}, 400, "bad_data", "braces"),
        ("query", {"query": "nosuch(up)"}, 400, "bad_data", "unknown function with name 'nosuch'"),
        ("query", {"query": "limit_ratio(1, up)"}, 422, "execution", "limit_ratio"),
        ("query", {"query": "up @ -1"}, 422, "execution", "@"),
        ("query", {"query": "topk(NaN, up)"}, 422, "execution", "NaN"),
        ("query", {"query": "sum_over_time(vector(1)[1y:1ms])"}, 422, "execution", "too many samples"),
        ("query", {"query": "up / on() group_left up"}, 422, "execution", "on the right hand-side"),
        ("query", {"query": "up / on() group_right up"}, 422, "execution", "on the left hand-side"),
        ("query", {"query": "up + on() up"}, 422, "execution", "many-to-many"),
        ("query", {"query": "up", "time": "yesterday"}, 400, "bad_data", "'time'"),
        ("query", {"query": "up", "time": "NaN"}, 400, "bad_data", "'time'"),
        ("query", {"query": "up", "time": "1e300"}, 400, "bad_data", "out of range"),
        ("query", {"query": "up", "timeout": "soon"}, 400, "bad_data", "'timeout'"),
        ("query", {"query": "up", "timeout": "0s"}, 503, "timeout", "timed out"),
        ("query", {"query": "up", "limit": "-1"}, 400, "bad_data", "limit"),
        ("query", {"query": "up", "lookback_delta": "x"}, 400, "bad_data", "lookback_delta"),
        ("query_range", {"query": "up", "start": 0, "end": 1}, 400, "bad_data", "'step'"),
        ("query_range", {"query": "up", "end": 1, "step": 1}, 400, "bad_data", "'start'"),
        ("query_range", {"query": "up", "start": 0, "end": 1, "step": 0}, 400, "bad_data", "zero or negative"),
        ("query_range", {"query": "up", "start": 2, "end": 1, "step": 1}, 400, "bad_data", "must not be before"),
        ("query_range", {"query": "up", "start": 0, "end": 11_001, "step": 1}, 400, "bad_data", "11,000 points"),
        ("query_range", {"query": "up[1m]", "start": 0, "end": 1, "step": 1}, 400, "bad_data", "range vector"),
        ("series", {}, 400, "bad_data", "no match[]"),
        ("series", {"match[]": "rate(up[1m])"}, 400, "bad_data", "selector"),
        ("series", {"match[]": "up", "start": 2, "end": 1}, 400, "bad_data", "must not be before"),
        ("labels", {"match[]": "{"}, 400, "bad_data", ""),
        ("metadata", {"limit": "many"}, 400, "bad_data", "not an integer"),
        ("query_exemplars", {"query": "("}, 400, "bad_data", ""),
    ],
)
def test_errors(api: Api, path: str, parameters: dict[str, object], status: int, error_type: str, words: str) -> None:
    found, document = api.get(path, **parameters)
    assert (found, document["status"], document["errorType"]) == (status, "error", error_type), document
    assert words in document["error"]


def test_eleven_thousand_intervals_are_allowed(api: Api) -> None:
    found = api.data("query_range", query="1", start=0, end=11_000, step=1)
    assert len(found["result"][0]["values"]) == 11_001


def test_a_form_over_the_limit_is_refused(api: Api) -> None:
    response = api.client.post("/prometheus/api/v1/query", data={"query": "1" * 1_100_000})
    assert response.status_code == 400
    assert "larger" in response.json()["error"]


@pytest.mark.parametrize(
    "expr",
    [
        "(" * 30_000 + "1" + ")" * 30_000,
        "1" + "+1" * 30_000,
        "-" * 30_000 + "1",
        "up[1e20]",
        "up[1h:1e20]",
        "up @ -1e15",
        "up @ 1e19",
        "abs(" * 400 + "1" + ")" * 400,
    ],
)
def test_expressions_that_break_the_parser_package_are_refused(api: Api, expr: str) -> None:
    """Each of these kills the process or panics in promql_parser 0.12 when it gets there unbounded."""
    response = api.client.post("/prometheus/api/v1/query", data={"query": expr})
    assert response.status_code in (400, 422)
    assert response.json()["status"] == "error"


def test_samples_max() -> None:
    with Api(_source(), replace(CONFIG, samples_max=50)) as api:
        status, document = api.get("query", query="up[10m]")
        assert (status, document["errorType"]) == (422, "execution")
        assert "too many samples" in document["error"]
        assert api.get("query", query="up[1m]")[0] == 200


class SlowSource(MemorySeries):
    """Holds every selection until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Semaphore(0)
        self.go_on = threading.Event()

    def select(self, matchers: Sequence[Matcher], start_ms: int, end_ms: int) -> Sequence[MemoryWindow]:
        self.entered.release()
        assert self.go_on.wait(20)
        return super().select(matchers, start_ms, end_ms)


def test_overload_is_refused_at_once_and_passes() -> None:
    source = SlowSource()
    statuses: list[int] = []
    with Api(source, replace(CONFIG, concurrency=1), waiting_max=1) as api:
        threads = [threading.Thread(target=lambda: statuses.append(api.get("query", query="up")[0])) for _ in range(2)]
        threads[0].start()
        assert source.entered.acquire(timeout=10)  # one runs
        threads[1].start()
        wait_until(lambda: api.pool.accepted == 2, 10, "the second query to be queued")
        status, document = api.get("query", query="up")
        assert (status, document["errorType"]) == (503, "unavailable")
        source.go_on.set()
        for thread in threads:
            thread.join(10)
        assert statuses == [200, 200]
        wait_until(lambda: api.pool.accepted == 0, 10, "both places to be free")
        assert api.get("query", query="1")[0] == 200


def test_a_query_past_its_deadline_answers_timeout() -> None:
    source = SlowSource()
    with Api(source) as api:
        status, document = api.get("query", query="up", timeout="0.01")
        assert (status, document["errorType"]) == (503, "timeout")
        source.go_on.set()


class BrokenSource(MemorySeries):
    def select(self, matchers: Sequence[Matcher], start_ms: int, end_ms: int) -> Sequence[MemoryWindow]:
        raise IntegrityError("format.corrupt", "a block fails its checksum")

    def metadata(self) -> Mapping[str, MemoryMetadata]:
        raise IntegrityError("format.corrupt", "a block fails its checksum")


def test_a_failing_store_is_unavailable() -> None:
    with Api(BrokenSource()) as api:
        for path, parameters in (("query", {"query": "up"}), ("metadata", {}), ("series", {"match[]": "up"})):
            status, document = api.get(path, **parameters)
            assert (status, document["errorType"]) == (503, "unavailable")
            assert "checksum" in document["error"]


_WORDS = [
    "up",
    "x_total",
    "{",
    "}",
    "(",
    ")",
    "[",
    "5m",
    "]",
    "rate",
    "sum",
    "by",
    "+",
    "-",
    "==",
    "bool",
    "1",
    "1e19",
    '"a"',
    "`",
    '"',
    "\\",
    "offset",
    "@",
    "on",
    "instance",
    "=~",
    ",",
    "#",
    "é",
    "🐘",
    "\x00",
    ":",
    "abs",
    "scalar",
    "vector",
    "unless",
    "^",
    "%",
    "absent",
    "time()",
]


@given(
    expr=st.lists(st.sampled_from([*_WORDS, " ", "\n"]), max_size=12).map("".join) | st.text(max_size=40),
    other=st.text(max_size=8),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_request_gives_a_500(api: Api, expr: str, other: str) -> None:
    for path, parameters in (
        ("query", {"query": expr, "time": other}),
        ("query", {"query": expr}),
        ("query_range", {"query": expr, "start": "0", "end": "60", "step": other or "1"}),
        ("series", {"match[]": expr, "limit": other}),
    ):
        form = {name: value.encode("utf-8", "replace") for name, value in parameters.items()}
        response = api.client.post(f"/prometheus/api/v1/{path}", data=form)
        assert response.status_code in (200, 400, 422), (path, parameters, response.text)
        assert response.json()["status"] in ("success", "error")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (-0.0, "-0"), (1.0, "1"), (0.1, "0.1"), (-1.5, "-1.5"), (math.inf, "+Inf"), (-math.inf, "-Inf"), (math.nan, "NaN"),
        (1e-6, "0.000001"), (1.5e-6, "0.0000015"), (1e-7, "1e-07"), (1.25e-10, "1.25e-10"), (1e16, "10000000000000000"), (1e20, "100000000000000000000"),
        (1e21, "1e+21"), (-1.5e22, "-1.5e+22"), (2.0**60, "1152921504606847000"), (123456789012345680.0, "123456789012345680"),
        (12345678901.5, "12345678901.5"), (5e-324, "5e-324"), (1.7976931348623157e308, "1.7976931348623157e+308"), (0.3, "0.3"),
    ],
)  # fmt: skip
def test_values_are_written_as_go_writes_them(value: float, text: str) -> None:
    assert format_value(value) == text
    assert _written([value]) == [text]


@given(st.lists(st.floats() | st.integers(-(2**63), 2**63).map(float), min_size=1, max_size=30))
def test_columns_are_formatted_like_single_values(values: list[float]) -> None:
    written = _written(values)
    assert written == [format_value(value) for value in values]
    for value, text in zip(values, written, strict=True):
        again = float(text)
        assert again == value or (math.isnan(again) and math.isnan(value))


def _written(values: list[float]) -> list[str]:
    times = np.arange(len(values), dtype=np.int64) * 1001 - 2000
    document = json.loads(encode_result(Matrix([Series({}, times, np.array(values))])))
    pairs = document["result"][0]["values"]
    assert [pair[0] for pair in pairs] == [time / 1000 for time in times.tolist()]
    return [pair[1] for pair in pairs]


def test_times() -> None:
    assert [format_time(t) for t in (0, 1, 1500, 1700000000000, -1, -1500)] == [
        "0",
        "0.001",
        "1.500",
        "1700000000",
        "-0.001",
        "-1.500",
    ]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("job", "job"), ("U__pg_2e_db", "pg.db"), ("U__a__b", "a_b"), ("U___1f418_", "\U0001f418"), ("U__", ""), ("U__a_zz_", "U__a_zz_"),
        ("U__a_d800_", "U__a_d800_"), ("U__trailing_", "U__trailing_"), ("with.dot", "with.dot"),
    ],
)  # fmt: skip
def test_label_names_in_paths(text: str, name: str) -> None:
    assert decode_label_name(text) == name


def test_annotations_stand_beside_the_data(api: Api) -> None:
    _, document = api.get("query", query="rate(up[5m])")
    assert document["infos"] == [
        'PromQL info: metric might not be a counter, name does not end in _total/_sum/_count/_bucket: "up"'
    ]
    assert "warnings" not in document
    _, document = api.get("query", query="quantile(2, up)")
    assert document["warnings"] == ["PromQL warning: quantile value should be between 0 and 1, got 2"]
    assert document["data"]["result"][0]["value"][1] == "+Inf"
    _, document = api.get("query", query="histogram_quantile(0.5, up)")
    assert document["warnings"] == ['PromQL warning: bucket label "le" is missing or has a malformed value of ""']
    _, document = api.get("query_range", query="sort(up)", start=1700000000, end=1700000600, step=60)
    assert "sort is ineffective" in document["warnings"][0]
    assert "infos" not in api.get("query", query="rate(x_total[5m])")[1]
    many = "+".join(f"quantile({number}, up)" for number in range(2, 17))
    _, document = api.get("query", query=many)
    assert len(document["warnings"]) == 11
    assert document["warnings"][-1] == "5 more warning annotations omitted"


def test_stats_say_how_long_it_took(api: Api) -> None:
    for path, parameters in (("query", {}), ("query_range", {"start": 1700000000, "end": 1700000600, "step": 60})):
        data = api.data(path, query="up", stats="all", **parameters)
        assert data["result"]
        assert data["stats"]["timings"].keys() == {"evalTotalTime", "execQueueTime", "execTotalTime"}
    assert "stats" not in api.data("query", query="up")


def test_expressions_are_formatted(api: Api) -> None:
    assert api.data("format_query", query='sum(rate(up{a="b"}[5m]))by(job)') == 'sum by (job) (rate(up{a="b"}[5m]))'
    assert api.get("format_query", query="sum(")[0] == 400


def test_the_schema_names_what_the_routes_read(api: Api) -> None:
    schema = api.client.get("/openapi.json").json()
    query_range = schema["paths"]["/prometheus/api/v1/query_range"]
    assert {one["name"] for one in query_range["get"]["parameters"]} >= {"query", "start", "end", "step", "limit", "timeout"}
    assert "application/x-www-form-urlencoded" in query_range["post"]["requestBody"]["content"]

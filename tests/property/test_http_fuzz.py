"""Every HTTP operation of the real collector, with arguments made from its own OpenAPI document: no 500, no hang, alive afterwards.

The process is the product's (`pgherd collector run`), asked over its UNIX socket, where everything is allowed. PGHERD_FUZZ_EXAMPLES is
how many requests each operation gets; a nightly run takes thousands and also bounds the process' growth.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any, cast

import httpx
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis.core import NotSet

from support.collector import Collector, collector
from support.mutations import mutated
from support.promql_queries import Queries

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120 + 60 * int(os.environ.get("PGHERD_FUZZ_EXAMPLES", "4")))]

EXAMPLES = int(os.environ.get("PGHERD_FUZZ_EXAMPLES", "4"))
SEED = int(os.environ.get("PGHERD_FUZZ_SEED", "1"))
# Waiting for something that doesn't come is these operations' work; they answer within their own bound, asked or not.
_ANSWER_WITHIN_S = 40.0
_GROWTH_MAX_BYTES = 128 * 1024 * 1024
_ALLOWED = frozenset({*range(200, 300), 304, *range(400, 500), 503})


@pytest.fixture(scope="module")
def running() -> Iterator[Collector]:
    with collector() as herd:
        herd.start()
        yield herd


@pytest.fixture(scope="module")
def local(running: Collector) -> Iterator[httpx.Client]:
    transport = httpx.HTTPTransport(uds=str(running.socket))
    with httpx.Client(transport=transport, base_url="http://collector", timeout=_ANSWER_WITHIN_S) as client:
        yield client


def _send(local: httpx.Client, case: schemathesis.Case[Any]) -> httpx.Response:
    """The request of a case, whatever it has for a body."""
    sent: dict[str, Any] = {}
    if isinstance(case.body, bytes):
        sent = {"content": case.body}
    elif not isinstance(case.body, NotSet):
        if case.media_type == "application/x-www-form-urlencoded" and isinstance(case.body, dict):
            sent = {"data": {str(name): str(value) for name, value in case.body.items()}}
        else:
            sent = {"content": json.dumps(case.body, default=str)}
    headers = {"content-type": case.media_type or "application/json"} if sent else {}
    return local.request(case.method, case.formatted_path, params=case.query, headers=headers, **sent)


def test_no_operation_fails_on_its_arguments(running: Collector, local: httpx.Client) -> None:
    document = local.get("/api/v1/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    operations = [cast(Any, result).ok() for result in schema.get_all_operations()]
    assert len(operations) > 30
    before_bytes = _resident(running)
    wrong: list[str] = []

    def fuzz(operation: Any) -> None:
        @seed(SEED)
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE) | operation.as_strategy())
        def ask(case: schemathesis.Case[Any]) -> None:
            try:
                response = _send(local, case)
            except (UnicodeEncodeError, httpx.InvalidURL):  # what can't even be sent
                return
            if response.status_code not in _ALLOWED:
                wrong.append(f"{case.method} {response.request.url} {response.request.content!r}: {response.status_code}")

        ask()

    for operation in operations:
        fuzz(operation)
    assert not wrong, "\n".join(wrong[:20])
    assert local.get("/readyz").status_code == 200
    if EXAMPLES >= 100:
        assert _resident(running) - before_bytes < _GROWTH_MAX_BYTES


def _resident(running: Collector) -> int:
    assert running.process is not None
    return psutil.Process(running.process.pid).memory_info().rss


@st.composite
def _queries(draw: st.DrawFn) -> dict[str, str]:
    """A request to `query` or `query_range` with any of its parameters damaged."""
    number = draw(st.integers(0, 500))
    parameters = {name: str(value) for name, value in Queries.numbered(0, number).query().items()}
    parameters |= draw(
        st.fixed_dictionaries({}, optional={name: st.just("1m") for name in ("timeout", "lookback_delta", "stats")})
    )
    name = draw(st.sampled_from(sorted(parameters)))
    atoms = ["", "-1", "1e300", "NaN", "9" * 30, "5m", "(", "\x00", "é", "%", "1970-01-01T00:00:00Z"]
    return parameters | {name: mutated(draw, parameters[name], list(parameters.values()), atoms)}


def test_no_query_fails_on_its_text(running: Collector, local: httpx.Client) -> None:
    @settings(max_examples=10 * EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(_queries())
    def ask(parameters: dict[str, str]) -> None:
        path = "/prometheus/api/v1/query_range" if "step" in parameters else "/prometheus/api/v1/query"
        form = {name: value.encode("utf-8", "replace") for name, value in parameters.items()}
        response = local.post(path, data=form)
        assert response.status_code in {200, 400, 422, 503}, response.text
        assert response.json()["status"] in {"success", "error"}

    ask()
    assert local.get("/readyz").status_code == 200

"""Whatever text comes as PromQL: a value or a refusal by name, within its bounds. PGHERD_FUZZ_EXAMPLES makes it longer.

The corpus is our own golden expressions, generated queries and some that have hurt other engines.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgherd.promql.engine import Limits, evaluate_instant, evaluate_range
from pgherd.promql.parse import formatted, parse
from pgherd.proto.errors import PgherdError, TransientError
from support.memory_series import MemorySeries
from support.mutations import mutated
from support.promql_queries import START_S, Queries, dataset
from support.promql_script import read_script

EXAMPLES = int(os.environ.get("PGHERD_FUZZ_EXAMPLES", "400"))
GOLDEN = [
    case.expr for path in sorted((Path(__file__).parents[1] / "golden").glob("*.promql")) for case in read_script(path)[1]
]
HOSTILE = [
    'sessions{host=~"(a+)+$"}',
    'sessions{host=~"(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)x"}',
    'label_replace(sessions, "a", "$1$1$1$1", "host", "((((.*)))){1,10}")',
    'label_join(sessions, "a", "xxxxxxxxxxxxxxxxxxxx", "host", "db", "host", "db")',
    "max_over_time(sum_over_time(sessions[1d:1s])[1d:1s])",
    "sum_over_time(vector(1)[1000y:1ms])",
    "sessions * on () group_left (host) sessions",
    'count_values("v", rate(sessions[5m]) * time())',
    "topk(1e300, sessions)",
    "quantile(1e-300, sessions) ^ 1e300",
    "predict_linear(sessions[1h], 1e308)",
    "round(sessions, 5e-324)",
    "year(vector(1e300)) + day_of_year(vector(-1e300))",
    "histogram_quantile(0.5, latency_seconds_bucket) @ start()",
    "sessions offset 290y",
    "sessions @ 9007199254740.991",
    "sessions[290y:1y] offset -290y",
]
CORPUS = [*GOLDEN, *HOSTILE, *(str(Queries.numbered(0, number).query()["query"]) for number in range(200))]
ATOMS = ["(", ")", "[", "]", "{", "}", ":", "@", "offset ", "-", "1e20", "0x7fffffffffffffff", "NaN", "Inf", "5m", "1ms", "100y", '"', "`", "\\", "=~", "bool ", "on()", "group_left ", "\x00", "é", "🐘", "\ud800", ",", "#", "\n", "start()", "sum by (host)"]  # fmt: skip


@st.composite
def texts(draw: st.DrawFn) -> str:
    return mutated(draw, draw(st.sampled_from(CORPUS)), CORPUS, ATOMS)


def _source() -> MemorySeries:
    source = MemorySeries()
    for (metric, labels), samples in dataset(0).items():
        source.add({"__name__": metric, **dict(labels)}, samples)
    return source


SOURCE = _source()


def _refusal(ask: Callable[[], object]) -> str | None:
    try:
        ask()
    except PgherdError as error:
        return error.code
    return None


def _limits() -> Limits:
    deadline_s = time.monotonic() + 20

    def checkpoint() -> None:
        if time.monotonic() > deadline_s:
            raise TransientError("query.timeout", "too slow")

    return Limits(samples_max=200_000, checkpoint=checkpoint)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(texts())
def test_any_text_has_an_answer_or_a_name_for_its_fault(text: str) -> None:
    """The timeout of the test is the bound on hanging; what isn't a PgherdError fails it."""
    start_ms = START_S * 1000
    for ask in (
        lambda: evaluate_instant(text, start_ms + 3_000_500, SOURCE, _limits()),
        lambda: evaluate_range(text, start_ms, start_ms + 600_000, 60_000, SOURCE, _limits()),
        lambda: parse(formatted(text)),
    ):
        assert _refusal(ask) in {None, "promql.parse", "promql.unsupported", "promql.execution", "promql.limit"}


def test_what_has_hurt_other_engines_is_answered() -> None:
    for text in HOSTILE:
        refusal = _refusal(partial(evaluate_instant, text, (START_S + 3000) * 1000, SOURCE, _limits()))
        assert refusal in {None, "promql.parse", "promql.execution", "promql.limit"}, text

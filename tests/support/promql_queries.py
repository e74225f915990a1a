"""Random data and random PromQL over it: every expression is valid, most have an answer.

An expression knows what a comparison with another engine needs to know of it (`Vector`): whether all its arithmetic is
defined to the last bit, so that rounding and comparing may follow; whether its values are finite or its order is; which labels it can
have, so that vectors can be matched. Query number n of a seed is the same whenever it is asked for.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from pgherd.proto.samples import STALE_NAN
from support.prometheus import Dataset

T = TypeVar("T")

START_S = 1_700_000_000
SPAN_S = 5_400
HOSTS, DATABASES = ("a", "b", "c"), ("app", "audit", "postgres")
BOUNDS = ("0.1", "0.5", "1", "5", "+Inf")
_COUNTERS = ("commits_total", "reads_total")
_GAUGES = ("sessions", "size_bytes", "odd")


def dataset(seed: int) -> Dataset:
    """Counters with resets, gauges, values that aren't numbers, histograms; gaps, stale markers, shared and jittered times."""
    rng = random.Random(seed)
    data: dict[tuple[str, tuple[tuple[str, str], ...]], Sequence[tuple[int, float]]] = {}
    for metric in (*_COUNTERS, *_GAUGES):
        for host in HOSTS:
            for db in DATABASES[: 1 + rng.randrange(3)]:
                shard = (("shard", "1"),) if rng.random() < 0.3 else ()
                data[metric, (("db", db), ("host", host), *shard)] = list(_samples(metric, rng))
    for host in HOSTS:
        for version in ("15", "16"):  # an upgrade: one follows the other
            data["server_info", (("host", host), ("version", version))] = list(_upgrade(version, rng))
        data.update(_histogram(host, rng))
    return data


def _times_ms(rng: random.Random) -> Iterator[int]:
    """Odd milliseconds: no window that begins or ends at a whole or half second has a sample on its edge."""
    jitter = rng.random() < 0.5
    for second in range(rng.randrange(0, 600), SPAN_S - rng.randrange(0, 900), 15):
        yield (START_S + second) * 1000 + (2 * rng.randrange(250) + 1 if jitter else 7)


def _samples(metric: str, rng: random.Random) -> Iterator[tuple[int, float]]:
    value = rng.uniform(5e5, 2e6) if metric.endswith("_total") else rng.uniform(0, 100)
    if metric == "commits_total":
        value = float(int(value))
    pause_from = START_S + rng.randrange(SPAN_S)
    pause_to = pause_from + rng.choice([0, 200, 900])
    marked = rng.random() < 0.5
    for ms in _times_ms(rng):
        if metric.endswith("_total"):
            value += rng.randrange(10) if metric == "commits_total" else rng.random()
            if rng.random() < 0.01:
                value *= 0.5
                value = float(int(value)) if metric == "commits_total" else value
        elif metric == "odd":
            value = rng.choice([0.0, 0.0, 1.5, -2.0, math.nan, math.inf, -math.inf, 7.0])
        elif metric == "sessions":
            value = max(0.0, float(int(value)) + rng.choice([-1, 0, 0, 0, 1, 2.5]))
        else:
            value = max(0.0, value + rng.uniform(-1, 1))
        if not pause_from * 1000 <= ms < pause_to * 1000:
            yield ms, value
        elif marked:
            marked = False
            yield ms, STALE_NAN


def _upgrade(version: str, rng: random.Random) -> Iterator[tuple[int, float]]:
    at_s = START_S + SPAN_S // 2
    for ms in _times_ms(rng):
        if (ms < at_s * 1000) is (version == "15"):
            yield ms, 1.0
    if version == "15":
        yield (START_S + SPAN_S) * 1000 + 1, STALE_NAN


def _histogram(host: str, rng: random.Random) -> Dataset:
    """Cumulative buckets that start high, at times scraped together."""
    times = list(_times_ms(rng))
    shares = sorted(rng.random() for _ in BOUNDS[:-1])
    counts = [float(100_000 * (place + 1)) for place in range(len(BOUNDS))]
    columns: list[list[tuple[int, float]]] = [[] for _ in BOUNDS]
    for ms in times:
        observed = rng.randrange(20)
        for place, share in enumerate([*shares, 1.0]):
            counts[place] += int(observed * share)
            columns[place].append((ms, counts[place]))
    return {
        ("latency_seconds_bucket", (("host", host), ("le", bound))): column
        for bound, column in zip(BOUNDS, columns, strict=True)
    }


@dataclass(frozen=True, slots=True)
class Vector:
    """An expression that yields an instant vector."""

    text: str
    labels: frozenset[str]  # that its elements can have
    named: bool = False  # elements keep their metric name
    exact: bool = True  # every engine must give the same bits
    finite: bool = True  # no NaN, no Inf
    distinct: bool = False  # no two elements have equal values
    counter: bool = False  # only grows, but for resets
    pairs: bool = False  # from one metric's own series: equal labels mean equal series
    ordered: bool = True  # elements come in label order in a range query too


class Queries:
    """Expressions of one seed."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.exact = False  # of the last query: every engine must give the same bits

    @classmethod
    def numbered(cls, seed: int, number: int) -> Queries:
        """The generator of one query."""
        return cls(random.Random(f"{seed} {number}"))

    def query(self) -> Mapping[str, str | float]:
        """A request's parameters: `query` with `time`, or with `start`, `end` and `step`."""
        rng = self._rng
        at_s = START_S + rng.randrange(-60, SPAN_S + 600) + 0.5
        instant = rng.random() < 0.65
        expr = self._any_of(instant=instant).replace(_OFFSET, rng.choice(["", "", " offset 1m", " offset -45s"]))
        if instant:
            return {"query": expr, "time": at_s}
        step_s = rng.choice([7, 15, 60, 300])
        return {"query": expr, "start": at_s, "end": at_s + 40 * step_s, "step": step_s}

    def _any_of(self, *, instant: bool) -> str:
        """A whole expression."""
        if instant and self._rng.random() < 0.04:
            return self._pick([f"{self._selector().text}[{self._range()}]", self._subquery(1)])
        if instant and self._rng.random() < 0.06:
            return f"{self._pick(['sort', 'sort_desc'])}({self.vector(2).text})"
        if self._rng.random() < 0.05:
            return self._scalar(2)
        whole = self.vector(self._rng.randrange(4))
        self.exact = whole.exact
        return whole.text

    def vector(self, depth: int) -> Vector:
        """A vector expression of at most this depth."""
        if depth == 0:
            return self._leaf()
        inner = self.vector(depth - 1)
        made = self._pick(
            [
                self._aggregation,
                self._aggregation,
                self._with_parameter,
                self._against_scalar,
                self._matched,
                self._matched,
                self._many_to_one,
                self._of_set,
                self._function,
                self._function,
                self._relabelled,
                self._over_subquery,
            ]
        )
        return made(inner, depth)

    def _pick(self, choices: Sequence[T]) -> T:
        return self._rng.choice(choices)

    def _leaf(self) -> Vector:
        choice = self._rng.randrange(20)
        if choice < 7:
            return self._placed(self._selector())
        if choice < 15:
            return self._over_range()
        if choice < 17:
            return self._histogram_quantile()
        text, labels = self._pick(
            [
                (f"vector({self._scalar(0)})", ()),
                (f"{self._pick(_DATES)}()", ()),
                (f"timestamp({self._selector('sessions').text}{self._offset()})", ("db", "host", "shard")),
                (f'absent({self._pick(["nothing", "sessions", "odd"])}{{host="a",db=~"a.*"}})', ("host",)),
            ]
        )
        computed = text.startswith("vector")
        return Vector(text, frozenset(labels), exact=not computed, finite=not computed, ordered=False)

    def _selector(self, *metrics: str) -> Vector:
        metric = self._pick(metrics or (*_COUNTERS, *_GAUGES, "server_info", "latency_seconds_bucket"))
        labels = {"server_info": ("host", "version"), "latency_seconds_bucket": ("host", "le")}.get(
            metric, ("db", "host", "shard")
        )
        matcher = self._pick(["", "", "", '{host="a"}', '{host=~"a|b"}', '{host!="c"}'])
        if "db" in labels:
            matcher = self._pick(
                [matcher, '{db!="app"}', '{shard=""}', '{db!~"a.*"}', '{db=~".+"}', '{db=~"app|audit",host!~"[bc]"}']
            )
        return Vector(
            metric + matcher,
            frozenset(labels),
            named=True,
            finite=metric != "odd",
            distinct=metric in ("reads_total", "size_bytes"),
            counter=metric.endswith(("_total", "_bucket")),
            pairs=True,
        )

    def _placement(self) -> str:
        """`offset` and `@`. Fixed times end in half seconds, as the evaluation times do."""
        offset = self._offset()
        at = self._pick(["", "", "", "", "", f" @ {START_S + self._rng.randrange(SPAN_S)}.5", " @ start()", " @ end()"])
        return self._pick([offset + at, at + offset])

    def _offset(self) -> str:
        return self._pick(["", "", "", "", " offset 3m", " offset -90s"])

    def _placed(self, selector: Vector) -> Vector:
        return replace(selector, text=selector.text + self._placement())

    def _range(self) -> str:
        return self._pick(["40s", "1m", "5m", "17m", "1m30s"])

    def _over_range(self) -> Vector:
        function = self._pick(_OVER_RANGE)
        metrics = _COUNTERS if function in _OF_COUNTERS else ("sessions", "size_bytes") if function in _OF_FINITE else ()
        selector = self._selector(*metrics)
        placement = self._offset() if function in _OF_THE_STEP else self._placement()
        return self._applied(function, f"{selector.text}[{self._range()}]{placement}", selector)

    def _over_subquery(self, inner: Vector, depth: int) -> Vector:
        function = self._pick(_OVER_RANGE)
        if function in _OF_COUNTERS and not inner.counter:
            function = self._pick(["max_over_time", "last_over_time", "count_over_time", "stdvar_over_time", "deriv"])
        if (function in _OF_STEPS and not inner.exact) or (function in _OF_FINITE and not inner.finite):
            function = "avg_over_time"
        operand = self._subquery_of(inner, fixed=function not in _OF_THE_STEP)
        return self._applied(function, operand, replace(inner, pairs=inner.pairs and inner.named))

    def _subquery(self, depth: int) -> str:
        return self._subquery_of(self.vector(depth))

    def _subquery_of(self, inner: Vector, *, fixed: bool = True) -> str:
        """A range without steps on its edges: inner steps are whole seconds, and so are the evaluation times of a nested one."""
        nested = inner.text.replace(_OFFSET, self._pick([" offset 1500ms", " offset 1m500ms", " offset -30s500ms"]))
        step = self._pick(["", "15s", "20s", "1m", "7s"])
        at = [f" @ {START_S + self._rng.randrange(SPAN_S)}.5", " @ end()", " @ start() offset 1m"] if fixed else []
        placement = self._pick([_OFFSET, _OFFSET, _OFFSET, *at])
        return f"({nested})[{self._pick(['2m', '5m', '90s'])}:{step}]{placement}"

    def _applied(self, function: str, operand: str, inner: Vector) -> Vector:
        pick = self._pick
        arguments = operand
        if function == "quantile_over_time":
            arguments = f"{pick(['0.5', '0.99', '0', '1', '-1', '2', self._scalar(0)])}, {operand}"
        elif function == "predict_linear":
            arguments = f"{operand}, {pick(['60', '3600', '-30.5', self._scalar(0)])}"
        elif function == "holt_winters":
            arguments = f"{operand}, {pick(['0.1', '0.5', '0.9'])}, {pick(['0.1', '0.5'])}"
        keeps = function == "last_over_time"
        if function == "absent_over_time":
            return Vector(f"{function}({arguments})", frozenset(("host", "db", "shard", "le")), exact=True)
        return Vector(
            f"{function}({arguments})",
            inner.labels,
            named=inner.named and keeps,
            exact=inner.exact
            and function not in ("avg_over_time", "predict_linear", "holt_winters", "sum_over_time")
            and (
                inner.finite
                or function
                in ("last_over_time", "count_over_time", "present_over_time", "changes", "max_over_time", "min_over_time")
            ),
            finite=inner.finite
            and function not in ("quantile_over_time", "deriv", "predict_linear", "irate", "rate", "increase", "delta"),
            distinct=inner.distinct and keeps,
            counter=inner.counter and keeps,
            pairs=inner.pairs,
            ordered=inner.ordered,
        )

    def _histogram_quantile(self) -> Vector:
        buckets = self._selector("latency_seconds_bucket")
        text = self._pick(
            [
                buckets.text,
                f"rate({buckets.text}[{self._range()}])",
                f"increase({buckets.text}[5m])",
                f"sum by (le) ({buckets.text})",
            ]
        )
        quantile = self._pick(["0.5", "0.9", "0.99", "0", "1", "-1", "1.5", "NaN", self._scalar(0)])
        labels = frozenset() if text.startswith("sum") else frozenset(("host",))
        return Vector(f"histogram_quantile({quantile}, {text})", labels, exact=False, finite=False, ordered=False)

    def _grouping(self) -> tuple[str, frozenset[str] | None]:
        return self._pick(
            [
                ("", frozenset()),
                (" by (host)", frozenset(("host",))),
                (" by (db, nothing)", frozenset(("db",))),
                (" by (le)", frozenset(("le",))),
                (" without (shard)", None),
                (" without ()", None),
                (" without (host, le)", None),
            ]
        )

    def _aggregation(self, inner: Vector, _depth: int) -> Vector:
        operation = self._pick(["sum", "sum", "min", "max", "avg", "count", "group", "stddev", "stdvar"])
        if operation.startswith("std") and not (inner.finite and inner.ordered):
            operation = "max"
        grouping, left = self._grouping()
        labels = inner.labels - _removed(grouping) if left is None else inner.labels & left
        return Vector(
            f"{operation}{grouping} ({inner.text})",
            labels,
            exact=operation in ("count", "group") or (inner.exact and operation in ("min", "max", "stddev", "stdvar")),
            finite=inner.finite or operation in ("count", "group"),
            ordered=False,
        )

    def _with_parameter(self, inner: Vector, _depth: int) -> Vector:
        operation = self._pick(["topk", "bottomk", "quantile", "count_values"])
        if operation in ("topk", "bottomk") and not (inner.distinct and inner.finite):
            operation = "quantile"
        if operation == "count_values" and not inner.exact:
            operation = "quantile"
        grouping, left = self._grouping()
        labels = inner.labels - _removed(grouping) if left is None else inner.labels & left
        computed = [] if "@" in inner.text or "vector(" in inner.text else ["scalar(count(sessions))", "time() % 7"]
        if operation == "quantile":
            parameter = self._pick(["0.5", "0.9", "0", "1", "-0.5", "7", *computed])
            return Vector(f"quantile{grouping}({parameter}, {inner.text})", labels, exact=False, finite=False, ordered=False)
        if operation == "count_values":
            label = self._pick(["value", "host"])
            return Vector(f'count_values{grouping}("{label}", {inner.text})', labels | {label}, ordered=False)
        parameter = self._pick(["1", "2", "3.7", "0", "-1", *computed])
        return replace(inner, text=f"{operation}{grouping}({parameter}, {inner.text})", ordered=False)

    def _scalar(self, depth: int) -> str:
        literals = ["2", "-0.5", "1e6", "NaN", "Inf", "1 + 2 * 3", "-2 ^ 2", "7 % 3", "pi()"]
        computed = ["time()", "scalar(sum(sessions))", "scalar(count(odd))", "time() % 60 / 60", "minute() > bool 30"]
        if depth == 0:
            return self._pick([*literals, "scalar(count(sessions))", "time() % 7"])
        return f"({self._pick(literals + computed[:4])}) {self._pick(['+', '-', '*', '/', '%', '^', '== bool', '> bool'])} ({self._scalar(depth - 1)})"

    def _against_scalar(self, inner: Vector, _depth: int) -> Vector:
        operators = ["+", "-", "*", "/", "^"] + (["%", "==", "!=", "<", ">", "<=", ">= bool", "< bool"] if inner.exact else [])
        operator = self._pick(operators)
        scalar = self._pick(["2", "-0.5", "1e6", "time()", "scalar(sum(sessions))", "NaN", "scalar(min(odd))"])
        swapped = self._rng.random() < 0.3
        left, right = (f"({scalar})", f"({inner.text})") if swapped else (f"({inner.text})", f"({scalar})")
        filters = operator in _FILTERS
        return replace(
            inner,
            text=f"{left} {operator} {right}",
            named=inner.named and filters,
            exact=inner.exact and operator != "^" and not (operator in ("+", "-", "*", "/", "%") and "sum" in scalar),
            finite=inner.finite and (filters or (operator in ("+", "-") and scalar in ("2", "-0.5", "1e6"))),
            distinct=inner.distinct and filters,
            counter=False,
            ordered=False,
        )

    def _matched(self, inner: Vector, depth: int) -> Vector:
        """One to one. Filtering comparisons match on all labels: 2.42 forgives collisions among what they remove."""
        other = self.vector(depth - 1)
        exact = inner.exact and other.exact
        arithmetic = ["+", "-", "/", "*"]
        comparisons = ["==", "!=", ">", "<=", "!= bool", "< bool"] if exact else []
        operator = self._pick(arithmetic + comparisons)
        if inner.labels == other.labels and self._rng.random() < 0.5:
            matching = self._pick(["", f" on ({', '.join(sorted(inner.labels))})", " ignoring (nothing)"])
        elif operator in _FILTERS:
            matching = ""
        else:
            matching = self._pick(
                [" on (host)", " ignoring (shard)", " on (db, host, shard)", " ignoring (le, db)", " on ()", ""]
            )
        return Vector(
            f"({inner.text}) {operator}{matching} ({other.text})",
            inner.labels,
            named=False if operator not in _FILTERS else inner.named and not matching.startswith(" on"),
            exact=exact,
            finite=inner.finite and operator in _FILTERS,
            distinct=inner.distinct and operator in _FILTERS,
            ordered=False,
        )

    def _many_to_one(self, inner: Vector, depth: int) -> Vector:
        one = self._pick(
            [
                Vector("server_info", frozenset(("host", "version"))),
                Vector("sum by (host) (sessions)", frozenset(("host",)), exact=False),
                Vector("max by (host) (size_bytes)", frozenset(("host",))),
                Vector("count by (host, db) (commits_total)", frozenset(("host", "db"))),
            ]
        )
        exact = inner.exact and one.exact
        operator = self._pick(["*", "+", "-", "/"] + (["> bool", "<", "=="] if exact else []))
        include = self._pick(["", " (version)", " (version, db)", " (nothing)"]) if operator not in _FILTERS else ""
        on = self._pick([" on (host)", " on (host)", " on (host, db)"]) if not include else " on (host)"
        sides = [f"({inner.text})", f"({one.text})"]
        word = "group_left"
        if self._rng.random() < 0.4:
            sides.reverse()
            word = "group_right"
        return Vector(
            f"{sides[0]} {operator}{on} {word}{include} {sides[1]}",
            inner.labels | {"version"} if include else inner.labels,
            named=inner.named and operator in _FILTERS,
            exact=exact,
            finite=False,
            ordered=False,
        )

    def _of_set(self, inner: Vector, depth: int) -> Vector:
        other = self.vector(depth - 1)
        operator = self._pick(["and", "or", "unless"])
        matching = self._pick(["", " on (host)", " ignoring (shard)", " on ()", " on (db, host)", " ignoring (le)"])
        either = operator == "or"
        return Vector(
            f"({inner.text}) {operator}{matching} ({other.text})",
            inner.labels | other.labels if either else inner.labels,
            named=inner.named or (either and other.named),
            exact=inner.exact and (other.exact or not either),
            finite=inner.finite and (other.finite or not either),
            distinct=inner.distinct and not either,
            counter=False,
            ordered=False,
        )

    def _function(self, inner: Vector, _depth: int) -> Vector:
        smooth = [
            "abs",
            "exp",
            "ln",
            "log2",
            "log10",
            "sqrt",
            "-",
            "+",
            "absent",
            "vector_of_scalar",
            "clamp_min({}, 3)",
            "clamp_max({}, 1e6)",
            "sin",
            "cos",
            "atan",
            "tanh",
            "deg",
            "rad",
        ]
        stepped = [
            "ceil",
            "floor",
            "sgn",
            "round",
            "round({}, 0.25)",
            "round({}, 0)",
            "clamp({}, 1, 50)",
            "clamp({}, 9, 2)",
            "scalar",
            *_DATES,
        ]
        function = self._pick(smooth + stepped if inner.exact else smooth)
        if function == "absent":
            return Vector(f"absent({inner.text})", frozenset(("host", "db", "shard", "le")))
        if function in ("scalar", "vector_of_scalar"):
            return Vector(f"vector(scalar({inner.text}))", frozenset(), exact=inner.exact, finite=False)
        text = function.format(inner.text) if "{}" in function else f"{function}({inner.text})"
        keeps = function == "+"
        return replace(
            inner,
            text=text,
            named=inner.named and keeps,
            exact=inner.exact and function not in ("exp", "ln", "log2", "log10", "sin", "cos", "atan", "tanh"),
            finite=inner.finite and function in ("abs", "-", "+", "ceil", "floor", "sgn", "round", "clamp_min({}, 3)"),
            distinct=inner.distinct and keeps,
            counter=inner.counter and keeps,
            ordered=False,
        )

    def _relabelled(self, inner: Vector, _depth: int) -> Vector:
        text, label = self._pick(
            [
                ('label_replace({}, "copy", "$1-x", "host", "(.*)")', "copy"),
                ('label_replace({}, "db", "${{first}}", "db", "(?P<first>a).*")', "db"),
                ('label_replace({}, "host", "", "db", "audit")', "host"),
                ('label_replace({}, "pair", "$2$1", "db", "(.)(.).*")', "pair"),
                ('label_join({}, "joined", "/", "host", "db", "nothing")', "joined"),
                ('label_join({}, "host", "", "db", "host")', "host"),
            ]
        )
        return replace(inner, text=text.format(inner.text), labels=inner.labels | {label}, pairs=False, ordered=False)


# Stands for an offset until it is known whether the subquery will be nested in another.
_OFFSET = "<offset>"
_DATES = ("minute", "hour", "day_of_week", "day_of_month", "day_of_year", "days_in_month", "month", "year")
_OF_COUNTERS = ("rate", "increase", "irate", "resets")
_OF_FINITE = ("deriv", "predict_linear")
_OF_THE_STEP = ("predict_linear", "quantile_over_time")
_OF_STEPS = ("changes", "resets")
_FILTERS = ("==", "!=", ">", "<=", "<", ">=")
_OVER_RANGE = (
    *_OF_COUNTERS,
    "delta",
    "idelta",
    "changes",
    "deriv",
    "predict_linear",
    "holt_winters",
    "absent_over_time",
    *(f"{name}_over_time" for name in ("avg", "min", "max", "sum", "count", "last", "stddev", "stdvar", "present", "quantile")),
)


def _removed(grouping: str) -> frozenset[str]:
    return frozenset(label for label in ("shard", "host", "le") if label in grouping)

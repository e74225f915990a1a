"""The adapter over the parser package: its tree, its refusals, its bounds; durations and times of the API."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgherd.promql.ast import (
    Aggregate,
    AggregateOp,
    Anchor,
    Binary,
    BinaryOp,
    Call,
    ManySide,
    Matching,
    MatrixSelector,
    Negation,
    NumberLiteral,
    StringLiteral,
    Subquery,
    ValueType,
    VectorSelector,
    value_type,
)
from pgherd.promql.durations import parse_duration_ms, parse_time_ms
from pgherd.promql.parse import OPERATORS_MAX, parse, parse_selector
from pgherd.proto.errors import ConfigError
from pgherd.proto.selectors import Matcher, MatchOp

UP = Matcher("__name__", MatchOp.EQUAL, "up")


def test_the_tree_of_an_expression() -> None:
    expr = parse('sum by (job, db) (rate(up{job=~"a|b", db!="", x!~"y"}[1m30s] offset -5m)) / on (job) -up > bool 2 ^ 0x10')
    selector = VectorSelector(
        (
            UP,
            Matcher("job", MatchOp.REGEX, "a|b"),
            Matcher("db", MatchOp.NOT_EQUAL, ""),
            Matcher("x", MatchOp.NOT_REGEX, "y"),
        ),
        offset_ms=-300_000,
    )
    rate = Call("rate", (MatrixSelector(selector, 90_000),), ValueType.VECTOR)
    total = Aggregate(AggregateOp.SUM, rate, ("job", "db"))
    quotient = Binary(BinaryOp.DIV, total, Negation(VectorSelector((UP,))), matching=Matching(on=True, labels=("job",)))
    power = Binary(BinaryOp.POW, NumberLiteral(2.0), NumberLiteral(16.0))
    assert expr == Binary(BinaryOp.GREATER, quotient, power, return_bool=True)
    assert value_type(expr) is ValueType.VECTOR


def test_strings_and_utf8_names() -> None:
    assert parse('"a\\n\\u00e9"') == StringLiteral("a\né")
    assert parse('`a\\n"#`') == StringLiteral('a\\n"#')
    assert parse("# `comment`\n'x'") == StringLiteral("x")
    assert parse('{"pg.up", "a.b"=`\\d`}') == VectorSelector(
        (Matcher("__name__", MatchOp.EQUAL, "pg.up"), Matcher("a.b", MatchOp.EQUAL, "\\d"))
    )


def test_where_a_selector_looks() -> None:
    assert parse("up @ 1.5 offset 1m") == VectorSelector((UP,), 60_000, 1500)
    assert parse("up offset -1m @ end()") == VectorSelector((UP,), -60_000, Anchor.END)
    assert parse("up[5m] @ start()") == MatrixSelector(VectorSelector((UP,), 0, Anchor.START), 300_000)
    assert parse("up[5m:] @ 7 offset 1s") == Subquery(VectorSelector((UP,)), 300_000, None, 1000, 7000)
    assert parse("(-up)[5m:30s]") == Subquery(Negation(VectorSelector((UP,))), 300_000, 30_000)


def test_many_to_one_and_parameters() -> None:
    up = VectorSelector((UP,))
    for word, many in (("group_left", ManySide.LEFT), ("group_right", ManySide.RIGHT)):
        matching = Matching(on=True, labels=("a",), many=many, include=("b",))
        assert parse(f"up * on (a) {word} (b) up") == Binary(BinaryOp.MUL, up, up, matching=matching)
    assert parse("topk by (a) (2, up)") == Aggregate(AggregateOp.TOPK, up, ("a",), parameter=NumberLiteral(2.0))
    assert parse('count_values("v", up)') == Aggregate(AggregateOp.COUNT_VALUES, up, parameter=StringLiteral("v"))


def test_matching_is_between_vectors_only() -> None:
    assert parse("up + 1") == Binary(BinaryOp.ADD, VectorSelector((UP,)), NumberLiteral(1.0))
    assert parse("up + up") == Binary(
        BinaryOp.ADD, VectorSelector((UP,)), VectorSelector((UP,)), matching=Matching(on=False, labels=())
    )


@pytest.mark.parametrize(
    ("text", "feature"),
    [
        ("up @ -1", "@ modifier"),
        ('up{a="b" or c="d"}', "'or' between label matchers"),
        ("up + fill(0) up", "fill"),
        ("limit_ratio(0.5, up)", "limit_ratio"),
        ("histogram_count(up)", "histogram_count"),
        ("info(up)", "info"),
        ("ts_of_max_over_time(up[5m])", "ts_of_max_over_time"),
    ],
)
def test_what_is_not_evaluated_is_refused_by_name(text: str, feature: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(text)
    assert raised.value.code == "promql.unsupported"
    assert feature in raised.value.message


@pytest.mark.parametrize(
    "text", ["", "up{", "1 +", "rate(up)", "sum(up[5m])", "{}", '{a=~".*"}', 'up{a=~"("}', "1 == 1", "x[0s]", "'\ud800'"]
)
def test_what_is_not_promql_is_a_parse_error(text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(text)
    assert raised.value.code == "promql.parse"


@pytest.mark.parametrize(
    "text",
    ["(" * 30_000 + "1" + ")" * 30_000, "1" + "+1" * 30_000, "-" * 30_000 + "1", "x" + " or x" * 10_000, "x[1e20]", "x[1m:1e20]", "x[1m: 1e+20 ]", "x offset 1e20", "x offset - 1e20", "x[5m] offset -1e20", "x offset Inf", "x offset# c\n-NaN", "x[0x7fffffffffffffff]", "x @ 1e17", "x @ 0x7fffffffffffffff", "x offset -0x7fffffffffffffff", "1" * 70_000],
)  # fmt: skip
def test_hostile_text_never_reaches_the_package(text: str) -> None:
    """In a process of its own, since without the bounds these end the process (SIGSEGV) or panic."""
    program = "import sys; from pgherd.promql.parse import parse\ntry: parse(sys.stdin.read())\nexcept Exception as error: print(error.code)"
    done = subprocess.run([sys.executable, "-c", program], input=text, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "promql.parse\n", "")


def test_long_but_honest_expressions_pass() -> None:
    parse("+".join(["1"] * (OPERATORS_MAX // 2)))
    parse("up{" + ",".join(f'l{index}!="x"' for index in range(400)) + "}")


def test_selectors() -> None:
    assert parse_selector("up") == (UP,)
    for text in ("up offset 5m", "up[5m]", "sum(up)", "1", "up + up"):
        with pytest.raises(ConfigError):
            parse_selector(text)


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [("1h30m", 5_400_000), ("15s", 15_000), ("1w2d", 777_600_000), ("250ms", 250), ("60", 60_000), ("0.5", 500), ("1e3", 1_000_000), ("1y", 31_536_000_000)],
)  # fmt: skip
def test_durations(text: str, milliseconds: int) -> None:
    assert parse_duration_ms(text, "step") == milliseconds


@pytest.mark.parametrize(
    "text", ["", "1m1h", "s", "1.5h", "-1m", "NaN", "Inf", "1e300", "9" * 200, "9" * 5000 + "y", "9" * 100 + "y", "١"]
)
def test_bad_durations(text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_duration_ms(text, "step")
    assert raised.value.code == "usage.invalid"
    assert "'step'" in raised.value.message


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [
        ("0", 0), ("1700000000.123", 1_700_000_000_123), ("-1.5", -1500), ("1970-01-01T00:00:01Z", 1000), ("2023-11-14T22:13:20.5+00:00", 1_700_000_000_500),
        ("2023-11-15T00:13:20.123456789+02:00", 1_700_000_000_123), ("2023-11-14t22:13:20z", 1_700_000_000_000), ("0001-01-01T00:00:00Z", -62_135_596_800_000),
    ],
)  # fmt: skip
def test_times(text: str, milliseconds: int) -> None:
    assert parse_time_ms(text, "time") == milliseconds


@given(st.text(max_size=40) | st.from_regex(r"\A[0-9T:.Z+-]{1,40}\Z"))
def test_any_text_is_a_time_or_refused(text: str) -> None:
    for read in (parse_time_ms, parse_duration_ms):
        try:
            assert abs(read(text, "time")) <= 2**53
        except ConfigError:
            continue

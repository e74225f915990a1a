"""promtool's unit-test files: what one says, and the series that its notation stands for.

    rule_files, evaluation_interval (1m), group_eval_order, tests:
      name, interval, input_series (series, values), external_labels, external_url,
      alert_rule_test (eval_time, alertname, exp_alerts: exp_labels, exp_annotations),
      promql_expr_test (expr, eval_time, exp_samples: labels, value)

Source: https://prometheus.io/docs/prometheus/latest/configuration/unit_testing_rules/. Not read: native histograms.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import yaml

from pgherd.alerts.load import YamlReader
from pgherd.alerts.recording import Labels, canonical
from pgherd.proto.samples import STALE_NAN
from pgherd.proto.selectors import NAME_LABEL

SAMPLES_MAX = 10_000_000  # of one file: a typing error in an exponent must not take the machine's memory

_FILE_KEYS = ("rule_files", "evaluation_interval", "group_eval_order", "tests", "fuzzy_compare")
_TEST_KEYS = (
    "name",
    "interval",
    "input_series",
    "alert_rule_test",
    "promql_expr_test",
    "external_labels",
    "external_url",
)
_NUMBER = r"(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|0[xX][0-9a-fA-F]+|[iI]nf|[nN]a[nN])"
_ITEM_RE = re.compile(
    rf"(?P<blank>_)(?:x(?P<blanks>\d+))?|(?P<stale>stale)|(?P<start>[-+]?{_NUMBER})(?:(?P<step>[-+]{_NUMBER})?x(?P<times>\d+))?"
)
_NAME_RE = re.compile(r"\s*(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)?\s*(?P<braces>\{(?P<inside>.*)\})?\s*", re.DOTALL)
_PAIR_RE = re.compile(
    r"""\s*(?P<label>[a-zA-Z_][a-zA-Z0-9_]*|"(?:[^"\\]|\\.)*")\s*=\s*(?P<value>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|`[^`]*`)\s*(?:,|$)""",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class InputSeries:
    """One series; `values[i]` stands at i intervals, None is no sample."""

    labels: Labels
    values: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class AlertTest:
    """At `eval_ns`, the firing alerts of this name are these: labels without alertname, and annotations."""

    eval_ns: int
    alertname: str
    expected: tuple[tuple[Mapping[str, str], Mapping[str, str]], ...]


@dataclass(frozen=True, slots=True)
class ExpressionTest:
    """At `eval_ns`, `expr` yields exactly these samples."""

    eval_ns: int
    expr: str
    expected: tuple[tuple[Labels, float], ...]


@dataclass(frozen=True, slots=True)
class UnitTest:
    """One scenario."""

    name: str
    interval_ns: int
    series: tuple[InputSeries, ...]
    alerts: tuple[AlertTest, ...]
    expressions: tuple[ExpressionTest, ...]
    external_labels: Mapping[str, str] = field(default_factory=dict)
    external_url: str = ""

    @property
    def end_ns(self) -> int:
        """The last time that anything is asked about."""
        return max([0, *(test.eval_ns for test in self.alerts), *(test.eval_ns for test in self.expressions)])


@dataclass(frozen=True, slots=True)
class UnitTestFile:
    """One file; `rule_files` are patterns relative to it."""

    rule_files: tuple[str, ...]
    evaluation_interval_ns: int
    group_order: tuple[str, ...]
    tests: tuple[UnitTest, ...]


def parse_unit_tests(text: str, file: str) -> UnitTestFile:
    """Read a file; `file` is the name that errors show. Raises ConfigError rules.invalid with file and line."""
    reader = _Tests(file)
    root = reader.compose(text)
    if root is None:
        raise reader.invalid(None, "the file is empty")
    return reader.file(root)


def expand_values(text: str) -> tuple[float | None, ...]:
    """The values of "1+2x3 _ stale 5x2": 1 3 5 7, nothing, a stale marker, 5 5 5. Raises ValueError."""
    values: list[float | None] = []
    for item in text.split():
        match = _ITEM_RE.fullmatch(item)
        if match is None:
            raise ValueError(f"{item!r} isn't a value; write them like 1, 1+2x5, 3x4, _, _x3 or stale")
        count = int(match["times"] or match["blanks"] or 0)
        if len(values) + count > SAMPLES_MAX:
            raise ValueError(f"more than {SAMPLES_MAX} samples")
        if match["blank"]:
            values += [None] * (count if match["blanks"] else 1)
        elif match["stale"]:
            values.append(STALE_NAN)
        else:
            value, step = _number(match["start"]), _number(match["step"] or "0")
            for _ in range(count + 1):
                values.append(value)
                value += step
    return tuple(values)


def parse_metric(text: str) -> Labels:
    """The label set of `name{label="value"}`, of either part alone, or of "{}". Raises ValueError."""
    match = _NAME_RE.fullmatch(text)
    if match is None or (match["name"] is None and match["braces"] is None):
        raise ValueError(f'{text!r} isn\'t a series; write it like name{{label="value"}}')
    labels = {NAME_LABEL: match["name"]} if match["name"] else {}
    inside, position = match["inside"] or "", 0
    while inside[position:].strip():
        pair = _PAIR_RE.match(inside, position)
        if pair is None:
            raise ValueError(f"{text!r}: can't read {inside[position:]!r}")
        name = _unquoted(pair["label"]) if pair["label"].startswith('"') else pair["label"]
        if name in labels:
            raise ValueError(f"{text!r}: {name} appears twice")
        labels[name] = _unquoted(pair["value"])
        position = pair.end()
    return canonical(labels)


def _number(text: str) -> float:
    return float(int(text, 16)) if "0x" in text.lower() else float(text)


def _unquoted(token: str) -> str:
    inside = token[1:-1]
    if token[0] == "`":
        return inside
    escapes = {"n": "\n", "t": "\t", "r": "\r"}
    return re.sub(r"\\(.)", lambda match: escapes.get(match[1], match[1]), inside)


class _Tests(YamlReader):
    """Reads the nodes of a unit-test file."""

    def file(self, root: yaml.Node) -> UnitTestFile:
        members = self.mapping(root, _FILE_KEYS, "the file")
        interval_ns = self.duration_ns(members, "evaluation_interval", 60_000_000_000) or 60_000_000_000
        return UnitTestFile(
            rule_files=tuple(self.text(node, "a rule file") for node in self.list_of(members, "rule_files")),
            evaluation_interval_ns=interval_ns,
            group_order=tuple(self.text(node, "a group") for node in self.list_of(members, "group_eval_order")),
            tests=tuple(self.test(node, interval_ns) for node in self.list_of(members, "tests")),
        )

    def list_of(self, members: Mapping[str, yaml.Node], key: str) -> Sequence[yaml.Node]:
        return self.sequence(members[key], key) if key in members and not self.is_null(members[key]) else ()

    def test(self, node: yaml.Node, interval_ns: int) -> UnitTest:
        members = self.mapping(node, _TEST_KEYS, "a test")
        series = tuple(self.series(one) for one in self.list_of(members, "input_series"))
        if sum(len(one.values) for one in series) > SAMPLES_MAX:
            raise self.invalid(node, f"more than {SAMPLES_MAX} samples")
        external = self.texts(members.get("external_labels"), "external_labels")
        return UnitTest(
            name=self.text(members["name"], "name") if "name" in members else "",
            interval_ns=self.duration_ns(members, "interval", interval_ns) or interval_ns,
            series=series,
            alerts=tuple(self.alert(one) for one in self.list_of(members, "alert_rule_test")),
            expressions=tuple(self.expression(one) for one in self.list_of(members, "promql_expr_test")),
            external_labels={name: self.text(value, name) for name, value in external.items()},
            external_url=self.text(members["external_url"], "external_url") if "external_url" in members else "",
        )

    def series(self, node: yaml.Node) -> InputSeries:
        members = self.mapping(node, ("series", "values"), "a series")
        for key in ("series", "values"):
            if key not in members:
                raise self.invalid(node, f"a series has no {key}")
        try:
            return InputSeries(
                parse_metric(self.text(members["series"], "series")), expand_values(self.text(members["values"], "values"))
            )
        except ValueError as error:
            raise self.invalid(node, str(error)) from error

    def alert(self, node: yaml.Node) -> AlertTest:
        members = self.mapping(node, ("eval_time", "alertname", "exp_alerts"), "an alert test")
        expected = []
        for one in self.list_of(members, "exp_alerts"):
            parts = self.mapping(one, ("exp_labels", "exp_annotations"), "an expected alert")
            expected.append((self.strings(parts, "exp_labels"), self.strings(parts, "exp_annotations")))
        return AlertTest(
            eval_ns=self.duration_ns(members, "eval_time", 0),
            alertname=self.required(members, "alertname", node, "an alert test"),
            expected=tuple(expected),
        )

    def strings(self, members: Mapping[str, yaml.Node], key: str) -> Mapping[str, str]:
        if key not in members or self.is_null(members[key]):
            return {}
        return {name: self.text(value, name) for name, value in self.mapping(members[key], None, key).items()}

    def expression(self, node: yaml.Node) -> ExpressionTest:
        members = self.mapping(node, ("expr", "eval_time", "exp_samples"), "an expression test")
        return ExpressionTest(
            eval_ns=self.duration_ns(members, "eval_time", 0),
            expr=self.required(members, "expr", node, "an expression test"),
            expected=tuple(self.sample(one) for one in self.list_of(members, "exp_samples")),
        )

    def sample(self, node: yaml.Node) -> tuple[Labels, float]:
        members = self.mapping(node, ("labels", "value"), "a sample")
        try:
            labels = parse_metric(self.text(members["labels"], "labels")) if "labels" in members else ()
            return labels, self.float_of(members)
        except ValueError as error:
            raise self.invalid(node, str(error)) from error

    def float_of(self, members: Mapping[str, yaml.Node]) -> float:
        text = self.text(members["value"], "value") if "value" in members else "0"
        # YAML's own words for what Go reads into a float64.
        return _number(
            text.replace("_", "").replace(".inf", "inf").replace(".Inf", "inf").replace(".nan", "nan").replace(".NaN", "nan")
        )


def duration_text(span_ns: int) -> str:
    """A span for people: "1h30m", "0s"."""

    def parts() -> Iterator[str]:
        rest_ms = span_ns // 1_000_000
        for unit, size_ms in (("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)):
            count, rest_ms = divmod(rest_ms, size_ms)
            if count:
                yield f"{count}{unit}"

    return "".join(parts()) or "0s"

"""Run promtool's unit tests on our own evaluator: the same parser, engine, recording and state machine as in production.

Every group is evaluated at each `evaluation_interval` from 0 on, in the order of the files or of `group_eval_order`;
what feeds an alert always counts as known, so that the verdict is Prometheus' own.
Source: promtool's behaviour, cmd/promtool/unittest.go; the oracle is tests/peers/test_rules_peer.py.
"""

from __future__ import annotations

import bisect
import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pgherd.alerts.load import parse_rules, read_text
from pgherd.alerts.model import ALERT_NAME_LABEL, Group, Instance, QueryRow, RecordingRule, Rule, State
from pgherd.alerts.recording import Labels, alert_series, canonical, record
from pgherd.alerts.state import Moment, step
from pgherd.alerts.template import Surroundings
from pgherd.alerts.unittests import AlertTest, ExpressionTest, UnitTest, duration_text, parse_unit_tests
from pgherd.collector.alerting.query import promql_query
from pgherd.promql.parse import parse
from pgherd.proto.clock import Clock
from pgherd.proto.errors import ConfigError, PgherdError
from pgherd.proto.samples import STALE_NAN
from pgherd.proto.selectors import NAME_LABEL, Matcher, MatchOp
from pgherd.storage.series.batch import Window
from pgherd.storage.series.patterns import full_matches

_QUERY_TIMEOUT_S = 30.0
_FOREVER_NS = 1 << 62


@dataclass(frozen=True, slots=True)
class Failure:
    """One expectation that didn't hold, or a rule that couldn't be evaluated; `expected` and `got` are for people."""

    test: str
    subject: str  # alertname or expression
    at: str
    message: str
    expected: tuple[str, ...] = ()
    got: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one test file."""

    file: str
    tests: int
    failures: tuple[Failure, ...] = field(default=())


def run_file(path: Path, clock: Clock) -> Verdict:
    """Run all tests of a file. Raises ConfigError rules.invalid | config.unreadable for a file that can't be read."""
    unit = parse_unit_tests(read_text(path), str(path))
    files = [file for pattern in unit.rule_files for file in _resolved(path.parent, pattern)]
    groups = [group for file in files for group in _groups(file)]
    order = {name: index for index, name in enumerate(unit.group_order)}
    groups.sort(key=lambda group: order.get(group.name, 0))  # as promtool: those not named come with the first
    failures: list[Failure] = []
    for number, test in enumerate(unit.tests, 1):
        name = test.name or f"test {number}"
        failures += _Run(name, test, groups, unit.evaluation_interval_ns, clock).failures()
    return Verdict(str(path), len(unit.tests), tuple(failures))


def _resolved(base: Path, pattern: str) -> list[Path]:
    found = sorted(glob.glob(str(base / pattern)))  # noqa: PTH207 - a pattern may be absolute
    if not found:
        raise ConfigError(
            "config.unreadable", f"no rule file matches {base / pattern}", hint="rule_files are relative to the test file"
        )
    return [Path(one) for one in found]


def _groups(file: Path) -> tuple[Group, ...]:
    return parse_rules(read_text(file), str(file), interval_ns=60_000_000_000, check_expression=parse, repeats=True)


class _HeldSeries:
    """Samples in memory, ascending per series: the source that a test's queries read."""

    def __init__(self) -> None:
        self._series: dict[str, dict[Labels, tuple[list[int], list[float]]]] = {}

    def add(self, labels: Labels, at_ms: int, value: float) -> None:
        times, values = self._of(labels)
        if not times or at_ms > times[-1]:
            times.append(at_ms)
            values.append(value)
        elif (found := bisect.bisect_left(times, at_ms)) < len(times) and times[found] != at_ms:
            times.insert(found, at_ms)
            values.insert(found, value)

    def _of(self, labels: Labels) -> tuple[list[int], list[float]]:
        return self._series.setdefault(dict(labels).get(NAME_LABEL, ""), {}).setdefault(labels, ([], []))

    def select(self, matchers: Sequence[Matcher], start_ms: int, end_ms: int) -> Sequence[Window]:
        return list(self._selected(matchers, start_ms, end_ms))

    def _selected(self, matchers: Sequence[Matcher], start_ms: int, end_ms: int) -> Iterator[Window]:
        name = next((m.value for m in matchers if m.name == NAME_LABEL and m.op is MatchOp.EQUAL), None)
        families = self._series.values() if name is None else [self._series.get(name, {})]
        for family in families:
            for labels, (times, values) in family.items():
                low, high = bisect.bisect_left(times, start_ms), bisect.bisect_right(times, end_ms)
                if low < high and all(_matches(matcher, dict(labels)) for matcher in matchers):
                    yield Window(
                        dict(labels), np.array(times[low:high], dtype=np.int64), np.array(values[low:high], dtype=np.float64)
                    )


def _matches(matcher: Matcher, labels: Mapping[str, str]) -> bool:
    value = labels.get(matcher.name, "")
    if matcher.op in (MatchOp.EQUAL, MatchOp.NOT_EQUAL):
        return (value == matcher.value) is (matcher.op is MatchOp.EQUAL)
    return bool(full_matches(matcher.value, [value])[0]) is (matcher.op is MatchOp.REGEX)


class _Run:
    """One test: its series, its rules' states, and what it found wrong."""

    def __init__(self, name: str, test: UnitTest, groups: Sequence[Group], interval_ns: int, clock: Clock) -> None:
        self._name, self._test, self._groups, self._interval_ns = name, test, groups, interval_ns
        self._source = _HeldSeries()
        self._query = promql_query(self._source, clock, timeout_s=_QUERY_TIMEOUT_S)
        self._instances: dict[int, Mapping[str, Instance]] = {}  # by the rule's place
        self._written: dict[int, frozenset[Labels]] = {}
        self._found: list[Failure] = []
        for series in test.series:
            for index, value in enumerate(series.values):
                if value is not None:
                    self._source.add(series.labels, index * test.interval_ns // 1_000_000, value)

    def failures(self) -> list[Failure]:
        """Evaluate from 0 to the last time asked about, then ask the expressions."""
        waiting = sorted(self._test.alerts, key=lambda test: test.eval_ns)
        for now_ns in range(0, self._test.end_ns + 1, self._interval_ns):
            if not self._evaluate(now_ns):
                return self._found
            while waiting and waiting[0].eval_ns < now_ns + self._interval_ns:
                self._check_alerts(waiting.pop(0))
        for test in self._test.expressions:
            self._check_expression(test)
        return self._found

    def _evaluate(self, now_ns: int) -> bool:
        """One slot of every group; False when a rule couldn't be evaluated."""
        moment = Moment(unix_ns=now_ns, gap_max_ns=_FOREVER_NS, elapsed_ns=self._interval_ns)
        healthy = True
        place = 0
        for group in self._groups:
            at_ms = (now_ns - group.query_offset_ns) // 1_000_000
            for rule in group.rules:
                try:
                    self._write(place, self._evaluated(place, rule, group, at_ms, moment), at_ms)
                except PgherdError as error:
                    name = rule.alert if isinstance(rule, Rule) else rule.record
                    self._found.append(Failure(self._name, name, duration_text(now_ns), error.message))
                    healthy = False
                place += 1
        return healthy

    def _evaluated(
        self, place: int, rule: Rule | RecordingRule, group: Group, at_ms: int, moment: Moment
    ) -> Mapping[Labels, float]:
        result = [QueryRow(labels, value) for labels, value in self._query(rule.expr, at_ms)]
        if isinstance(rule, RecordingRule):
            return record(rule, result, limit=group.limit)
        around = Surroundings(
            self._test.external_url,
            self._test.external_labels,
            lambda expr: self._query(expr, moment.unix_ns // 1_000_000),
            moment.unix_ns,
        )
        before = self._instances.get(place, {})
        outcome = step(rule, before, result, moment, lambda _labels: True, limit=group.limit, around=around)
        self._instances[place] = outcome.instances
        return alert_series(outcome.instances.values())

    def _write(self, place: int, series: Mapping[Labels, float], at_ms: int) -> None:
        for labels in self._written.get(place, frozenset()) - series.keys():
            self._source.add(labels, at_ms, STALE_NAN)
        for labels, value in series.items():
            self._source.add(labels, at_ms, value)
        self._written[place] = frozenset(series)

    def _check_alerts(self, test: AlertTest) -> None:
        rules = (rule for group in self._groups for rule in group.rules)
        got = [
            (dict(instance.labels), dict(instance.annotations))
            for place, rule in enumerate(rules)
            if isinstance(rule, Rule) and rule.alert == test.alertname
            for instance in self._instances.get(place, {}).values()
            if instance.state is State.FIRING
        ]
        expected = [({**labels, ALERT_NAME_LABEL: test.alertname}, dict(notes)) for labels, notes in test.expected]
        if _sorted(got) != _sorted(expected):
            self._differs(
                test.alertname, test.eval_ns, [_alert_text(*one) for one in expected], [_alert_text(*one) for one in got]
            )

    def _check_expression(self, test: ExpressionTest) -> None:
        try:
            rows = self._query(test.expr, test.eval_ns // 1_000_000)
        except PgherdError as error:
            self._found.append(Failure(self._name, test.expr, duration_text(test.eval_ns), error.message))
            return
        got = sorted((canonical(labels), value) for labels, value in rows)
        expected = sorted(test.expected)
        if got != expected:
            self._differs(
                test.expr, test.eval_ns, [_sample_text(*one) for one in expected], [_sample_text(*one) for one in got]
            )

    def _differs(self, subject: str, at_ns: int, expected: Sequence[str], got: Sequence[str]) -> None:
        self._found.append(
            Failure(self._name, subject, duration_text(at_ns), "differs", tuple(sorted(expected)), tuple(sorted(got)))
        )


def _sorted(alerts: Sequence[tuple[Mapping[str, str], Mapping[str, str]]]) -> list[Any]:
    return sorted((sorted(labels.items()), sorted(notes.items())) for labels, notes in alerts)


def _alert_text(labels: Mapping[str, str], annotations: Mapping[str, str]) -> str:
    return f"{_labels_text(canonical(labels))} {_labels_text(tuple(sorted(annotations.items())))}"


def _sample_text(labels: Labels, value: float) -> str:
    return f"{_labels_text(labels)} {value!r}"


def _labels_text(labels: Labels) -> str:
    return "{" + ", ".join(f'{name}="{value}"' for name, value in labels) + "}"

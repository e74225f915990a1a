"""`pgherd rules check|test`: verdicts, what is shown, exit statuses; and the notation of promtool's unit tests."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pgherd.alerts.unittests import expand_values, parse_metric, parse_unit_tests
from pgherd.cli.main import pgherd
from pgherd.proto.codes import Exit
from pgherd.proto.errors import ConfigError
from pgherd.proto.samples import STALE_NAN_BITS

CHAIN = Path(__file__).parent.parent / "support" / "rules" / "chain.test.yaml"


def _pgherd(*words: str | Path) -> Result:
    return CliRunner().invoke(pgherd, [str(word) for word in words])


def _changed(directory: Path, old: str, new: str) -> Path:
    """A copy of the chain's test with one change."""
    text = CHAIN.read_text()
    assert old in text
    (directory / "chain.rules.yaml").write_text((CHAIN.parent / "chain.rules.yaml").read_text())
    (directory / "t.yaml").write_text(text.replace(old, new, 1))
    return directory / "t.yaml"


def test_a_test_file_whose_expectations_hold_passes() -> None:
    result = _pgherd("rules", "test", CHAIN)
    assert (result.exit_code, result.output) == (0, f"{CHAIN}: ok, 2 tests\n")


@pytest.mark.parametrize(
    ("old", "new", "shown"),
    [
        ("a is 94% full", "a is 95% full", 'got      {alertname="Full", cluster="m", node="a"'),
        ("eval_time: 6m", "eval_time: 5m", "Full at 5m: differs\n    expected {alertname"),
        ("- {eval_time: 12m, alertname: ClusterFull}", "- {eval_time: 11m, alertname: ClusterFull}", "expected nothing"),
        ("value: 0.92", "value: 0.93", 'got      {__name__="cluster:used:max", cluster="m"} 0.92'),
        ("expr: sum(used) > 1000", "expr: sum(used[1m])", "test 1"),
    ],
)
def test_a_broken_expectation_fails_and_says_what_it_got(tmp_path: Path, old: str, new: str, shown: str) -> None:
    path = _changed(tmp_path, old, new)
    result = _pgherd("rules", "test", path)
    assert result.exit_code == 1
    assert shown in result.output.replace("rises and falls", "test 1")
    told = json.loads(_pgherd("rules", "test", "--json", path, CHAIN).output)
    assert (told["ok"], [one["ok"] for one in told["files"]]) == (False, [False, True])
    assert told["files"][0]["failures"]


def test_check_names_file_and_line_of_every_bad_file(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("groups:\n- name: g\n  rules:\n  - alert: A\n    expr: up ==\n")
    result = _pgherd("rules", "check", CHAIN.parent / "chain.rules.yaml", bad, tmp_path / "none.yaml")
    assert result.exit_code == 1
    assert "chain.rules.yaml: ok, 8 rules in 2 groups" in result.output
    assert f"{bad}:5: alert A:" in result.output
    assert "can't read the rule file" in result.output
    assert json.loads(_pgherd("--json", "rules", "check", bad).output)["ok"] is False


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1+2x3", (1, 3, 5, 7)),
        ("-2-1x2 4", (-2, -3, -4, 4)),
        ("5x2 _ _x2 .5", (5, 5, 5, None, None, None, 0.5)),
        ("1e3+0.5x1 -Inf", (1000, 1000.5, -math.inf)),
        ("", ()),
    ],
)
def test_the_notation_of_values(text: str, values: tuple[float | None, ...]) -> None:
    assert expand_values(text) == values


def test_stale_is_the_marker_and_not_just_any_nan() -> None:
    import numpy as np

    stale, nan = expand_values("stale NaN")
    assert np.array([stale]).view(np.uint64)[0] == STALE_NAN_BITS
    assert np.array([nan]).view(np.uint64)[0] != STALE_NAN_BITS


@pytest.mark.parametrize("text", ["1+", "x3", "1x", "stalex2", "{{schema:0}}", "1x99999999999"])
def test_what_isnt_a_value(text: str) -> None:
    with pytest.raises(ValueError, match=r"isn.t a value|more than"):
        expand_values(text)


def test_series_as_prometheus_writes_them() -> None:
    assert parse_metric('up{b="x\\"y", a=\'1\',}') == (("__name__", "up"), ("a", "1"), ("b", 'x"y'))
    assert parse_metric('{__name__="up"}') == (("__name__", "up"),)
    assert parse_metric("{}") == ()
    for text in ("", "up{a=1}", "up{a}", 'up{a="1",a="2"}', 'up{a=~"x"}'):
        with pytest.raises(ValueError, match=r".+"):
            parse_metric(text)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("rule_file: []", 1),
        ("tests:\n- intervall: 1m", 2),
        ("tests:\n- input_series:\n  - {series: up}", 3),
        ("tests:\n- input_series:\n  - {series: up, values: 1..2}", 3),
        ("tests:\n- alert_rule_test:\n  - eval_time: 1m", 3),
        ("tests:\n- promql_expr_test:\n  - {expr: up, exp_samples: [{labels: 'up{', value: 1}]}", 3),
    ],
)
def test_a_bad_test_file_is_refused_with_its_line(text: str, line: int) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_unit_tests(text, "t.yaml")
    assert caught.value.message.startswith(f"t.yaml:{line}: ")


def test_check_warns_of_series_that_nobody_emits(tmp_path: Path) -> None:
    """Another sender may have them: a warning, and the file is fine."""
    rules = tmp_path / "r.yaml"
    rules.write_text("groups:\n- name: g\n  rules:\n  - alert: A\n    expr: pg_uq == 0\n  - alert: B\n    expr: pg_up == 0\n")
    result = _pgherd("rules", "check", rules)
    assert result.exit_code == 0
    warning = f"{rules}:4: A: no supported version emits pg_uq; did you mean pg_up?"
    assert result.output == f"{rules}: ok, 2 rules in 1 groups\n  warning: {warning}\n"
    assert json.loads(_pgherd("rules", "check", "--json", rules).output)["files"][0]["warnings"] == [warning]
    strict = _pgherd("rules", "check", "--strict", rules)
    assert strict.exit_code == Exit.FAILED
    assert "no supported version emits pg_uq" in strict.output

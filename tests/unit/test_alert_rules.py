"""Rule files: what is read, and what is refused with file and line."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from pgherd.alerts.load import load_rules, parse_duration_ns, parse_rules
from pgherd.alerts.model import Group, RecordingRule
from pgherd.promql.parse import parse
from pgherd.proto.errors import ConfigError

REPOSITORY = Path(__file__).parent.parent.parent


def _parse(text: str) -> tuple[Group, ...]:
    return parse_rules(textwrap.dedent(text), "r.yaml", interval_ns=15_000_000_000, check_expression=parse)


def test_reads_everything_a_group_can_say() -> None:
    (group,) = _parse(
        """
        groups:
          - name: disk
            interval: 1m
            limit: 10
            labels: {team: dba, severity: info}
            rules:
              - alert: Full
                expr: |
                  disk_used / disk_size > 0.9
                for: 1h30m
                keep_firing_for: 250ms
                labels: {severity: page}
                annotations: {summary: "{{ $labels.instance }}"}
        """
    )
    (rule,) = group.alerting
    assert (group.name, group.interval_ns, group.limit, group.source) == ("disk", 60_000_000_000, 10, "r.yaml")
    assert (rule.alert, rule.expr, rule.origin) == ("Full", "disk_used / disk_size > 0.9", "r.yaml:8")
    assert (rule.for_ns, rule.keep_firing_for_ns) == (5_400_000_000_000, 250_000_000)
    assert {name: template.text for name, template in rule.labels.items()} == {"team": "dba", "severity": "page"}
    assert list(rule.annotations) == ["summary"]


def test_reads_recording_rules_with_plain_labels() -> None:
    (group,) = _parse(
        """
        groups:
          - name: g
            query_offset: 30s
            labels: {team: dba}
            rules:
              - record: cluster:x:sum
                expr: sum by (cluster) (x)
                labels: {unit: "{{ not a template }}"}
        """
    )
    assert group.query_offset_ns == 30_000_000_000
    assert group.alerting == ()
    (rule,) = group.rules
    assert isinstance(rule, RecordingRule)
    assert (rule.record, rule.expr, rule.origin) == ("cluster:x:sum", "sum by (cluster) (x)", "r.yaml:7")
    assert rule.labels == {"team": "dba", "unit": "{{ not a template }}"}


def test_keys_without_a_value_and_merged_ones_read_as_in_prometheus() -> None:
    (group,) = _parse(
        """
        groups:
          - name: g
            interval: 0s
            limit:
            rules:
              - &common
                alert: A
                expr: up == 0
                for:
                labels: {severity: page, nobody: null}
                annotations:
              - {<<: *common, alert: B}
        """
    )
    assert group.interval_ns == 15_000_000_000
    assert [(rule.alert, rule.for_ns, rule.annotations) for rule in group.alerting] == [("A", 0, {}), ("B", 0, {})]
    assert [{name: text.text for name, text in rule.labels.items()} for rule in group.alerting] == [
        {"severity": "page", "nobody": ""},
        {"severity": "page", "nobody": ""},
    ]


def test_an_empty_file_holds_no_groups() -> None:
    assert _parse("") == _parse("groups: []") == _parse("# nothing yet") == ()


_RULE = "groups:\n- name: g\n  rules:\n  - alert: A\n    expr: up == 0\n"


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("groups: [", 1, "not YAML"),
        ("- a", 1, "the file must be a mapping"),
        ("groops: []", 1, "unknown key 'groops'"),
        ("groups: {}", 1, "groups must be a list"),
        ("groups:\n- rules: []", 2, "a group has no name"),
        ("groups:\n- name: g\n  intervall: 1m", 3, "unknown key 'intervall'"),
        ("groups:\n- name: g\n  <<: 5", 2, "<< must name a mapping"),
        (_RULE + "---\ngroups: []", 6, "not YAML"),
        ("groups:\n- name: g\n  interval: 1.5m", 3, "not a duration"),
        ("groups:\n- name: g\n  limit: -1", 3, "limit must be a whole number"),
        ("groups:\n- name: g\n  query_offset: soon", 3, "not a duration"),
        ("groups:\n- name: g\n- name: g", None, "group 'g' appears twice"),
        ("groups:\n- name: g\n  rules:\n  - record: a-b\n    expr: up", 4, "can't be a metric's name"),
        ("groups:\n- name: g\n  rules:\n  - record: a\n    alert: A\n    expr: up", 4, "either alert or record"),
        ("groups:\n- name: g\n  rules:\n  - record: a\n    expr: up\n    for: 1m", 6, "for is for alerts"),
        ("groups:\n- name: g\n  rules:\n  - record: a\n    expr: up\n  - record: a\n    expr: up", 6, "record 'a' of group"),
        ("groups:\n- name: g\n  rules:\n  - expr: up", 4, "either alert or record"),
        ("groups:\n- name: g\n  rules:\n  - alert: A", 4, "alert A has no expr"),
        ("groups:\n- name: g\n  rules:\n  - alert: A\n    expr: [up]", 5, "expr must be text"),
        ("groups:\n- name: g\n  rules:\n  - alert: A\n    expr: up ==", 5, "alert A:"),
        (_RULE + "    expr: up", 6, "'expr' appears twice"),
        (_RULE + "    for: 5 minutes", 6, "not a duration"),
        (_RULE + "    fro: 5m", 6, "unknown key 'fro'"),
        (_RULE + "    labels: {alertname: B}", 6, "can't be a name in labels"),
        (_RULE + "    labels: {a-b: B}", 6, "can't be a name in labels"),
        (_RULE + "    annotations:\n      a: x\n      b: '{{ nobody \"up\" }}'", 8, "function nobody isn't defined"),
        (_RULE + "  - alert: A\n    expr: up == 1", 6, "already defined at r.yaml:4"),
    ],
)
def test_refuses_with_file_and_line(text: str, line: int | None, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _parse(text)
    assert caught.value.code == "rules.invalid"
    assert problem in caught.value.message
    assert caught.value.message.startswith("r.yaml:" if line is None else f"r.yaml:{line}: ")


def test_a_typo_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError) as caught:
        _parse(_RULE + "    keep_firing: 5m")
    assert caught.value.hint == "did you mean keep_firing_for?"


def test_the_same_alert_at_two_severities_is_two_rules() -> None:
    (group,) = _parse(_RULE + "    labels: {severity: a}\n  - alert: A\n    expr: up == 0\n    labels: {severity: b}")
    first, second = group.rules
    assert first.id != second.id


def test_a_rules_state_survives_edits_of_anything_but_its_name_and_labels() -> None:
    (before,) = _parse(_RULE)
    (after,) = _parse(_RULE.replace("up == 0", "up < 1") + "    for: 1m\n    annotations: {summary: x}")
    assert before.rules[0].id == after.rules[0].id


def test_one_rule_in_two_files_is_refused(tmp_path: Path) -> None:
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    for file in files:
        file.write_text(_RULE)
    assert load_rules(files[:1], builtin=True, interval_s=15, check_expression=parse)[-1].source == str(files[0])
    with pytest.raises(ConfigError) as caught:
        load_rules(files, builtin=False, interval_s=15, check_expression=parse)
    assert caught.value.message.startswith(f"{files[1]}:4: ")


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_rules([tmp_path / "none.yaml"], builtin=False, interval_s=15, check_expression=parse)
    assert caught.value.code == "config.unreadable"
    (tmp_path / "latin.yaml").write_bytes(b"groups: [] # \xe9")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_rules([tmp_path / "latin.yaml"], builtin=False, interval_s=15, check_expression=parse)


@pytest.mark.parametrize(
    ("text", "expected_s"),
    [("0", 0), ("0s", 0), ("1ms", 0.001), ("90s", 90), ("1h30m", 5400), ("1d", 86_400), ("1w", 604_800), ("1y", 31_536_000)],
)
def test_durations_as_prometheus_writes_them(text: str, expected_s: float) -> None:
    assert parse_duration_ns(text) == int(expected_s * 1e9)


@pytest.mark.parametrize("text", ["", "5", "1.5h", "1m1h", "-1s", "1 h", "1us"])
def test_what_isnt_a_duration(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration_ns(text)

"""The shipped rules as a whole: each has severity, texts, a runbook and a proof, and reads only what somebody emits."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from pgherd.alerts.lint import Emitted, emitted_by_pgherd, lint
from pgherd.alerts.load import builtin_files, load_rules, parse_rules
from pgherd.alerts.model import Group, Rule
from pgherd.collector.alerting.query import metric_names
from pgherd.promql.parse import parse

ROOT = Path(__file__).resolve().parents[2]


def pack() -> tuple[Group, ...]:
    return load_rules([], builtin=True, interval_s=15, check_expression=parse)


RULES: list[Rule] = [rule for group in pack() for rule in group.alerting]


def groups_of(text: str) -> tuple[Group, ...]:
    return parse_rules(text, "r.yaml", interval_ns=15_000_000_000, check_expression=parse)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.alert}-{rule.origin.rpartition(':')[2]}")
def test_a_rule_says_how_bad_it_is_and_what_to_do(rule: Rule) -> None:
    assert rule.labels["severity"].text in ("critical", "warning")
    assert {"summary", "description", "runbook_url"} == rule.annotations.keys()
    page = (ROOT / rule.annotations["runbook_url"].text).read_text()
    assert page.startswith(f"# {rule.alert}\n\n**Fires** ")
    for section in ("## Symptoms", "## Impact", "## First commands", "## Remedy"):
        assert section in page


def test_every_runbook_of_an_alert_belongs_to_a_rule() -> None:
    named = {rule.annotations["runbook_url"].text for rule in RULES}
    pages = {
        str(path.relative_to(ROOT)) for path in (ROOT / "docs" / "runbooks").glob("*.md") if "**Fires**" in path.read_text()
    }
    assert pages == named


def test_every_rule_names_a_proof_that_exists() -> None:
    """A proof is a test of tests/proof, named in a comment above the rule."""
    named: list[str] = []
    for name, text in builtin_files().items():
        blocks = re.findall(r"((?: +#.*\n)*) +- alert: (\w+)\n", text)
        assert blocks, name
        for comments, alert in blocks:
            proofs = re.findall(r"# Proof: (\S+)", comments)
            assert len(proofs) == 1, f"{name}: {alert} names {len(proofs)} proofs"
            named += proofs
    assert len(named) == len(RULES)
    existing = {
        f"{path.relative_to(ROOT)}::{node.name}"
        for path in (ROOT / "tests" / "proof").glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert set(named) <= existing


def test_every_proof_sees_its_rule_fire_and_resolve() -> None:
    """A proof that forgot to look would prove nothing."""
    for text in builtin_files().values():
        for proof, alert in re.findall(r"# Proof: (\S+)\n +- alert: (\w+)\n", text):
            path, _, name = proof.partition("::")
            source = (ROOT / path).read_text()
            (test,) = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == name)
            body = ast.get_source_segment(source, test) or ""
            assert f'fires("{alert}"' in body, proof
            assert f'resolves("{alert}"' in body, proof


def test_the_shipped_rules_read_only_what_is_emitted() -> None:
    findings = lint(pack(), metric_names, emitted_by_pgherd())
    assert [str(finding) for finding in findings if finding.nowhere or not finding.series] == []
    partly = {finding.series for finding in findings}
    assert all(finding.missing <= {13, 14} for finding in findings), f"missing on a tested major: {partly}"


EMITTED = Emitted(frozenset({15, 17}), {"pg_up": frozenset({15, 17}), "old_total": frozenset({15})}, ("pg_settings_",))
HEAD = "groups:\n- name: g\n  rules:\n"


def findings(rules: str) -> list[str]:
    return [str(finding) for finding in lint(groups_of(HEAD + rules), metric_names, EMITTED)]


def test_a_misspelt_series_is_found_with_its_place_and_a_hint() -> None:
    assert findings("  - alert: Down\n    expr: pg_uq == 0") == [
        "r.yaml:4: Down: no supported version emits pg_uq; did you mean pg_up?"
    ]


def test_a_series_that_a_major_took_away_is_found() -> None:
    assert findings("  - alert: Old\n    expr: rate(old_total[5m]) > 1") == [
        "r.yaml:4: Old: old_total isn't emitted by PostgreSQL 17"
    ]


def test_what_exists_is_recorded_or_is_a_setting_passes() -> None:
    rules = """
  - {record: "own:up", expr: "sum(pg_up)"}
  - {alert: A, expr: "own:up < 1 and on () pg_settings_max_connections > 5 unless ALERTS"}
"""
    assert findings(rules) == []


def test_a_selector_without_a_name_is_found() -> None:
    assert findings("  - alert: Any\n    expr: '{node=\"a\"} > 1'") == [
        "r.yaml:4: Any: a selector names no metric, so nobody can tell what it reads"
    ]


def test_breaking_one_name_of_the_pack_fails_the_lint() -> None:
    """The guard bites: without the series that a shipped rule reads, that rule is refused."""
    emitted = emitted_by_pgherd()
    for name in set().union(*(metric_names(rule.expr) for rule in RULES)) & emitted.series.keys():
        if name in ("ALERTS", "ALERTS_FOR_STATE"):
            continue
        without = dataclasses.replace(emitted, series={key: value for key, value in emitted.series.items() if key != name})
        assert any(finding.series == name and finding.nowhere for finding in lint(pack(), metric_names, without)), name

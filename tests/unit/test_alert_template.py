"""Alert templates: expanded as Prometheus does, refused when they load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pgherd.alerts.template import TemplateData, compile_template, expand
from pgherd.proto.errors import ConfigError

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "alert_templates.json").read_text())


def _expanded(text: str, value: float = 1.0, **labels: str) -> str:
    return expand(compile_template(text, where="rules.yaml:1"), TemplateData(labels, value, "http://pgherd"))


@pytest.mark.parametrize("row", GOLDEN["rows"], ids=[row["value"] for row in GOLDEN["rows"]])
def test_expands_as_promtool_does(row: dict[str, object]) -> None:
    """Every function at every size of number, recorded from promtool."""
    expanded = row["expanded"]
    assert isinstance(expanded, dict)
    value = float(str(row["value"]))
    ours = {key: _expanded(GOLDEN["templates"][key], value, **GOLDEN["labels"]) for key in expanded}
    assert ours == expanded


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("{{ .Labels.node }} at {{ .Value }}", "db1 at 0.5"),
        ("{{ $externalURL }}/alerts", "http://pgherd/alerts"),
        ("{{ humanizePercentage ($value) }}", "50%"),
        ('{{ printf "%.1f" ($value) | printf "%s of %s" $labels.node }}', "db1 of 0.5"),
        ('{{ "}}" }}{{ `a\\b` }}', "}}a\\b"),
        ("a {{- /* why */ -}} b", "ab"),
        ("{{ print 1 2 $labels.node 3 }}", "1 2db13"),
        ('{{ stripPort "[::1]:5432" }} {{ stripPort "[::1]" }}', "::1 [::1]"),
    ],
)
def test_forms_of_expressions(text: str, expected: str) -> None:
    assert _expanded(text, 0.5, node="db1") == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{{ if gt $value 1.0 }}x{{ end }}", "if isn't supported"),
        ('{{ range query "up" }}{{ end }}', "range isn't supported"),
        ("{{ $x := 1 }}", "isn't supported"),
        ("{{ $value", "unclosed action"),
        ("{{ }}", "an expression is missing"),
        ("{{ humanise $value }}", "humanise isn't supported"),
        ("{{ humanize }}", "humanize takes 1 argument, not 0"),
        ("{{ humanize $value 2 }}", "humanize takes 1 argument, not 2"),
        ("{{ $value 2 }}", "$value isn't a function"),
        ("{{ 1 | $value }}", "$value isn't a function"),
        ("{{ humanize ($value }}", "closing parenthesis"),
        ("{{ $value ) }}", "unexpected ')'"),
        ("{{ humanize humanize $value }}", "parentheses"),
        ('{{ printf "%d" $value }}', "needs an integer"),
        ('{{ printf "%s" $value }}', "needs text"),
        ('{{ printf "%.1f" $labels.node }}', "needs a float"),
        ('{{ printf "%.1f" }}', "no argument"),
        ('{{ printf "x" $value }}', "more arguments"),
        ('{{ printf "%x" 3 }}', "isn't supported"),
        ("{{ printf 3 }}", "must be text"),
        ('{{ "\\q" }}', "escape"),
        ("{{ $externalLabels.region }}", "external labels"),
        ("{{ $labels }}", "isn't supported"),
    ],
)
def test_anything_else_is_refused_when_loading(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compile_template(text, where="rules.yaml:7")
    assert caught.value.code == "rules.invalid"
    assert caught.value.message.startswith("rules.yaml:7: ")
    assert problem in caught.value.message


def test_bad_data_is_named_in_the_text_and_loses_no_page() -> None:
    assert _expanded("{{ humanize $labels.size }}", size="big") == "<error expanding template: 'big' isn't a number>"
    assert _expanded("{{ humanize $labels.size }}", size="2048") == "2.048k"

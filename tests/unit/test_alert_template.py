"""Alert templates: expanded as Prometheus does, refused when they load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pgherd.alerts.template import Surroundings, TemplateData, compile_template, expand
from pgherd.proto.errors import ConfigError, PreconditionError

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "alert_templates.json").read_text())


SERIES = {
    "up": [({"__name__": "up", "node": "b"}, 1.0), ({"__name__": "up", "node": "a"}, 0.0)],
    "nothing": [],
}


def _query(expr: str) -> list[tuple[dict[str, str], float]]:
    if expr not in SERIES:
        raise PreconditionError("promql.execution", "no such series")
    return SERIES[expr]


AROUND = Surroundings("http://pgherd:80/path", {"region": "north"}, _query, 1_700_000_000_000_000_000)


def _expanded(text: str, value: float = 1.0, **labels: str) -> str:
    return expand(compile_template(text, where="rules.yaml:1"), TemplateData(labels, value, AROUND))


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
        ("{{ $externalURL }}/alerts", "http://pgherd:80/path/alerts"),
        (
            "{{ externalURL }} {{ pathPrefix }} {{ $externalLabels.region }}{{ .ExternalLabels.no }}",
            "http://pgherd:80/path /path north",
        ),
        ("{{ if gt $value 0.9 }}big{{ else if gt $value 0.4 }}half{{ else }}small{{ end }}", "half"),
        ('{{ with query "up" }}{{ . | first | value }} {{ first . | label "node" }}{{ end }}', "1 b"),
        ('{{ with query "nothing" }}x{{ else }}none{{ end }}', "none"),
        (
            '{{ range $i, $s := query "up" | sortByLabel "node" }}{{ $i }}{{ $s.Labels.node }}={{ .Value }};{{ end }}',
            "0a=0;1b=1;",
        ),
        ('{{ range query "nothing" }}x{{ else }}empty{{ end }}', "empty"),
        ('{{ range query "up" }}{{ if eq .Labels.node "a" }}{{ continue }}{{ end }}{{ .Labels.node }}{{ end }}', "b"),
        ('{{ range query "up" }}{{ .Labels.node }}{{ break }}{{ end }}', "b"),
        ('{{ $n := 0 }}{{ range query "up" }}{{ $n = len .Labels.node }}{{ end }}{{ $n }}', "1"),
        (
            '{{ define "t" }}<{{ .arg0 }}{{ .arg1 }}>{{ end }}{{ template "t" (args 1 "x") }}{{ tmpl "t" (args 2 3) }}',
            "<1x><23>",
        ),
        ('{{ match "d.1" $labels.node }} {{ reReplaceAll "(d)b(.*)" "$2-${1}x" $labels.node }}', "true 1-dx"),
        ("{{ and 1 0 }} {{ or 0 2 }} {{ not 1 }} {{ if and true (ne $labels.node `x`) }}y{{ end }}", "0 2 false y"),
        ('{{ index $labels "node" }} {{ slice $labels.node 0 2 }} {{ len $labels }} {{ $labels }}', "db1 db 1 map[node:db1]"),
        ("{{ toTime 1700000000 }}|{{ (toTime 1700000000).Year }}", "2023-11-14 22:13:20 +0000 UTC|2023"),
        ('{{ (1700000000 | toTime).Format "2006-01-02 15:04" }}', "2023-11-14 22:13"),
        ("{{ humanizeTimestamp 1435065584.128 }}", "2015-06-23 13:19:44.128 +0000 UTC"),
        ('{{ parseDuration "1h30m" }} {{ toDuration 90 }} {{ now }}', "5400 1m30s 1.7e+09"),
        ('{{ graphLink "a b" }} {{ tableLink "up" }}', "/graph?g0.expr=a+b&g0.tab=0 /graph?g0.expr=up&g0.tab=1"),
        ('{{ urlQueryEscape "a b&c" }} {{ urlquery "a/b" }} {{ html "<a>" }}', "a+b%26c a%2Fb &lt;a&gt;"),
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
        ("{{ if gt $value 1.0 }}x", "if without end"),
        ("{{ if $value }}x{{ else }}y{{ else }}z{{ end }}", "if without end"),
        ("{{ end }}", "unexpected {{end}}"),
        ("{{ else }}", "unexpected {{else}}"),
        ("{{ range . }}{{ else if true }}{{ end }}", "unexpected {{else if true}}"),
        ("{{ break }}", "outside range"),
        ("{{ $x }}", "undefined variable $x"),
        ("{{ $x = 1 }}", "undefined variable $x"),
        ("{{ if true }}{{ $x := 1 }}{{ end }}{{ $x }}", "undefined variable $x"),
        ("{{ $value", "unclosed action"),
        ("{{/* $value", "unclosed comment"),
        ("{{ }}", "an expression is missing"),
        ("{{ humanise $value }}", "function humanise isn't defined"),
        ("{{ humanize }}", "humanize takes 1 argument, not 0"),
        ("{{ humanize $value 2 }}", "humanize takes 1 argument, not 2"),
        ("{{ $value 2 }}", "$value isn't a function"),
        ("{{ 1 | $value }}", "$value isn't a function"),
        ("{{ humanize ($value }}", "closing parenthesis"),
        ("{{ $value ) }}", "unexpected ')'"),
        ("{{ humanize humanize $value }}", "humanize takes 1 argument, not 2"),
        ("{{ printf humanize }}", "humanize takes 1 argument, not 0"),
        ('{{ printf "%d" $value }}', "%!d(float64=1.5)"),
        ('{{ printf "%s" $value }}', "%!s(float64=1.5)"),
        ('{{ printf "%.1f" $labels.node }}', "%!f(string=1)"),
        ('{{ printf "%.1f" }}', "MISSING"),
        ('{{ printf "x" $value }}', "EXTRA"),
        ("{{ if gt $value 90 }}x{{ end }}", "write 90.0"),
        ('{{ "\\q" }}', "escape"),
        ("{{ template 1 }}", "needs a name in quotes"),
        ("{{ ! }}", "unexpected '!'"),
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
    assert "no elements" in _expanded('{{ query "nothing" | first }}')
    assert "no such series" in _expanded('{{ query "x" }}')
    assert "without end" in _expanded('{{ define "t" }}{{ template "t" . }}{{ end }}{{ template "t" . }}')
    assert "isn't a regular expression" in _expanded('{{ match "(" "x" }}')
    assert _expanded('{{ if eq $labels.big "y" }}{{ printf "%d" $value }}{{ end }}', big="y") == "%!d(float64=1)"

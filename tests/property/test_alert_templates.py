"""Whatever stands in a rule file or a label: a template is refused by name or gives a text, in bounded time and size."""

from __future__ import annotations

import contextlib

from hypothesis import given, settings
from hypothesis import strategies as st

from pgherd.alerts.gotemplate.functions import FUNCTIONS
from pgherd.alerts.load import parse_rules
from pgherd.alerts.template import Surroundings, TemplateData, compile_template, expand
from pgherd.alerts.unittests import expand_values, parse_metric, parse_unit_tests
from pgherd.promql.parse import parse
from pgherd.proto.errors import ConfigError, PreconditionError

WORDS = st.sampled_from(
    ["{{", "}}", "{{-", "-}}", "if", "else", "end", "range", "with", "define", "template", "block", "break", "$labels", ".", "$value",
     "$x", ":=", "=", "|", "(", ")", ",", '"a"', "`b`", "'c'", "1", "-2.5", "0x1f", "nil", "true", ".node", "query", "first", "value",
     "label", "printf", '"%d %s"', '"%99999999d"', '"%c"', "humanize", "humanizeTimestamp", "toTime", "parseDuration", "match", '"(a+)+$"',
     "reReplaceAll", "index", "slice", "len", "args", "tmpl", '"t"', "eq", "lt", "and", "or", "not", "/*", "*/", " ", "\n", "9999999999999",
     "toDuration", "sortByLabel", "strvalue", "html", "urlquery", "print", ".Labels", ".Format", '"\\U99999999"']
)  # fmt: skip
TEXTS = st.one_of(st.lists(WORDS, max_size=25).map(" ".join), st.lists(WORDS, max_size=25).map("".join), st.text(max_size=60))
ACTIONS = st.lists(WORDS.filter(lambda word: "{{" not in word and "}}" not in word), min_size=1, max_size=8).map(
    lambda words: "{{ " + " ".join(words) + " }}"
)
OPERANDS = st.sampled_from(
    ['"a"', '"%c"', '"%d %5.1f"', '"("', '"\U0010ffff"', "1", "-1", "99999999999", "0.5", "-1e300", "nil", "true", "$value", "$labels", ".", "(query `a`)",
     "(query `a` | first)", "(args 1 `b`)", "(toTime 1)", "(toDuration 1.5)", "$labels.node", '""', "`1h`", "(slice `abc` 1)"]
)  # fmt: skip
# Any function with any operands, as many as it takes: wrong kinds above all.
CALLS = st.sampled_from(sorted(FUNCTIONS)).flatmap(
    lambda name: st.lists(OPERANDS, min_size=FUNCTIONS[name].arity[0], max_size=min(4, FUNCTIONS[name].arity[1])).map(
        lambda operands: f"{{{{ if $labels.node }}}}{{{{ {name} {' '.join(operands)} }}}}{{{{ end }}}}"
    )
)
VALUES = st.floats() | st.sampled_from([0.0, 1e308, 2.5e-324])


@settings(max_examples=600, deadline=None)
@given(TEXTS | ACTIONS | CALLS, st.text(max_size=20), VALUES)
def test_any_text_is_refused_or_expanded(text: str, node: str, value: float) -> None:
    def query(expr: str) -> list[tuple[dict[str, str], float]]:
        if expr == "b":
            raise PreconditionError("promql.execution", "no")
        return [({"node": node}, value)]

    with contextlib.suppress(ConfigError):
        template = compile_template(text, where="t")
        expanded = expand(template, TemplateData({"node": node}, value, Surroundings("http://x", {}, query, 1)))
        assert len(expanded) <= 300_000


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="0123456789+-x_. staleNIf", max_size=30), st.text(alphabet='up{}=",ab\\ `', max_size=20))
def test_any_notation_is_refused_or_read(values: str, series: str) -> None:
    with contextlib.suppress(ValueError):
        expand_values(values[:12])
    with contextlib.suppress(ValueError):
        parse_metric(series)


_YAML = st.lists(
    st.sampled_from(["groups:", "\n", "- ", "  ", "name: g", "rules:", "alert: A", "record: a", "expr: up", "for: 1m", "labels: {a: b}",
                     "<<: *x", "&x", "tests:", "input_series:", "values: 1x3", "series: up", "[", "]", "{", "}", ":", "null", "!!int 5"]),
    max_size=25,
).map("".join)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(_YAML)
def test_any_file_is_refused_or_read(text: str) -> None:
    with contextlib.suppress(ConfigError):
        parse_rules(text, "r.yaml", interval_ns=1, check_expression=parse)
    with contextlib.suppress(ConfigError):
        parse_unit_tests(text, "t.yaml")

"""Templates of alert labels and annotations: Go's text/template with Prometheus' functions, judged when the rules load.

    {{ $labels.instance }}  {{ $value | humanize }}  {{ printf "%.1f" $value }}  {{ $externalLabels.region }}  {{ $externalURL }}
    {{ if gt $value 0.9 }}…{{ else }}…{{ end }}   {{ with query "up" }}{{ . | first | value }}{{ end }}
    {{ range query "…" | sortByLabel "node" }}{{ .Labels.node }}: {{ .Value }}{{ end }}

`compile_template` raises rules.invalid for anything that can never be right: an unknown function or variable, a wrong
number of arguments, printf verbs that don't fit. It also expands the template once on sample data: a mistake is found by
`check`, not at 3 a.m. What can only go wrong on real data (humanize of a label that isn't a number, an empty query) shows
as "<error expanding template: …>" in the text, as in Prometheus: a broken annotation must not lose a page.
Source: Prometheus template/template.go (functions, `missingkey=zero`); rules/alerting.go (variables).
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pgherd.alerts.gotemplate.functions import FUNCTIONS
from pgherd.alerts.gotemplate.run import run
from pgherd.alerts.gotemplate.syntax import Arity, TemplateError, Tree, parse
from pgherd.proto.errors import ConfigError, PgherdError

# The vector of an expression at the time of the evaluation; raises PgherdError.
TemplateQuery = Callable[[str], Sequence[tuple[Mapping[str, str], float]]]

_VARIABLES = ("$labels", "$externalLabels", "$externalURL", "$value")
_SURROUNDING: Mapping[str, Arity] = {
    "query": (1, 1),
    "externalURL": (0, 0),
    "pathPrefix": (0, 0),
    "now": (0, 0),
    "tmpl": (2, 2),
}
_SUPPORTED = (
    "Prometheus' template reference lists the functions; variables are $labels, $value, $externalLabels and $externalURL"
)


def _no_query(_expr: str) -> Sequence[tuple[Mapping[str, str], float]]:
    return ()


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What templates may know beside their row: where the collector is reached, its labels, the time, and a query function."""

    external_url: str = ""
    external_labels: Mapping[str, str] = field(default_factory=dict)
    query: TemplateQuery = _no_query
    unix_ns: int = 0


NOWHERE = Surroundings()


@dataclass(frozen=True, slots=True)
class TemplateData:
    """What a template speaks of: the row's labels (with `__name__`, as Prometheus) and its value."""

    labels: Mapping[str, str]
    value: float
    around: Surroundings = NOWHERE


@dataclass(frozen=True, slots=True)
class Template:
    """A compiled text; `text` is how it was written."""

    text: str
    _tree: Tree


def compile_template(text: str, *, where: str) -> Template:
    """Compile and try out `text`. Raises ConfigError rules.invalid, its message starting with `where`."""
    try:
        template = Template(text, parse(text, _arity, _VARIABLES))
    except TemplateError as problem:
        raise _invalid(text, where, str(problem)) from problem
    try:
        # Labels read "1" in the trial: what is fit for a number can only be told from real data.
        trial = _expand(template, TemplateData(_AnyLabel(), 1.5, Surroundings("http://trial.invalid", _AnyLabel())))
    except TemplateError as problem:
        if "incompatible types" in str(problem):
            raise _invalid(text, where, f"{problem}; write 90.0 to compare a value with 90") from problem
        return template  # it depends on data that the trial doesn't have
    if "%!" in trial and "%!" not in text:
        raise _invalid(text, where, f"a printf verb doesn't fit its argument: {trial!r}")
    return template


def expand(template: Template, data: TemplateData) -> str:
    """The text for one alert. Never raises for data: the problem is named inside the text."""
    try:
        return _expand(template, data)
    except TemplateError as problem:
        return f"<error expanding template: {problem}>"


def _invalid(text: str, where: str, problem: str) -> ConfigError:
    return ConfigError("rules.invalid", f"{where}: template {text!r}: {problem}", hint=_SUPPORTED, where=where)


def _arity(name: str) -> Arity | None:
    return FUNCTIONS[name].arity if name in FUNCTIONS else _SURROUNDING.get(name)


def _expand(template: Template, data: TemplateData) -> str:
    if "{{" not in template.text:
        return template.text
    around = data.around
    root = {
        "Labels": data.labels,
        "ExternalLabels": around.external_labels,
        "ExternalURL": around.external_url,
        "Value": data.value,
    }
    functions: dict[str, Callable[..., Any]] = {name: function.call for name, function in FUNCTIONS.items()}
    functions["query"] = lambda expr: _queried(around.query, str(expr))
    functions["externalURL"] = lambda: around.external_url
    functions["pathPrefix"] = lambda: urllib.parse.urlsplit(around.external_url).path
    functions["now"] = lambda: around.unix_ns / 1e9
    variables = dict(zip(_VARIABLES, (root["Labels"], root["ExternalLabels"], root["ExternalURL"], root["Value"]), strict=True))
    return run(template._tree, root, functions, variables)


def _queried(query: TemplateQuery, expr: str) -> list[dict[str, Any]]:
    try:
        return [{"Labels": dict(labels), "Value": value} for labels, value in query(expr)]
    except PgherdError as error:
        raise TemplateError(f"query {expr!r}: {error.message}") from error


class _AnyLabel(Mapping[str, str]):
    """Every label there could be, reading "1"."""

    def __getitem__(self, name: str) -> str:
        return "1"

    def get(self, name: str, default: Any = None) -> Any:
        return "1"

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(())

    def __len__(self) -> int:
        return 1

"""The functions of templates: Go's built-in ones and Prometheus' own.

Those that need a surrounding (query, externalURL, tmpl …) are bound in template.py.
Source: Go documentation, text/template, Functions; Prometheus template/template.go and its documentation.
"""

from __future__ import annotations

import html
import math
import re
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pgherd.alerts.gotemplate.gofmt import GoDuration, GoTime, go_float, sprint, sprintf, text_of
from pgherd.alerts.gotemplate.syntax import Arity, TemplateError

_DURATION_RE = re.compile("".join(rf"(?:([0-9]+){unit})?" for unit in ("y", "w", "d", "h", "m", "s", "ms")))
_DURATION_UNITS_S = (365 * 86_400.0, 7 * 86_400.0, 86_400.0, 3_600.0, 60.0, 1.0, 0.001)


@dataclass(frozen=True, slots=True)
class TemplateFunction:
    """A function with the fewest and most arguments that it takes."""

    arity: Arity
    call: Callable[..., Any]


class Arguments(dict[str, Any]):
    """What `args` makes: arg0, arg1 … A missing one has no value, unlike a missing label, which is empty."""


def is_true(value: object) -> bool:
    """Go's truth: not false, 0, nil, nor empty."""
    if isinstance(value, float | int | str | Mapping | Sequence):
        return bool(value)
    return value is not None


def number(value: object) -> float:
    """What Prometheus' functions accept as a number. Raises TemplateError."""
    match value:
        case bool() | None:
            pass
        case float() | int():
            return float(value)
        case GoDuration():
            return value.ns / 1e9
        case str():
            try:
                return float(value)
            except ValueError:
                raise TemplateError(f"{value!r} isn't a number") from None
    raise TemplateError(f"{text_of(value)} isn't a number")


# --- Go's own -----------------------------------------------------------------------------------


def _kind(value: object) -> str:
    match value:
        case bool():
            return "bool"
        case int():
            return "int"
        case float():
            return "float"
        case str():
            return "string"
    raise TemplateError("invalid type for comparison")


def _equal(first: object, *others: object) -> bool:
    for other in others:
        if first is None or other is None:
            if first is other:
                return True
            continue
        if _kind(first) != _kind(other):
            raise TemplateError(f"incompatible types for comparison: {_kind(first)} and {_kind(other)}")
        if first == other:
            return True
    return False


def _less(first: Any, second: Any) -> bool:
    if _kind(first) != _kind(second) or isinstance(first, bool):
        raise TemplateError(f"incompatible types for comparison: {_kind(first)} and {_kind(second)}")
    return bool(first < second)


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        if isinstance(value, Mapping):
            value = value.get(key, "")
        elif isinstance(value, Sequence) and isinstance(key, int) and 0 <= key < len(value):
            value = value[key]
        else:
            raise TemplateError(f"can't index {text_of(value)} by {text_of(key)}")
    return value


def _slice(value: Any, *bounds: Any) -> Any:
    if not isinstance(value, str | list) or len(bounds) > 2 or not all(isinstance(bound, int) for bound in bounds):
        raise TemplateError("slice takes text or a list and at most two indexes")
    low, high = (bounds[0] if bounds else 0), (bounds[1] if len(bounds) > 1 else len(value))
    if not 0 <= low <= high <= len(value):
        raise TemplateError(f"slice bounds {low}:{high} out of range")
    return value[low:high]


def _length(value: object) -> int:
    if isinstance(value, str):
        return len(value.encode())
    if isinstance(value, Mapping | Sequence):
        return len(value)
    raise TemplateError(f"len of {text_of(value)}")


def _printf(form: object, *arguments: object) -> str:
    if not isinstance(form, str):
        raise TemplateError("printf's first argument must be text")
    return sprintf(form, *arguments)


# --- Prometheus' --------------------------------------------------------------------------------


def _scaled(value: float, prefixes: str | Sequence[str], step: float) -> str:
    prefix = ""
    for candidate in prefixes:
        if abs(value) < step:
            break
        prefix = candidate
        value /= step
    return f"{go_float(value, 4)}{prefix}"


def _small(value: float, suffix: str = "") -> str:
    prefix = ""
    for candidate in "munpfazy":
        if abs(value) >= 1:
            break
        prefix = candidate
        value *= 1000
    return f"{go_float(value, 4)}{prefix}{suffix}"


def _humanize(value: object) -> str:
    found = number(value)
    if found == 0 or not math.isfinite(found):
        return go_float(found, 4)
    return _scaled(found, "kMGTPEZY", 1000) if abs(found) >= 1 else _small(found)


def _humanize1024(value: object) -> str:
    found = number(value)
    if abs(found) <= 1 or not math.isfinite(found):
        return go_float(found, 4)
    return _scaled(found, ("ki", "Mi", "Gi", "Ti", "Pi", "Ei", "Zi", "Yi"), 1024)


def _humanize_percentage(value: object) -> str:
    return f"{go_float(number(value) * 100, 4)}%"


def _humanize_duration(value: object) -> str:
    found = number(value)
    if not math.isfinite(found):
        return go_float(found, 4)
    if found == 0:
        return "0s"
    if abs(found) < 1:
        return _small(found, "s")
    sign, found = ("-", -found) if found < 0 else ("", found)
    minutes, seconds = divmod(int(found), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{sign}{days}d {hours}h {minutes}m {seconds}s"
    if hours:
        return f"{sign}{hours}h {minutes}m {seconds}s"
    if minutes:
        return f"{sign}{minutes}m {seconds}s"
    return f"{sign}{go_float(found, 4)}s"


def _time(value: object) -> GoTime:
    found = number(value)
    if not math.isfinite(found) or not -62135596800 <= found <= 253402300799:
        raise TemplateError(f"{go_float(found)} can't be a time")
    return GoTime(math.trunc(found * 1e9) // 1_000_000)


def _humanize_timestamp(value: object) -> str:
    found = number(value)
    return str(_time(found)) if math.isfinite(found) else go_float(found, 4)


def _parse_duration(value: object) -> float:
    match = _DURATION_RE.fullmatch(str(value)) if value != "0" else None
    if value != "0" and (match is None or not any(match.groups())):
        raise TemplateError(f"not a duration: {text_of(value)!r}")
    counts = match.groups() if match is not None else ()
    return sum((int(count or 0) * unit for count, unit in zip(counts, _DURATION_UNITS_S, strict=False)), 0.0)


def _regex(pattern: object) -> re.Pattern[str]:
    try:
        return re.compile(str(pattern))
    except re.error as error:
        raise TemplateError(f"{pattern!r} isn't a regular expression: {error}") from None


def _replace_all(pattern: object, replacement: object, text: object) -> str:
    compiled = _regex(pattern)

    def expanded(match: re.Match[str]) -> str:
        def group(reference: re.Match[str]) -> str:
            if reference[1] is not None:
                return "$"
            name = reference[2] or reference[3]
            try:
                return match[int(name) if name.isdecimal() else name] or ""
            except IndexError:
                return ""

        return re.sub(r"\$(?:(\$)|\{(\w+)\}|(\w+))", group, str(replacement))

    return compiled.sub(expanded, str(text))


def _first(vector: Any) -> Any:
    if not isinstance(vector, Sequence) or isinstance(vector, str):
        raise TemplateError("first takes a query's result")
    if not vector:
        raise TemplateError("first() called on vector with no elements")
    return vector[0]


def _sample_part(sample: Any, part: str) -> Any:
    if not isinstance(sample, Mapping) or part not in sample:
        raise TemplateError("not a sample of a query's result")
    return sample[part]


def _labels(sample: Any) -> Mapping[str, str]:
    labels = _sample_part(sample, "Labels")
    if not isinstance(labels, Mapping):
        raise TemplateError("not a sample of a query's result")
    return labels


def _sort_by_label(label: Any, vector: Any) -> Any:
    if not isinstance(vector, Sequence) or isinstance(vector, str):
        raise TemplateError("sortByLabel takes a query's result")
    return sorted(vector, key=lambda sample: _labels(sample).get(label, ""))


def _strip_port(value: object) -> str:
    """Without ":port", and without the brackets of an IPv6 address, as Go's net.SplitHostPort."""
    match = re.fullmatch(r"\[([^\]]*)\]:\d*|([^:\[\]]*):\d*", str(value))
    return str(value) if match is None else (match[1] if match[1] is not None else match[2])


def _strip_domain(value: object) -> str:
    host, colon, port = str(value).partition(":")
    return host.partition(".")[0] + colon + port


def _title(value: object) -> str:
    return re.sub(r"(?<![\w'])\w", lambda match: match[0].upper(), str(value))


def _graph_link(expr: object, tab: int) -> str:
    return f"/graph?g0.expr={urllib.parse.quote_plus(str(expr))}&g0.tab={tab}"


_MANY = 64

FUNCTIONS: Mapping[str, TemplateFunction] = {
    # `and` and `or` are evaluated lazily by the evaluator.
    "and": TemplateFunction((1, _MANY), lambda *values: next((one for one in values if not is_true(one)), values[-1])),
    "or": TemplateFunction((1, _MANY), lambda *values: next((one for one in values if is_true(one)), values[-1])),
    "not": TemplateFunction((1, 1), lambda value: not is_true(value)),
    "len": TemplateFunction((1, 1), _length),
    "index": TemplateFunction((1, _MANY), _index),
    "slice": TemplateFunction((1, 3), _slice),
    "print": TemplateFunction((0, _MANY), sprint),
    "printf": TemplateFunction((1, _MANY), _printf),
    "println": TemplateFunction((0, _MANY), lambda *values: " ".join(map(text_of, values)) + "\n"),
    "html": TemplateFunction(
        (1, _MANY), lambda *values: html.escape(sprint(*values)).replace("&#x27;", "&#39;").replace("&quot;", "&#34;")
    ),
    "urlquery": TemplateFunction((1, _MANY), lambda *values: urllib.parse.quote_plus(sprint(*values))),
    "eq": TemplateFunction((2, _MANY), _equal),
    "ne": TemplateFunction((2, 2), lambda first, second: not _equal(first, second)),
    "lt": TemplateFunction((2, 2), _less),
    "le": TemplateFunction((2, 2), lambda first, second: _less(first, second) or _equal(first, second)),
    "gt": TemplateFunction((2, 2), lambda first, second: not (_less(first, second) or _equal(first, second))),
    "ge": TemplateFunction((2, 2), lambda first, second: not _less(first, second)),
    "humanize": TemplateFunction((1, 1), _humanize),
    "humanize1024": TemplateFunction((1, 1), _humanize1024),
    "humanizeDuration": TemplateFunction((1, 1), _humanize_duration),
    "humanizePercentage": TemplateFunction((1, 1), _humanize_percentage),
    "humanizeTimestamp": TemplateFunction((1, 1), _humanize_timestamp),
    "toTime": TemplateFunction((1, 1), _time),
    "toDuration": TemplateFunction((1, 1), lambda value: GoDuration(round(number(value) * 1e9))),
    "parseDuration": TemplateFunction((1, 1), _parse_duration),
    "title": TemplateFunction((1, 1), _title),
    "toUpper": TemplateFunction((1, 1), lambda value: str(value).upper()),
    "toLower": TemplateFunction((1, 1), lambda value: str(value).lower()),
    "match": TemplateFunction((2, 2), lambda pattern, text: _regex(pattern).search(str(text)) is not None),
    "reReplaceAll": TemplateFunction((3, 3), _replace_all),
    "stripPort": TemplateFunction((1, 1), _strip_port),
    "stripDomain": TemplateFunction((1, 1), _strip_domain),
    "graphLink": TemplateFunction((1, 1), lambda expr: _graph_link(expr, 0)),
    "tableLink": TemplateFunction((1, 1), lambda expr: _graph_link(expr, 1)),
    "urlQueryEscape": TemplateFunction((1, 1), lambda value: urllib.parse.quote_plus(str(value))),
    "safeHtml": TemplateFunction((1, 1), lambda value: value),
    "args": TemplateFunction(
        (0, _MANY), lambda *values: Arguments({f"arg{index}": value for index, value in enumerate(values)})
    ),
    "first": TemplateFunction((1, 1), _first),
    "label": TemplateFunction((2, 2), lambda label, sample: _labels(sample).get(label, "")),
    "value": TemplateFunction((1, 1), lambda sample: _sample_part(sample, "Value")),
    "strvalue": TemplateFunction((1, 1), lambda sample: _labels(sample).get("__value__", "")),
    "sortByLabel": TemplateFunction((2, 2), _sort_by_label),
}

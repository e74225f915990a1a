"""The part of Go's text/template that alert labels and annotations use, judged when the rules load.

    {{ $labels.instance }}   {{ .Labels.instance }}   {{ $value }}   {{ .Value }}   {{ $externalURL }}
    {{ $value | humanize }}  {{ printf "%.1f %s" $value $labels.node }}  {{ humanizePercentage ($value) }}
    humanize humanize1024 humanizeDuration humanizePercentage printf print title toUpper toLower
    stripPort stripDomain; pipelines, parentheses, {{- trimming -}}, {{/* comments */}}

Anything else (if, range, query, variables of one's own) raises rules.invalid from `compile_template`, which
also expands the template once on sample data: a mistake is found by `check`, not at 3 a.m. What can only
go wrong on real data (humanize of a label that isn't a number) shows as "<error expanding template: …>"
in the text, as in Prometheus: a broken annotation must not lose a page.
Source: Go text/template and fmt; Prometheus template/template.go for the functions' output.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pgherd.proto.errors import ConfigError

_Value = str | float | int
_SUPPORTED = "supported are $labels.x, $value, $externalURL, printf, print, humanize, humanize1024, humanizeDuration, humanizePercentage, title, toUpper, toLower, stripPort, stripDomain and pipelines"

_TOKEN_RE = re.compile(
    r"""(?P<space>\s+)
      | (?P<string>"(?:[^"\\\n]|\\.)*"|`[^`]*`)
      | (?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)
      | (?P<field>(?:\$labels|\.Labels|\$externalLabels|\.ExternalLabels)\.[A-Za-z_]\w*)
      | (?P<name>\$\w+|\.\w+|[A-Za-z_]\w*)
      | (?P<sign>[()|])""",
    re.VERBOSE,
)
_VERB_RE = re.compile(r"%(?P<flags>[-+ 0#]*)(?P<width>\d*)(?P<precision>\.\d*)?(?P<verb>.)", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\", "'": "'"}


class _TemplateError(ValueError):
    """Why a text isn't a template we expand; rendered by the two callers that have a place to say it."""


@dataclass(frozen=True, slots=True)
class TemplateData:
    """What a template may speak of: the row's labels (without `__name__`) and its value."""

    labels: Mapping[str, str]
    value: float
    external_url: str = ""


@dataclass(frozen=True, slots=True)
class _Literal:
    value: _Value


@dataclass(frozen=True, slots=True)
class _Label:
    name: str


@dataclass(frozen=True, slots=True)
class _Datum:
    name: str  # "value" or "externalURL"


@dataclass(frozen=True, slots=True)
class _Call:
    function: str
    arguments: tuple[_Node, ...]


_Node = _Literal | _Label | _Datum | _Call


@dataclass(frozen=True, slots=True)
class Template:
    """A compiled text; `text` is how it was written."""

    text: str
    _parts: tuple[str | _Node, ...]


def compile_template(text: str, *, where: str) -> Template:
    """Compile and try out `text`. Raises ConfigError rules.invalid, its message starting with `where`."""
    try:
        template = Template(text, tuple(_parse(text)))
        # Labels read "1" in the trial: what is fit for a number can only be told from real data.
        _expand(template, TemplateData(_AnyLabel(), 1.5, "http://trial.invalid"))
    except _TemplateError as problem:
        raise ConfigError("rules.invalid", f"{where}: template {text!r}: {problem}", hint=_SUPPORTED, where=where) from problem
    return template


def expand(template: Template, data: TemplateData) -> str:
    """The text for one alert. Never raises for data: the problem is named inside the text."""
    try:
        return _expand(template, data)
    except _TemplateError as problem:
        return f"<error expanding template: {problem}>"


class _AnyLabel(Mapping[str, str]):
    def __getitem__(self, name: str) -> str:
        return "1"

    def __iter__(self):  # type: ignore[no-untyped-def]  # pragma: no cover - a Mapping must have it
        return iter(())

    def __len__(self) -> int:  # pragma: no cover - a Mapping must have it
        return 0


# --- parsing ------------------------------------------------------------------------------------


def _parse(text: str) -> list[str | _Node]:
    parts: list[str | _Node] = []
    position = 0
    trim_next = False
    while True:
        start = text.find("{{", position)
        literal = text[position:] if start < 0 else text[position:start]
        if trim_next:
            literal = literal.lstrip()
        if start < 0:
            parts.append(literal)
            break
        end = _action_end(text, start + 2)
        action = text[start + 2 : end]
        if re.match(r"-\s", action):
            literal, action = literal.rstrip(), action[1:]
        trim_next = re.search(r"\s-$", action) is not None
        action = (action[:-1] if trim_next else action).strip()
        parts.append(literal)
        if not (action.startswith("/*") and action.endswith("*/")):
            parts.append(_parse_action(action))
        position = end + 2
    return [part for part in parts if part != ""]


def _action_end(text: str, position: int) -> int:
    """Where the "}}" of an action stands that begins at `position`; strings may hold braces."""
    while position < len(text):
        if text.startswith("}}", position):
            return position
        match = _TOKEN_RE.match(text, position)
        position = match.end() if match is not None and match.lastgroup == "string" else position + 1
    raise _TemplateError("unclosed action: {{ without }}")


def _parse_action(action: str) -> _Node:
    tokens: list[tuple[str, str]] = []
    position = 0
    while position < len(action):
        match = _TOKEN_RE.match(action, position)
        if match is None or match.lastgroup is None:
            raise _TemplateError(f"{action[position:]!r} isn't supported")
        if match.lastgroup != "space":
            tokens.append((match.lastgroup, match[0]))
        position = match.end()
    node, rest = _pipeline(tokens)
    if rest:
        raise _TemplateError(f"unexpected {rest[0][1]!r}")
    return node


_Tokens = Sequence[tuple[str, str]]


def _pipeline(tokens: _Tokens) -> tuple[_Node, _Tokens]:
    node, tokens = _command(tokens, piped=None)
    while tokens and tokens[0][1] == "|":
        node, tokens = _command(tokens[1:], piped=node)
    return node, tokens


def _command(tokens: _Tokens, *, piped: _Node | None) -> tuple[_Node, _Tokens]:
    """A function with its arguments, the value piped into it last; or one operand alone."""
    if not tokens:
        raise _TemplateError("an expression is missing")
    kind, text = tokens[0]
    if kind != "name" or text[0] in "$.":
        node, tokens = _operand(tokens)
        if piped is not None or (tokens and tokens[0][1] not in ("|", ")")):
            raise _TemplateError(f"{text} isn't a function")
        return node, tokens
    if text not in _FUNCTIONS:
        raise _TemplateError(f"{text} isn't supported")
    tokens = tokens[1:]
    arguments: list[_Node] = []
    while tokens and tokens[0][1] not in ("|", ")"):
        node, tokens = _operand(tokens)
        arguments.append(node)
    if piped is not None:
        arguments.append(piped)
    minimum, maximum, _function = _FUNCTIONS[text]
    if not minimum <= len(arguments) <= maximum:
        raise _TemplateError(f"{text} takes {minimum} argument{'s' if minimum != 1 else ''}, not {len(arguments)}")
    return _Call(text, tuple(arguments)), tokens


def _operand(tokens: _Tokens) -> tuple[_Node, _Tokens]:
    kind, text = tokens[0]
    rest = tokens[1:]
    if text == "(" and kind == "sign":
        node, rest = _pipeline(rest)
        if not rest or rest[0][1] != ")":
            raise _TemplateError("a closing parenthesis is missing")
        return node, rest[1:]
    if kind == "string":
        return _Literal(_unquote(text)), rest
    if kind == "number":
        return _Literal(float(text) if re.search(r"[.eE]", text) else int(text)), rest
    if kind == "field":
        scope, _dot, name = text.rpartition(".")
        if "xternal" in scope:
            raise _TemplateError("external labels aren't supported")
        return _Label(name), rest
    if text in ("$value", ".Value"):
        return _Datum("value"), rest
    if text in ("$externalURL", ".ExternalURL"):
        return _Datum("externalURL"), rest
    if text in _FUNCTIONS and kind == "name":
        raise _TemplateError(f"put {text} and its arguments into parentheses")
    raise _TemplateError(f"{text} isn't supported")


def _unquote(token: str) -> str:
    if token[0] == "`":
        return token[1:-1]

    def replacement(match: re.Match[str]) -> str:
        if match[1] not in _ESCAPES:
            raise _TemplateError(f"the escape {match[0]} isn't supported")
        return _ESCAPES[match[1]]

    return re.sub(r"\\(.)", replacement, token[1:-1])


# --- expansion ----------------------------------------------------------------------------------


def _expand(template: Template, data: TemplateData) -> str:
    return "".join(part if isinstance(part, str) else _text(_evaluate(part, data)) for part in template._parts)


def _evaluate(node: _Node, data: TemplateData) -> _Value:
    match node:
        case _Literal(value):
            return value
        case _Label(name):
            return data.labels.get(name, "")  # as Prometheus: a missing label is empty
        case _Datum("value"):
            return data.value
        case _Datum():
            return data.external_url
        case _Call(name, arguments):
            return _FUNCTIONS[name][2](*(_evaluate(argument, data) for argument in arguments))


def _text(value: _Value) -> str:
    return go_float(value) if isinstance(value, float) else str(value)


def _number(value: _Value) -> float:
    try:
        return float(value)
    except ValueError:
        raise _TemplateError(f"{value!r} isn't a number") from None


def go_float(value: float, precision: int | None = None) -> str:
    """A float as Go's %v (shortest digits that read back equal, an exponent from 1e+06 on) or %.<precision>g."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    if precision is not None:
        return f"{value:.{precision}g}"
    if value == 0:
        return "-0" if math.copysign(1.0, value) < 0 else "0"
    shortest = next(text for places in range(18) if float(text := f"{value:.{places}e}") == value)
    digits, _e, exponent = shortest.partition("e")
    if -4 <= int(exponent) < 6:
        return f"{value:.{max(0, len(digits.lstrip('-').replace('.', '')) - 1 - int(exponent))}f}"
    return f"{digits}e{exponent}"


def _scaled(number: float, prefixes: str | Sequence[str], step: float) -> str:
    prefix = ""
    for candidate in prefixes:
        if abs(number) < step:
            break
        prefix = candidate
        number /= step
    return f"{go_float(number, 4)}{prefix}"


def _small(number: float, suffix: str = "") -> str:
    prefix = ""
    for candidate in "munpfazy":
        if abs(number) >= 1:
            break
        prefix = candidate
        number *= 1000
    return f"{go_float(number, 4)}{prefix}{suffix}"


def _humanize(value: _Value) -> str:
    number = _number(value)
    if number == 0 or not math.isfinite(number):
        return go_float(number, 4)
    return _scaled(number, "kMGTPEZY", 1000) if abs(number) >= 1 else _small(number)


def _humanize1024(value: _Value) -> str:
    number = _number(value)
    if abs(number) <= 1 or not math.isfinite(number):
        return go_float(number, 4)
    return _scaled(number, ("ki", "Mi", "Gi", "Ti", "Pi", "Ei", "Zi", "Yi"), 1024)


def _humanize_percentage(value: _Value) -> str:
    return f"{go_float(_number(value) * 100, 4)}%"


def _humanize_duration(value: _Value) -> str:
    number = _number(value)
    if not math.isfinite(number):
        return go_float(number, 4)
    if number == 0:
        return "0s"
    if abs(number) < 1:
        return _small(number, "s")
    sign, number = ("-", -number) if number < 0 else ("", number)
    minutes, seconds = divmod(int(number), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{sign}{days}d {hours}h {minutes}m {seconds}s"
    if hours:
        return f"{sign}{hours}h {minutes}m {seconds}s"
    if minutes:
        return f"{sign}{minutes}m {seconds}s"
    return f"{sign}{go_float(number, 4)}s"


def _printf(form: _Value, *arguments: _Value) -> str:
    if not isinstance(form, str):
        raise _TemplateError("printf's first argument must be text")
    left = list(arguments)

    def one(match: re.Match[str]) -> str:
        if match["verb"] == "%":
            return "%"
        if not left:
            raise _TemplateError(f"printf has no argument for {match[0]}")
        return _formatted(match, left.pop(0))

    text = _VERB_RE.sub(one, form)
    if left:
        raise _TemplateError("printf has more arguments than verbs")
    return text


def _formatted(match: re.Match[str], value: _Value) -> str:
    flags, width, precision, verb = match["flags"], match["width"], match["precision"] or "", match["verb"]
    if "#" in flags:
        raise _TemplateError(f"printf {match[0]} isn't supported")
    if verb == "v":
        text = _text(value)
    elif verb in "sq":
        if not isinstance(value, str):
            raise _TemplateError(f"printf {match[0]} needs text, the argument is a number; use %v")
        text = value[: int(precision[1:] or 0)] if precision else value
        text = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"' if verb == "q" else text
    elif verb in "feEgG":
        if not isinstance(value, float):
            raise _TemplateError(f"printf {match[0]} needs a float; for text use %s, for an integer %d")
        plain = not math.isfinite(value) or (verb in "gG" and not precision)
        text = go_float(value) if plain else f"{value:{precision or '.6'}{verb}}"
        text = f"+{text}" if "+" in flags and not text.startswith(("-", "+")) else text
    elif verb == "d":
        if not isinstance(value, int):
            raise _TemplateError(f"printf {match[0]} needs an integer; use %.0f for a float")
        text = f"{value:+d}" if "+" in flags else str(value)
    else:
        raise _TemplateError(f"printf {match[0]} isn't supported")
    if "-" in flags:
        return text.ljust(int(width or 0))
    zeros = "0" in flags and isinstance(value, float | int) and math.isfinite(value)
    return text.zfill(int(width or 0)) if zeros else text.rjust(int(width or 0))


def _print(*values: _Value) -> str:
    """Go's Sprint: a space between two operands of which neither is text."""
    text = ""
    for position, value in enumerate(values):
        gap = position and not isinstance(value, str) and not isinstance(values[position - 1], str)
        text += (" " if gap else "") + _text(value)
    return text


def _strip_port(value: _Value) -> str:
    """Without ":port", and without the brackets of an IPv6 address, as Go's net.SplitHostPort."""
    match = re.fullmatch(r"\[([^\]]*)\]:\d*|([^:\[\]]*):\d*", str(value))
    return str(value) if match is None else (match[1] if match[1] is not None else match[2])


def _strip_domain(value: _Value) -> str:
    host, colon, port = str(value).partition(":")
    return host.partition(".")[0] + colon + port


def _go_title(value: _Value) -> str:
    return re.sub(r"(?<![\w'])\w", lambda match: match[0].upper(), str(value))


# name → fewest arguments, most arguments, function
_FUNCTIONS: Mapping[str, tuple[int, int, Callable[..., str]]] = {
    "humanize": (1, 1, _humanize),
    "humanize1024": (1, 1, _humanize1024),
    "humanizeDuration": (1, 1, _humanize_duration),
    "humanizePercentage": (1, 1, _humanize_percentage),
    "printf": (1, 16, _printf),
    "print": (1, 16, _print),
    "title": (1, 1, _go_title),
    "toUpper": (1, 1, lambda value: str(value).upper()),
    "toLower": (1, 1, lambda value: str(value).lower()),
    "stripPort": (1, 1, _strip_port),
    "stripDomain": (1, 1, _strip_domain),
}

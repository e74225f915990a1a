"""Expand a tree with data and functions.

Bounded: a template that includes itself, or output without end, is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pgherd.alerts.gotemplate.functions import Arguments, is_true
from pgherd.alerts.gotemplate.gofmt import GoDuration, GoTime, text_of
from pgherd.alerts.gotemplate.syntax import (
    Branch,
    Command,
    Dot,
    Fields,
    Function,
    Include,
    Leave,
    Literal,
    Nodes,
    Operand,
    Pipeline,
    Show,
    TemplateError,
    Text,
    Tree,
    Variable,
)

_OUTPUT_MAX = 256 * 1024
_INCLUDE_DEPTH_MAX = 50

Functions = Mapping[str, Callable[..., Any]]


class _Left(Exception):  # noqa: N818 - control flow, not an error
    """A `break` or `continue` on its way to the range around it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind


def run(tree: Tree, data: Any, functions: Functions, variables: Mapping[str, Any]) -> str:
    """The text. Raises TemplateError."""
    run_of = _Run(tree, functions)
    run_of.nodes(tree.nodes, data, [{"$": data, **variables}])
    return "".join(run_of.output)


class _Run:
    """One expansion. A scope is a list of frames, the innermost last."""

    def __init__(self, tree: Tree, functions: Functions) -> None:
        self._defined = dict(tree.defined)
        self._functions: Functions = {**functions, "tmpl": self._tmpl}
        self._depth = 0
        self._size = 0
        self.output: list[str] = []

    def nodes(self, nodes: Nodes, dot: Any, scope: list[dict[str, Any]]) -> None:
        for node in nodes:
            match node:
                case Text(text):
                    self._write(text)
                case Show(pipeline):
                    value = self._pipeline(pipeline, dot, scope)
                    if not pipeline.variables:
                        self._write("<no value>" if value is None else text_of(value))
                case Branch():
                    self._branch(node, dot, scope)
                case Include(name, included):
                    data = self._pipeline(included, dot, scope) if included is not None else None
                    self._include(name, data)
                case Leave(kind):
                    raise _Left(kind)

    def _write(self, text: str) -> None:
        self._size += len(text)
        if self._size > _OUTPUT_MAX:
            raise TemplateError(f"the text grows beyond {_OUTPUT_MAX >> 10} KiB")
        self.output.append(text)

    def _include(self, name: str, data: Any) -> None:
        if name not in self._defined:
            raise TemplateError(f"template {name!r} isn't defined")
        self._depth += 1
        if self._depth > _INCLUDE_DEPTH_MAX:
            raise TemplateError("templates include each other without end")
        self.nodes(self._defined[name], data, [{"$": data}])
        self._depth -= 1

    def _tmpl(self, name: Any, data: Any) -> str:
        before, self.output = self.output, []
        try:
            self._include(str(name), data)
            return "".join(self.output)
        finally:
            self.output = before

    def _branch(self, node: Branch, dot: Any, scope: list[dict[str, Any]]) -> None:
        inner: list[dict[str, Any]] = [*scope, {}]
        if node.kind == "range":
            self._range(node, dot, inner)
            return
        value = self._pipeline(node.pipeline, dot, inner)
        chosen = node.then if is_true(value) else node.otherwise
        self.nodes(chosen, value if node.kind == "with" and chosen is node.then else dot, inner)

    def _range(self, node: Branch, dot: Any, scope: list[dict[str, Any]]) -> None:
        plain = Pipeline(node.pipeline.commands)
        items = _items(self._pipeline(plain, dot, scope))
        if not items:
            self.nodes(node.otherwise, dot, scope)
        for key, value in items:
            frame: dict[str, Any] = {}
            names = node.pipeline.variables
            for name, bound in zip(names, (value,) if len(names) == 1 else (key, value), strict=False):
                if node.pipeline.assigns:
                    _assign(scope, name, bound)
                else:
                    frame[name] = bound
            try:
                self.nodes(node.then, value, [*scope, frame])
            except _Left as left:
                if left.kind == "break":
                    break

    # --- expressions ---

    def _pipeline(self, pipeline: Pipeline, dot: Any, scope: list[dict[str, Any]]) -> Any:
        value: Any = None
        for index, command in enumerate(pipeline.commands):
            value = self._command(command, dot, scope, [value] if index else [])
        for name in pipeline.variables:
            if pipeline.assigns:
                _assign(scope, name, value)
            else:
                scope[-1][name] = value
        return value

    def _command(self, command: Command, dot: Any, scope: list[dict[str, Any]], piped: list[Any]) -> Any:
        head, *rest = command.operands
        if isinstance(head, Function):
            if head.name in ("and", "or"):
                return self._lazily(head.name, rest, dot, scope, piped)
            arguments = [self._operand(one, dot, scope) for one in rest]
            return self._called(head.name, [*arguments, *piped])
        if isinstance(head, Fields) and (rest or piped):
            of = self._operand(head.of, dot, scope)
            for name in head.names[:-1]:
                of = _field(of, name)
            return _method(of, head.names[-1], [*(self._operand(one, dot, scope) for one in rest), *piped])
        return self._operand(head, dot, scope)

    def _called(self, name: str, arguments: Sequence[Any]) -> Any:
        try:
            return self._functions[name](*arguments)
        # What a value of the wrong kind does inside a function is the template's mistake, and must cost only its text.
        except (TypeError, ValueError, ArithmeticError, LookupError) as error:
            if isinstance(error, TemplateError):
                raise
            raise TemplateError(f"{name}: {error}") from error

    def _lazily(self, name: str, operands: Sequence[Operand], dot: Any, scope: list[dict[str, Any]], piped: list[Any]) -> Any:
        value: Any = None
        for operand in operands:
            value = self._operand(operand, dot, scope)
            if is_true(value) is (name == "or"):
                return value
        return piped[0] if piped else value

    def _operand(self, operand: Operand, dot: Any, scope: list[dict[str, Any]]) -> Any:
        match operand:
            case Literal(value):
                return value
            case Dot():
                return dot
            case Variable(name):
                return next((frame[name] for frame in reversed(scope) if name in frame), None)
            case Fields(of, names):
                found = self._operand(of, dot, scope)
                for name in names:
                    found = _field(found, name)
                return found
            case Function(name):
                return self._called(name, [])
            case Pipeline():
                return self._pipeline(operand, dot, [*scope, {}])


def _assign(scope: list[dict[str, Any]], name: str, value: Any) -> None:
    for frame in reversed(scope):
        if name in frame:
            frame[name] = value
            return


def _items(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return [(key, value[key]) for key in sorted(value)]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return list(enumerate(value))
    if value is None:
        return []
    raise TemplateError(f"range can't iterate over {text_of(value)}")


def _field(value: Any, name: str) -> Any:
    """A map's missing key is empty, as Prometheus has it; anything else without that field is an error."""
    if isinstance(value, Arguments):
        return value.get(name)
    if isinstance(value, Mapping):
        return value.get(name, "")
    return _method(value, name, [])


_LAYOUT = {
    "2006": "%Y", "06": "%y", "January": "%B", "Jan": "%b", "01": "%m", "Monday": "%A", "Mon": "%a", "02": "%d",
    "15": "%H", "03": "%I", "04": "%M", "05": "%S", "PM": "%p", "MST": "UTC", "-0700": "+0000", "Z07:00": "Z",
}  # fmt: skip


def _method(value: Any, name: str, arguments: Sequence[Any]) -> Any:
    """The methods of times and durations that templates call."""
    match value, name, tuple(arguments):
        case GoTime(), "Format", (str(layout),):
            return _formatted(value, layout)
        case GoTime(), "Unix", ():
            return value.unix_ms // 1000
        case GoTime(), ("UTC" | "Local"), ():
            return value
        case GoTime(), ("Year" | "Day" | "Hour" | "Minute" | "Second"), ():
            return getattr(value.utc, name.lower())
        case GoTime(), "Month", ():
            return f"{value.utc:%B}"
        case GoTime(), "Weekday", ():
            return f"{value.utc:%A}"
        case GoDuration(), ("Seconds" | "Minutes" | "Hours"), ():
            return value.ns / {"Seconds": 1e9, "Minutes": 60e9, "Hours": 3600e9}[name]
        case ((GoTime() | GoDuration()), "String", ()):
            return str(value)
    raise TemplateError(f"can't evaluate field {name} of {text_of(value)}")


def _formatted(value: GoTime, layout: str) -> str:
    tokens = "|".join(sorted(map(re.escape, _LAYOUT), key=len, reverse=True))
    return re.sub(tokens, lambda match: value.utc.strftime(_LAYOUT[match[0]]), layout)

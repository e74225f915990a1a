"""From PromQL text to our own tree. The only module that knows the `promql_parser` package.

The package parses and type-checks; this adapter maps its tree, refuses what the engine doesn't evaluate by
name (`promql.unsupported`) and keeps hostile text away from it. Three of its faults are worked round here, each
seen with 0.12.0: nesting or operator chains of some thousands overflow its stack and kill the process; a duration of
1e20 seconds or an `@` before 1970 panics; escapes inside backquotes are interpreted, though raw strings have none.
"""

from __future__ import annotations

import re
from datetime import timedelta

import promql_parser as grammar

from pgherd.promql.aggregate import SUPPORTED as AGGREGATIONS
from pgherd.promql.ast import (
    Aggregate,
    AggregateOp,
    Anchor,
    Binary,
    BinaryOp,
    Call,
    Expr,
    ManySide,
    Matching,
    MatrixSelector,
    Negation,
    NumberLiteral,
    StringLiteral,
    Subquery,
    ValueType,
    VectorSelector,
    value_type,
)
from pgherd.promql.durations import MAGNITUDE_MAX_MS
from pgherd.promql.functions import SUPPORTED as FUNCTIONS
from pgherd.proto.errors import ConfigError
from pgherd.proto.selectors import NAME_LABEL, Matcher, MatchOp

TEXT_CHARACTERS_MAX = 64 * 1024
# The parser's stack takes 2000 levels of every kind within a thread's 8 MiB (5000 kill it).
OPERATORS_MAX = 500
DURATION_SECONDS_MAX = 1e11

_TOKEN = re.compile(
    r"""(?P<raw>`[^`]*`)
      | (?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
      | (?P<comment>\#[^\n]*)
      | (?P<number>(?<![\w.])(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?(?![\w.]))
      | (?P<word>[A-Za-z_:][\w:]*)
      | (?P<at>@)
      | (?P<operator>[-+*/%^<>(]|==|!=)
      | (?P<bracket>\[[^\]]*)""",
    re.VERBOSE | re.DOTALL,
)
_WORD_OPERATORS = frozenset(("and", "or", "unless", "atan2"))
_MATCH_OPS = {
    str(grammar.MatchOp.Equal): MatchOp.EQUAL,
    str(grammar.MatchOp.NotEqual): MatchOp.NOT_EQUAL,
    str(grammar.MatchOp.Re): MatchOp.REGEX,
    str(grammar.MatchOp.NotRe): MatchOp.NOT_REGEX,
}
_ANCHORS = {
    str(grammar.AtModifierType.Start): Anchor.START,
    str(grammar.AtModifierType.End): Anchor.END,
}
_MANY_SIDES = {
    str(grammar.VectorMatchCardinality.ManyToOne): ManySide.LEFT,
    str(grammar.VectorMatchCardinality.OneToMany): ManySide.RIGHT,
}
_TYPES = {
    str(grammar.ValueType.Vector): ValueType.VECTOR,
    str(grammar.ValueType.Scalar): ValueType.SCALAR,
    str(grammar.ValueType.Matrix): ValueType.MATRIX,
    str(grammar.ValueType.String): ValueType.STRING,
}


def parse(text: str) -> Expr:
    """The tree of a PromQL expression.

    Raises `promql.parse` for text that isn't PromQL or has a type error, `promql.unsupported` for a feature
    that the engine doesn't evaluate.
    """
    try:
        return _expr(_foreign(text))
    except RecursionError:
        raise _parse_error("the expression is nested too deeply") from None
    except (ValueError, OverflowError) as error:  # reading a duration that Python can't hold
        raise _parse_error(str(error)) from None


def formatted(text: str) -> str:
    """The expression as the package writes it, long ones on several lines. Raises `promql.parse`."""
    pretty: str = _foreign(text).prettify()
    return pretty


def parse_selector(text: str) -> tuple[Matcher, ...]:
    """The matchers of a plain series selector, as `match[]` of the HTTP API takes it.

    Raises `promql.parse`, also for an expression that is more than a selector.
    """
    expr = parse(text)
    if not isinstance(expr, VectorSelector) or expr.offset_ms or expr.at is not None:
        raise _parse_error("expected a plain series selector like up{job='pgherd'}")
    return expr.matchers


def _foreign(text: str) -> grammar.Expr:
    prepared = _prepare(text)
    try:
        return grammar.parse(prepared)
    except ValueError as error:  # also lone surrogates, which can't be UTF-8
        raise _parse_error(str(error)) from None
    except BaseException as error:  # a Rust panic derives from it and has no importable class
        if type(error).__name__ != "PanicException":
            raise
        raise _parse_error("the parser gave up on this expression") from None


def _prepare(text: str) -> str:
    """Bound what the parser is given and rewrite raw strings as quoted ones."""
    if len(text) > TEXT_CHARACTERS_MAX:
        raise _parse_error(f"the expression is longer than {TEXT_CHARACTERS_MAX} characters")
    operators = 0
    duration_follows = time_follows = False
    pieces: list[str] = []
    done = 0
    for token in _TOKEN.finditer(text):
        found = token.group()
        if duration_follows:
            _refuse_endless(found)
        if time_follows and found == "-":
            raise _unsupported("the @ modifier with a time before 1970")
        if token.lastgroup != "comment":
            time_follows = token.lastgroup == "at"
            duration_follows = found.lower() == "offset" or (duration_follows and found in "+-")
        match token.lastgroup:
            case "raw":
                pieces += [text[done : token.start()], _quoted(found[1:-1])]
                done = token.end()
            case "operator":
                operators += 1
            case "word" if found.lower() in _WORD_OPERATORS:
                operators += 1
            case "bracket":
                operators += 1  # a subquery of a subquery nests without parentheses
                for part in found[1:].split(":"):
                    _refuse_endless(part)
    if operators > OPERATORS_MAX:
        raise _parse_error(f"the expression has more than {OPERATORS_MAX} operators, calls and parentheses")
    return "".join((*pieces, text[done:]))


def _refuse_endless(duration: str) -> None:
    """Refuse a number that the package can't make a duration of; also "Inf" and "NaN"."""
    try:
        seconds = float(duration)
    except ValueError:
        return
    if not seconds <= DURATION_SECONDS_MAX:
        raise _parse_error(f"duration out of range: {duration[:32]}")


def _quoted(raw: str) -> str:
    return '"' + raw.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _expr(node: object) -> Expr:
    match node:
        case grammar.ParenExpr():
            return _expr(node.expr)
        case grammar.NumberLiteral():
            return NumberLiteral(node.val)
        case grammar.StringLiteral():
            return StringLiteral(node.val)
        case grammar.VectorSelector():
            return _vector_selector(node)
        case grammar.MatrixSelector():
            return MatrixSelector(_vector_selector(node.vector_selector), _milliseconds(node.range))
        case grammar.UnaryExpr():
            return Negation(_expr(node.expr))
        case grammar.BinaryExpr():
            return _binary(node)
        case grammar.AggregateExpr():
            return _aggregate(node)
        case grammar.Call():
            return _call(node)
        case grammar.SubqueryExpr():
            return Subquery(
                _expr(node.expr),
                _milliseconds(node.range or timedelta()),
                None if node.step is None else _milliseconds(node.step),
                _offset(node),
                _at(node),
            )
        case _:
            raise _unsupported(f"{type(node).__name__} expressions")


def _vector_selector(node: grammar.VectorSelector) -> VectorSelector:
    if node.matchers.or_matchers:
        raise _unsupported("'or' between label matchers")
    matchers = [Matcher(found.name, _MATCH_OPS[str(found.op)], found.value) for found in node.matchers.matchers]
    if node.name is not None:
        matchers.insert(0, Matcher(NAME_LABEL, MatchOp.EQUAL, node.name))
    return VectorSelector(tuple(matchers), _offset(node), _at(node))


def _offset(node: grammar.VectorSelector | grammar.SubqueryExpr) -> int:
    return _milliseconds(node.offset) if node.offset is not None else 0


def _at(node: grammar.VectorSelector | grammar.SubqueryExpr) -> int | Anchor | None:
    modifier = node.at
    if modifier is None:
        return None
    if modifier.type in (grammar.AtModifierType.Start, grammar.AtModifierType.End):
        return _ANCHORS[str(modifier.type)]
    # Its text, because the package's own conversion to a datetime ends in the year 9999.
    at_ms = round(float(str(modifier).removeprefix("@")) * 1000)
    if at_ms > MAGNITUDE_MAX_MS:
        raise _parse_error("timestamp out of bounds for @ modifier")
    return at_ms


def _milliseconds(duration: timedelta) -> int:
    return duration // timedelta(milliseconds=1)


def _binary(node: grammar.BinaryExpr) -> Binary:
    op = BinaryOp(str(node.op))
    left, right = _expr(node.lhs), _expr(node.rhs)
    modifier = node.modifier
    matching: Matching | None = None
    if value_type(left) is ValueType.VECTOR and value_type(right) is ValueType.VECTOR:
        matching = Matching(on=False, labels=())
        if modifier is not None:
            if modifier.fill_values.lhs is not None or modifier.fill_values.rhs is not None:
                raise _unsupported("the fill modifier")
            on = modifier.matching is not None and modifier.matching.type == grammar.LabelModifierType.Include
            labels = tuple(modifier.matching.labels) if modifier.matching is not None else ()
            many = _MANY_SIDES.get(str(modifier.card))
            matching = Matching(on, labels, many, tuple(modifier.group_labels or ()) if many is not None else ())
    return Binary(op, left, right, return_bool=modifier is not None and modifier.return_bool, matching=matching)


def _aggregate(node: grammar.AggregateExpr) -> Aggregate:
    name = str(node.op)
    if name not in AGGREGATIONS:
        raise _unsupported(f"the aggregation {name}")
    modifier = node.modifier
    return Aggregate(
        AggregateOp(name),
        _expr(node.expr),
        labels=tuple(modifier.labels) if modifier is not None else (),
        without=modifier is not None and modifier.type == grammar.AggModifierType.Without,
        parameter=_expr(node.param) if node.param is not None else None,
    )


def _call(node: grammar.Call) -> Call:
    name = node.func.name
    if name not in FUNCTIONS:
        raise _unsupported(f"the function {name}()")
    return Call(name, tuple(_expr(argument) for argument in node.args), _TYPES[str(node.func.return_type)])


def _unsupported(feature: str) -> ConfigError:
    return ConfigError(
        "promql.unsupported",
        f"{feature}: valid PromQL that this version of pgherd doesn't evaluate",
        hint="docs/promql.md lists what is evaluated",
        feature=feature,
    )


def _parse_error(detail: str) -> ConfigError:
    return ConfigError("promql.parse", f'invalid parameter "query": {detail}')

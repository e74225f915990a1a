"""pgherd's own PromQL syntax tree: what an expression means, free of any parser's types.

Small and closed: a node exists only if the engine evaluates it. The adapter in parse.py refuses everything
else by name, so that an expression which became one of these trees can be evaluated.

Source: Prometheus documentation, "Querying basics" and "Operators".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from pgherd.proto.selectors import Matcher


class ValueType(StrEnum):
    """What an expression evaluates to, in the words of the HTTP API's `resultType`."""

    SCALAR = "scalar"
    STRING = "string"
    VECTOR = "vector"
    MATRIX = "matrix"


class BinaryOp(StrEnum):
    """Operators between two operands."""

    ADD = "+"
    SUB = "-"
    MUL = "*"
    DIV = "/"
    MOD = "%"
    POW = "^"
    ATAN2 = "atan2"
    EQUAL = "=="
    NOT_EQUAL = "!="
    LESS = "<"
    LESS_EQUAL = "<="
    GREATER = ">"
    GREATER_EQUAL = ">="
    AND = "and"
    OR = "or"
    UNLESS = "unless"

    @property
    def is_comparison(self) -> bool:
        """Whether the operator filters (or yields 0/1 with `bool`)."""
        return self in _COMPARISONS

    @property
    def is_set(self) -> bool:
        """Whether the operator combines label sets and leaves values alone."""
        return self in _SETS


_COMPARISONS = frozenset(
    (BinaryOp.EQUAL, BinaryOp.NOT_EQUAL, BinaryOp.LESS, BinaryOp.LESS_EQUAL, BinaryOp.GREATER, BinaryOp.GREATER_EQUAL)
)
_SETS = frozenset((BinaryOp.AND, BinaryOp.OR, BinaryOp.UNLESS))


class AggregateOp(StrEnum):
    """Aggregations over the elements of an instant vector."""

    SUM = "sum"
    MIN = "min"
    MAX = "max"
    AVG = "avg"
    COUNT = "count"
    GROUP = "group"
    STDDEV = "stddev"
    STDVAR = "stdvar"
    QUANTILE = "quantile"
    TOPK = "topk"
    BOTTOMK = "bottomk"
    LIMITK = "limitk"
    COUNT_VALUES = "count_values"


class Anchor(StrEnum):
    """What `@ start()` and `@ end()` mean: the first or the last step of the whole query."""

    START = "start"
    END = "end"


class ManySide(StrEnum):
    """Which side of a binary operator may have several elements for one of the other, by its modifier."""

    LEFT = "group_left"
    RIGHT = "group_right"


@dataclass(frozen=True, slots=True)
class NumberLiteral:
    """A float constant (durations used as numbers are seconds)."""

    value: float


@dataclass(frozen=True, slots=True)
class StringLiteral:
    """A string constant; only an argument or a whole instant query."""

    value: str


@dataclass(frozen=True, slots=True)
class VectorSelector:
    """The newest sample of each matching series; a metric name is an equality matcher on `__name__`."""

    matchers: tuple[Matcher, ...]
    offset_ms: int = 0
    at: int | Anchor | None = None  # `@` in milliseconds, instead of the evaluation's own time


@dataclass(frozen=True, slots=True)
class MatrixSelector:
    """All samples of each matching series within `(t - range_ms, t]`."""

    selector: VectorSelector
    range_ms: int


@dataclass(frozen=True, slots=True)
class Subquery:
    """`operand[range:step]`: an instant vector at every multiple of the step within `(t - range_ms, t]`.

    Without a step it is the configured default resolution.
    """

    operand: Expr
    range_ms: int
    step_ms: int | None
    offset_ms: int = 0
    at: int | Anchor | None = None


@dataclass(frozen=True, slots=True)
class Negation:
    """Unary minus."""

    operand: Expr


@dataclass(frozen=True, slots=True)
class Matching:
    """How the elements of two vectors find each other: equal on these labels, or on all but these.

    With a `many` side, results keep that side's labels and take those of `include` from the other.
    """

    on: bool
    labels: tuple[str, ...]
    many: ManySide | None = None
    include: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Binary:
    """`left op right`; `matching` is given whenever both sides are vectors."""

    op: BinaryOp
    left: Expr
    right: Expr
    return_bool: bool = False
    matching: Matching | None = None


@dataclass(frozen=True, slots=True)
class Aggregate:
    """`op by|without (labels) (parameter, operand)`; the parameter is a scalar or, for count_values, a string."""

    op: AggregateOp
    operand: Expr
    labels: tuple[str, ...] = ()
    without: bool = False
    parameter: Expr | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """A function call; `returns` is its type as declared by the language."""

    function: str
    arguments: tuple[Expr, ...]
    returns: ValueType


Expr = NumberLiteral | StringLiteral | VectorSelector | MatrixSelector | Subquery | Negation | Binary | Aggregate | Call


def value_type(expr: Expr) -> ValueType:
    """The type that evaluating `expr` yields."""
    match expr:
        case NumberLiteral():
            return ValueType.SCALAR
        case StringLiteral():
            return ValueType.STRING
        case VectorSelector() | Aggregate():
            return ValueType.VECTOR
        case MatrixSelector() | Subquery():
            return ValueType.MATRIX
        case Negation():
            return value_type(expr.operand)
        case Call():
            return expr.returns
        case Binary():
            sides = (value_type(expr.left), value_type(expr.right))
            return ValueType.SCALAR if sides == (ValueType.SCALAR, ValueType.SCALAR) else ValueType.VECTOR


def children(expr: Expr) -> tuple[Expr, ...]:
    """The direct operands of `expr`; a matrix selector is a leaf."""
    match expr:
        case Negation() | Subquery():
            return (expr.operand,)
        case Aggregate():
            return (expr.operand,) if expr.parameter is None else (expr.parameter, expr.operand)
        case Binary():
            return (expr.left, expr.right)
        case Call():
            return expr.arguments
        case _:
            return ()


def walk(expr: Expr) -> Iterator[Expr]:
    """`expr` and everything below it, parents first, without recursion."""
    pending = [expr]
    while pending:
        node = pending.pop()
        yield node
        pending.extend(reversed(children(node)))

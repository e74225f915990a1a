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


@dataclass(frozen=True, slots=True)
class MatrixSelector:
    """All samples of each matching series within `(t - range_ms, t]`."""

    selector: VectorSelector
    range_ms: int


@dataclass(frozen=True, slots=True)
class Negation:
    """Unary minus."""

    operand: Expr


@dataclass(frozen=True, slots=True)
class Matching:
    """How the elements of two vectors find each other: equal on these labels, or on all but these."""

    on: bool
    labels: tuple[str, ...]


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
    """`op by|without (labels) (operand)`."""

    op: AggregateOp
    operand: Expr
    labels: tuple[str, ...] = ()
    without: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """A function call; `returns` is its type as declared by the language."""

    function: str
    arguments: tuple[Expr, ...]
    returns: ValueType


Expr = NumberLiteral | StringLiteral | VectorSelector | MatrixSelector | Negation | Binary | Aggregate | Call


def value_type(expr: Expr) -> ValueType:
    """The type that evaluating `expr` yields."""
    match expr:
        case NumberLiteral():
            return ValueType.SCALAR
        case StringLiteral():
            return ValueType.STRING
        case VectorSelector() | Aggregate():
            return ValueType.VECTOR
        case MatrixSelector():
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
        case Negation() | Aggregate():
            return (expr.operand,)
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

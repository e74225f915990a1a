"""The evaluator: parse, fetch what every selector needs, evaluate all steps at once.

Pure: time comes in as arguments, samples from a `SeriesSource`, the deadline as `Limits.checkpoint`.

Properties that hold for every expression (tests/unit/test_promql_properties.py):
- a range query equals the instant queries at each of its steps;
- a result never has two elements with equal labels at one step;
- the source is asked once per distinct selector and time range, and before anything is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from pgherd.promql.aggregate import aggregate
from pgherd.promql.ast import (
    Aggregate,
    Binary,
    Call,
    Expr,
    MatrixSelector,
    Negation,
    NumberLiteral,
    StringLiteral,
    ValueType,
    VectorSelector,
    value_type,
    walk,
)
from pgherd.promql.functions import INSTANT_FUNCTIONS, as_scalar, as_vector
from pgherd.promql.grid import Floats, Grid, Integers, Labels, ScalarGrid, StringValue, VectorGrid
from pgherd.promql.matching import combine_sets, one_to_one
from pgherd.promql.operators import between_scalars, with_scalar
from pgherd.promql.parse import parse
from pgherd.promql.range_functions import RANGE_FUNCTIONS, RangeFunctionInfo, quantile_of
from pgherd.promql.source import TIME_MAX_MS, SeriesSource
from pgherd.promql.values import Matrix, Scalar, Series, String, Value, Vector, VectorSample
from pgherd.promql.windows import Checkpoint, RangeFunction, RangeWindow, Selection, arrange, instant_vector, range_vector
from pgherd.proto.errors import ConfigError, InvariantError, PreconditionError
from pgherd.proto.selectors import NAME_LABEL, Matcher, MatchOp


def no_checkpoint() -> None:
    """The checkpoint of an evaluation without a deadline."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one evaluation.

    `samples_max` bounds the samples fetched and the cells (series × steps) of each selector. `checkpoint` is called
    between nodes and between chunks of work; it raises (`query.timeout`) to end the evaluation.
    """

    lookback_ms: int = 300_000
    samples_max: int = 50_000_000
    points_per_series_max: int = 11_000
    checkpoint: Checkpoint = no_checkpoint


DEFAULT_LIMITS = Limits()


def evaluate_instant(expr_text: str, at_ms: int, source: SeriesSource, limits: Limits = DEFAULT_LIMITS) -> Value:
    """The value of an expression at one moment.

    Raises `promql.parse`, `promql.unsupported`, `promql.execution` (labels that collide), `promql.limit`, and whatever
    the source and the checkpoint raise.
    """
    expr = parse(expr_text)
    steps = np.array([at_ms], dtype=np.int64)
    evaluation = _prepare(expr, steps, source, limits)
    if isinstance(expr, MatrixSelector):
        return evaluation.samples_of(expr)
    match evaluation.run(expr):
        case StringValue(value=text):
            return String(at_ms, text)
        case ScalarGrid(values=values):
            return Scalar(at_ms, float(values[0]))
        case VectorGrid() as grid:
            rows = [int(row) for row in np.flatnonzero(grid.present[:, 0])]
            return Vector(at_ms, [VectorSample(dict(grid.labels[row]), float(grid.values[row, 0])) for row in rows])


def evaluate_range(
    expr_text: str, start_ms: int, end_ms: int, step_ms: int, source: SeriesSource, limits: Limits = DEFAULT_LIMITS
) -> Matrix:
    """The values of a scalar or instant-vector expression at start, start + step, … up to and including end.

    Raises as `evaluate_instant`, and `usage.invalid` for a range that runs backwards, has no step or too many points.
    """
    _check_range(start_ms, end_ms, step_ms, limits)
    expr = parse(expr_text)
    found = value_type(expr)
    if found not in (ValueType.SCALAR, ValueType.VECTOR):
        name = "range vector" if found is ValueType.MATRIX else "string"
        raise ConfigError("promql.parse", f'invalid expression type "{name}" for range query, must be Scalar or instant Vector')
    steps = np.arange(start_ms, end_ms + 1, step_ms, dtype=np.int64)
    result = _prepare(expr, steps, source, limits).run(expr)
    if isinstance(result, ScalarGrid):
        return Matrix([Series({}, steps, result.values)])
    grid = as_vector(result).inhabited()
    order = sorted(range(len(grid.labels)), key=grid.labels.__getitem__)
    return Matrix([_series(grid.labels[row], steps, grid, row) for row in order])


def _check_range(start_ms: int, end_ms: int, step_ms: int, limits: Limits) -> None:
    if step_ms <= 0:
        raise ConfigError(
            "usage.invalid",
            'invalid parameter "step": zero or negative query resolution step widths are not accepted. Try a positive integer',
        )
    if end_ms < start_ms:
        raise ConfigError("usage.invalid", 'invalid parameter "end": end timestamp must not be before start time')
    # As Prometheus counts them: intervals, so that one point more passes.
    if (end_ms - start_ms) // step_ms > limits.points_per_series_max:
        raise ConfigError(
            "usage.invalid",
            f"exceeded maximum resolution of {limits.points_per_series_max:,} points per timeseries. "
            "Try decreasing the query resolution (?step=XX)",
        )


def _series(labels: Labels, steps: Integers, grid: VectorGrid, row: int) -> Series:
    present = grid.present[row]
    if present.all():
        return Series(dict(labels), steps, grid.values[row])
    return Series(dict(labels), steps[present], grid.values[row][present])


# What a selector fetches: its matchers, the closed time range, and whether stale markers matter to it.
_Fetch = tuple[tuple[Matcher, ...], int, int, bool]


def _fetch_of(node: VectorSelector | MatrixSelector, steps: Integers, lookback_ms: int) -> _Fetch:
    """The smallest closed range that holds every left-open window of a selector."""
    selector, reach_ms = (node, lookback_ms) if isinstance(node, VectorSelector) else (node.selector, node.range_ms)
    first = int(steps[0]) - selector.offset_ms - reach_ms + 1
    last = int(steps[-1]) - selector.offset_ms
    return (selector.matchers, _storable_ms(first), _storable_ms(last), isinstance(node, MatrixSelector))


def _storable_ms(moment_ms: int) -> int:
    return max(-TIME_MAX_MS, min(TIME_MAX_MS, moment_ms))


def _prepare(expr: Expr, steps: Integers, source: SeriesSource, limits: Limits) -> _Evaluation:
    """Fetch for every selector of the expression."""
    selections: dict[_Fetch, Selection] = {}
    fetched = 0
    for node in walk(expr):
        if not isinstance(node, VectorSelector | MatrixSelector):
            continue
        key = _fetch_of(node, steps, limits.lookback_ms)
        if key in selections:
            continue
        limits.checkpoint()
        matchers, first_ms, last_ms, drop_stale = key
        series = source.select(matchers, first_ms, last_ms)
        fetched += sum(len(window.times_ms) for window in series)
        if fetched > limits.samples_max or len(series) * len(steps) > limits.samples_max:
            raise PreconditionError(
                "promql.limit",
                f"query processing would load too many samples into memory (more than {limits.samples_max})",
                hint="select fewer series, a shorter range or a larger step",
            )
        selections[key] = arrange(series, drop_stale=drop_stale)
    return _Evaluation(steps, limits, selections)


@dataclass(frozen=True, slots=True)
class _Evaluation:
    """One query in progress: its steps and everything it fetched."""

    steps: Integers
    limits: Limits
    selections: Mapping[_Fetch, Selection]

    def run(self, expr: Expr) -> Grid:
        """The whole expression."""
        with np.errstate(all="ignore"):  # Inf and NaN are answers here, not accidents
            try:
                return self._value(expr)
            except RecursionError:
                raise PreconditionError("promql.limit", "the expression is nested too deeply to be evaluated") from None
            except MemoryError:
                raise PreconditionError("promql.limit", "the query needs more memory than there is") from None

    def samples_of(self, node: MatrixSelector) -> Matrix:
        """The raw samples of a range selector, as an instant query of it answers."""
        low_ms = int(self.steps[0]) - node.selector.offset_ms - node.range_ms
        selection = self._selection(node)
        found: list[tuple[Labels, Series]] = []
        for block in selection.blocks:
            inside = (block.times_ms > low_ms) & (block.times_ms <= low_ms + node.range_ms)
            if not inside.any():
                continue
            for row, values in zip(block.rows, block.values, strict=True):
                labels = selection.labels[row]
                found.append((labels, Series(dict(labels), block.times_ms[inside], values[inside])))
        return Matrix([series for _, series in sorted(found, key=lambda pair: pair[0])])

    def _value(self, expr: Expr) -> Grid:
        self.limits.checkpoint()
        match expr:
            case NumberLiteral():
                return ScalarGrid(np.full(len(self.steps), expr.value))
            case StringLiteral():
                return StringValue(expr.value)
            case VectorSelector():
                at_ms = self.steps - expr.offset_ms
                return instant_vector(self._selection(expr), at_ms, self.limits.lookback_ms, self.limits.checkpoint)
            case Negation():
                return self._negation(expr)
            case Binary():
                return self._binary(expr)
            case Aggregate():
                return aggregate(expr, as_vector(self._value(expr.operand)))
            case Call():
                return self._call(expr)
            case MatrixSelector():
                raise InvariantError("invariant.broken", "a range vector outside of a function")

    def _selection(self, node: VectorSelector | MatrixSelector) -> Selection:
        return self.selections[_fetch_of(node, self.steps, self.limits.lookback_ms)]

    def _negation(self, expr: Negation) -> Grid:
        operand = self._value(expr.operand)
        if isinstance(operand, ScalarGrid):
            return ScalarGrid(-operand.values)
        vector = as_vector(operand)
        return VectorGrid(vector.labels, -vector.values, vector.present).nameless()

    def _binary(self, expr: Binary) -> Grid:
        left, right = self._value(expr.left), self._value(expr.right)
        if isinstance(left, ScalarGrid) and isinstance(right, ScalarGrid):
            return between_scalars(expr.op, left, right)
        if isinstance(right, ScalarGrid):
            return with_scalar(expr.op, as_vector(left), right, scalar_first=False, return_bool=expr.return_bool)
        if isinstance(left, ScalarGrid):
            return with_scalar(expr.op, as_vector(right), left, scalar_first=True, return_bool=expr.return_bool)
        if expr.matching is None:
            raise InvariantError("invariant.broken", "two vectors without a matching")
        if expr.op.is_set:
            return combine_sets(expr.op, as_vector(left), as_vector(right), expr.matching)
        return one_to_one(expr.op, as_vector(left), as_vector(right), expr.matching, return_bool=expr.return_bool)

    def _call(self, expr: Call) -> Grid:
        match expr:
            case Call(function="absent", arguments=(operand,)):
                return self._absence(operand, as_vector(self._value(operand)))
            case Call(function="absent_over_time", arguments=(MatrixSelector() as operand,)):
                return self._absence(operand, self._over_range(operand, RANGE_FUNCTIONS["present_over_time"]))
            case Call(function="quantile_over_time", arguments=(quantile, MatrixSelector() as operand)):
                return self._quantile(as_scalar(self._value(quantile)), operand)
            case Call(arguments=(MatrixSelector() as operand,)) if expr.function in RANGE_FUNCTIONS:
                return self._over_range(operand, RANGE_FUNCTIONS[expr.function])
            case _ if expr.function in INSTANT_FUNCTIONS:
                arguments = [self._value(argument) for argument in expr.arguments]
                return INSTANT_FUNCTIONS[expr.function](self.steps, arguments)
            case _:
                raise ConfigError(
                    "promql.unsupported",
                    f"{expr.function}() of this argument: valid PromQL that this version of pgherd doesn't evaluate",
                    feature=expr.function,
                )

    def _over_range(self, node: MatrixSelector, info: RangeFunctionInfo) -> VectorGrid:
        grid = self._windowed(node, info.compute, info.samples_min)
        return grid if info.keeps_name else grid.nameless()

    def _windowed(self, node: MatrixSelector, compute: RangeFunction, samples_min: int) -> VectorGrid:
        at_ms = self.steps - node.selector.offset_ms
        return range_vector(self._selection(node), at_ms, node.range_ms, compute, samples_min, self.limits.checkpoint)

    def _quantile(self, quantile: ScalarGrid, node: MatrixSelector) -> VectorGrid:
        return self._windowed(node, partial(self._quantile_of, quantile, node.selector.offset_ms), 1).nameless()

    def _quantile_of(self, quantile: ScalarGrid, offset_ms: int, window: RangeWindow) -> Floats:
        steps = np.searchsorted(self.steps, window.end_ms + offset_ms)
        return quantile_of(window, quantile.values[steps])

    def _absence(self, operand: Expr, vector: VectorGrid) -> VectorGrid:
        """1 with the labels that the selector fixes, wherever the vector has no element."""
        missing = ~vector.inhabited_steps()[np.newaxis, :]
        return VectorGrid([_fixed_labels(operand)], np.ones(missing.shape), missing).inhabited()


def _fixed_labels(operand: Expr) -> Labels:
    """Labels that equality matchers of a selector determine, each given by exactly one matcher."""
    selector = operand.selector if isinstance(operand, MatrixSelector) else operand
    if not isinstance(selector, VectorSelector):
        return ()
    fixed: dict[str, str] = {}
    seen: set[str] = {NAME_LABEL}
    for matcher in selector.matchers:
        if matcher.op is MatchOp.EQUAL and matcher.name not in seen:
            fixed[matcher.name] = matcher.value
            seen.add(matcher.name)
        else:
            fixed.pop(matcher.name, None)
    return tuple(sorted((name, value) for name, value in fixed.items() if value))

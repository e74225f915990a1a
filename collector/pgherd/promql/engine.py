"""The evaluator: parse, fetch what every selector needs, evaluate all steps at once.

Pure: time comes in as arguments, samples from a `SeriesSource`, the deadline as `Limits.checkpoint`.

Properties that hold for every expression (tests/unit/test_promql_properties.py):
- a range query equals the instant queries at each of its steps;
- a result never has two elements with equal labels at one step;
- the source is asked once per distinct selector and time range, and before anything is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pgherd.promql.aggregate import aggregate
from pgherd.promql.annotations import Annotations
from pgherd.promql.ast import (
    Aggregate,
    AggregateOp,
    Binary,
    Call,
    Expr,
    MatrixSelector,
    Negation,
    NumberLiteral,
    StringLiteral,
    Subquery,
    ValueType,
    VectorSelector,
    value_type,
)
from pgherd.promql.choices import choose, count_values
from pgherd.promql.fetch import Fetch, fetch_all, fetch_of, too_many_samples
from pgherd.promql.functions import INSTANT_FUNCTIONS, Setting, as_scalar, as_text, as_vector
from pgherd.promql.grid import Grid, Integers, Labels, ScalarGrid, StringValue, VectorGrid
from pgherd.promql.matching import combine, combine_sets
from pgherd.promql.moments import Horizon, inner_steps, looked_at
from pgherd.promql.operators import between_scalars, with_scalar
from pgherd.promql.parse import parse
from pgherd.promql.quantiles import judge_quantile
from pgherd.promql.range_functions import RANGE_FUNCTIONS, RangeFunctionInfo
from pgherd.promql.source import SeriesSource
from pgherd.promql.values import Matrix, Scalar, Series, String, Value, Vector, VectorSample
from pgherd.promql.windows import Checkpoint, Selection, arrange, as_selection, instant_vector, newest_times, range_vector
from pgherd.proto.errors import ConfigError, InvariantError, PreconditionError
from pgherd.proto.selectors import NAME_LABEL, MatchOp

# Metrics whose names say that they only grow; Prometheus informs when rate() meets another.
_COUNTER_SUFFIXES = ("_total", "_sum", "_count", "_bucket")
_CHOICES = frozenset((AggregateOp.TOPK, AggregateOp.BOTTOMK, AggregateOp.LIMITK))


def no_checkpoint() -> None:
    """The checkpoint of an evaluation without a deadline."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds and defaults of one evaluation.

    `samples_max` bounds the samples fetched and the cells (series × steps) held at any moment, subqueries included.
    `subquery_step_ms` is the resolution of subqueries that name none. `checkpoint` is called between nodes and between
    chunks of work; it raises (`query.timeout`) to end the evaluation.
    """

    lookback_ms: int = 300_000
    subquery_step_ms: int = 60_000
    samples_max: int = 50_000_000
    points_per_series_max: int = 11_000
    checkpoint: Checkpoint = no_checkpoint


DEFAULT_LIMITS = Limits()


def evaluate_instant(
    expr_text: str,
    at_ms: int,
    source: SeriesSource,
    limits: Limits = DEFAULT_LIMITS,
    annotations: Annotations | None = None,
) -> Value:
    """The value of an expression at one moment; warnings and infos go into `annotations`.

    Raises `promql.parse`, `promql.unsupported`, `promql.execution` (labels that collide), `promql.limit`, and whatever
    the source and the checkpoint raise.
    """
    expr = parse(expr_text)
    evaluation = _prepare(expr, np.array([at_ms], dtype=np.int64), source, limits, annotations)
    if value_type(expr) is ValueType.MATRIX:
        return evaluation.samples_of(expr)
    match evaluation.run(expr):
        case StringValue(value=text):
            return String(at_ms, text)
        case ScalarGrid(values=values):
            return Scalar(at_ms, float(values[0]))
        case VectorGrid() as grid:
            found = zip(grid.labels, grid.present[:, 0].tolist(), grid.values[:, 0].tolist(), strict=True)
            return Vector(at_ms, [VectorSample(dict(labels), value) for labels, present, value in found if present])


def evaluate_range(
    expr_text: str,
    start_ms: int,
    end_ms: int,
    step_ms: int,
    source: SeriesSource,
    limits: Limits = DEFAULT_LIMITS,
    annotations: Annotations | None = None,
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
    result = _prepare(expr, steps, source, limits, annotations).run(expr)
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


def _prepare(expr: Expr, steps: Integers, source: SeriesSource, limits: Limits, annotations: Annotations | None) -> _Evaluation:
    """Fetch for every selector of the expression."""
    horizon = Horizon(int(steps[0]), int(steps[-1]), limits.lookback_ms, limits.subquery_step_ms, limits.samples_max)
    selections, fetched = fetch_all(expr, steps, horizon, source, limits.samples_max, limits.checkpoint)
    setting = Setting(steps, annotations if annotations is not None else Annotations())
    return _Evaluation(setting, horizon, limits, selections, _Held(fetched))


@dataclass(slots=True)
class _Held:
    """How many samples and cells are in memory now."""

    cells: int


@dataclass(frozen=True, slots=True)
class _Evaluation:
    """One query in progress: its steps and everything it fetched. A subquery is an evaluation of its own."""

    setting: Setting
    horizon: Horizon
    limits: Limits
    selections: Mapping[Fetch, Selection]
    held: _Held

    @property
    def steps(self) -> Integers:
        return self.setting.steps

    def run(self, expr: Expr) -> Grid:
        """The whole expression."""
        with np.errstate(all="ignore"):  # Inf and NaN are answers here, not accidents
            try:
                return self._value(expr)
            except RecursionError:
                raise PreconditionError("promql.limit", "the expression is nested too deeply to be evaluated") from None
            except MemoryError:
                raise PreconditionError("promql.limit", "the query needs more memory than there is") from None

    def samples_of(self, node: Expr) -> Matrix:
        """The samples of a range selector or a subquery, as an instant query of it answers."""
        if not isinstance(node, MatrixSelector | Subquery):
            raise InvariantError("invariant.broken", f"{type(node).__name__} has no samples")
        with np.errstate(all="ignore"):
            selection = self._samples(node)
        end_ms = int(looked_at(_placed(node), self.steps, self.horizon)[0])
        found: list[tuple[Labels, Series]] = []
        for block in selection.blocks:
            inside = (block.times_ms > end_ms - node.range_ms) & (block.times_ms <= end_ms)
            if not inside.any():
                continue
            for row, values in zip(block.rows, block.values, strict=True):
                labels = selection.labels[row]
                found.append((labels, Series(dict(labels), block.times_ms[inside], values[inside])))
        return Matrix([series for _, series in sorted(found, key=lambda pair: pair[0])])

    def _value(self, expr: Expr) -> Grid:
        """A node's value. Its operands are let go of when it is known; until then they count as held."""
        self.limits.checkpoint()
        before = self.held.cells
        grid = self._computed(expr)
        self.held.cells = before + (0 if isinstance(grid, StringValue) else grid.values.size)
        if self.held.cells > self.limits.samples_max:
            raise too_many_samples(self.limits.samples_max)
        return grid

    def _computed(self, expr: Expr) -> Grid:
        match expr:
            case NumberLiteral():
                return ScalarGrid(np.full(len(self.steps), expr.value))
            case StringLiteral():
                return StringValue(expr.value)
            case VectorSelector():
                moments_ms = looked_at(expr, self.steps, self.horizon)
                return instant_vector(self._fetched(expr), moments_ms, self.limits.lookback_ms, self.limits.checkpoint)
            case Negation():
                return self._negation(expr)
            case Binary():
                return self._binary(expr)
            case Aggregate():
                return self._aggregate(expr)
            case Call():
                return self._call(expr)
            case MatrixSelector() | Subquery():
                raise InvariantError("invariant.broken", "a range vector outside of a function")

    def _fetched(self, node: VectorSelector | MatrixSelector) -> Selection:
        return self.selections[fetch_of(node, self.steps, self.horizon)]

    def _samples(self, node: MatrixSelector | Subquery) -> Selection:
        """What a range function reads: fetched samples, or a subquery's values at its own steps."""
        if isinstance(node, MatrixSelector):
            return self._fetched(node)
        steps = inner_steps(node, self.steps, self.horizon)
        if not len(steps):
            return arrange((), drop_stale=True)
        inner = replace(self, setting=replace(self.setting, steps=steps))
        return as_selection(as_vector(inner._value(node.operand)), steps)

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
        cells_max = self.limits.samples_max
        sides = as_vector(left), as_vector(right)
        return combine(expr.op, *sides, expr.matching, return_bool=expr.return_bool, cells_max=cells_max)

    def _aggregate(self, expr: Aggregate) -> VectorGrid:
        if expr.parameter is None:
            return aggregate(expr, as_vector(self._value(expr.operand)))
        parameter, vector = self._value(expr.parameter), as_vector(self._value(expr.operand))
        if expr.op is AggregateOp.COUNT_VALUES:
            return count_values(expr, as_text(parameter), vector, self.limits.samples_max, self.limits.checkpoint)
        if expr.op in _CHOICES:
            return choose(expr, as_scalar(parameter).values, vector)
        quantile = as_scalar(parameter).values
        if len(vector.labels):
            judge_quantile(quantile, self.setting.annotations)
        return aggregate(expr, vector, quantile)

    def _call(self, expr: Call) -> Grid:
        match expr:
            case Call(function="absent", arguments=(operand,)):
                return self._absence(operand, as_vector(self._value(operand)))
            case Call(function="absent_over_time", arguments=(MatrixSelector() | Subquery() as operand,)):
                return self._absence(operand, self._over_range(operand, RANGE_FUNCTIONS["present_over_time"], ()))
            case Call(function="timestamp", arguments=(VectorSelector() as operand,)):
                moments_ms = looked_at(operand, self.steps, self.horizon)
                return newest_times(self._fetched(operand), moments_ms, self.limits.lookback_ms).nameless()
            case _ if expr.function in RANGE_FUNCTIONS:
                return self._range_call(expr)
            case _ if expr.function in INSTANT_FUNCTIONS:
                arguments = [self._value(argument) for argument in expr.arguments]
                return INSTANT_FUNCTIONS[expr.function](self.setting, arguments)
            case _:
                raise InvariantError("invariant.broken", f"{expr.function}() passed the parser")

    def _range_call(self, expr: Call) -> VectorGrid:
        """A function of one range vector and perhaps some scalars."""
        (node,) = (argument for argument in expr.arguments if isinstance(argument, MatrixSelector | Subquery))
        scalars = [as_scalar(self._value(argument)) for argument in expr.arguments if argument is not node]
        if expr.function == "quantile_over_time":
            judge_quantile(scalars[0].values, self.setting.annotations)
        return self._over_range(node, RANGE_FUNCTIONS[expr.function], scalars)

    def _over_range(
        self, node: MatrixSelector | Subquery, info: RangeFunctionInfo, scalars: Sequence[ScalarGrid]
    ) -> VectorGrid:
        grid = range_vector(
            self._samples(node),
            self.steps,
            looked_at(_placed(node), self.steps, self.horizon),
            node.range_ms,
            lambda window: info.compute(window, *(scalar.values[window.steps] for scalar in scalars)),
            info.samples_min,
            self.limits.checkpoint,
        )
        if info.wants_counter:
            self._judge_counters(grid)
        return grid if info.keeps_name else grid.nameless()

    def _judge_counters(self, grid: VectorGrid) -> None:
        for name in sorted({dict(labels).get(NAME_LABEL, "") for labels in grid.labels}):
            if name and not name.endswith(_COUNTER_SUFFIXES):
                self.setting.annotations.inform(
                    f'metric might not be a counter, name does not end in _total/_sum/_count/_bucket: "{name}"'
                )

    def _absence(self, operand: Expr, vector: VectorGrid) -> VectorGrid:
        """1 with the labels that the selector fixes, wherever the vector has no element."""
        missing = ~vector.inhabited_steps()[np.newaxis, :]
        return VectorGrid([_fixed_labels(operand)], np.ones(missing.shape), missing).inhabited()


def _placed(node: MatrixSelector | Subquery) -> VectorSelector | Subquery:
    """What carries a range vector's offset and `@`."""
    return node.selector if isinstance(node, MatrixSelector) else node


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

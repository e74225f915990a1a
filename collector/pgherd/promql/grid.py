"""What evaluation passes around: values of every step of a query at once.

An instant query is a range query of one step, so there is one evaluator. Shapes: S series, T steps. Cells where
`present` is False hold no sample and their value means nothing; a NaN in a present cell is a value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pgherd.proto.errors import PreconditionError
from pgherd.proto.selectors import NAME_LABEL

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Integers = NDArray[np.int64]

# Sorted by name, without empty values: equal label sets are equal tuples.
Labels = tuple[tuple[str, str], ...]


def to_labels(mapping: Mapping[str, str]) -> Labels:
    """The canonical tuple of a label mapping."""
    return tuple(sorted((name, value) for name, value in mapping.items() if value))


def without_name(labels: Labels) -> Labels:
    """The labels less the metric name."""
    return tuple(pair for pair in labels if pair[0] != NAME_LABEL)


def show_labels(labels: Labels) -> str:
    """A label set as error messages print it."""
    return "{" + ", ".join(f'{name}="{value}"' for name, value in labels) + "}"


@dataclass(frozen=True, slots=True, eq=False)
class ScalarGrid:
    """One float per step; `values` is (T,)."""

    values: Floats


@dataclass(frozen=True, slots=True, eq=False)
class StringValue:
    """A string, the same at every step."""

    value: str


@dataclass(frozen=True, slots=True, eq=False)
class VectorGrid:
    """An instant vector per step: `values` and `present` are (S, T), `labels` has S entries."""

    labels: Sequence[Labels]
    values: Floats
    present: Bools

    @classmethod
    def empty(cls, steps: int) -> VectorGrid:
        """No series at all."""
        return cls((), np.empty((0, steps)), np.empty((0, steps), dtype=np.bool_))

    def rows(self, chosen: Sequence[int] | NDArray[np.intp]) -> VectorGrid:
        """Only these series, in this order."""
        index = np.asarray(chosen, dtype=np.intp)
        return VectorGrid([self.labels[row] for row in index], self.values[index], self.present[index])

    def inhabited(self) -> VectorGrid:
        """Only series with at least one sample."""
        alive = self.present.any(axis=1)
        return self if alive.all() else self.rows(np.flatnonzero(alive))

    def inhabited_steps(self) -> Bools:
        """(T,): where at least one series has a sample."""
        alive: Bools = np.logical_or.reduce(self.present, axis=0)
        return alive

    def nameless(self) -> VectorGrid:
        """The same samples without metric names; series that become equal are merged (see `merged`)."""
        return merged(VectorGrid([without_name(labels) for labels in self.labels], self.values, self.present))


Grid = ScalarGrid | StringValue | VectorGrid


def merged(grid: VectorGrid) -> VectorGrid:
    """Series with equal labels become one, as long as they have no sample at the same step.

    Raises `promql.execution` where two would answer for the same step.
    """
    if len(set(grid.labels)) == len(grid.labels):
        return grid
    positions: dict[Labels, int] = {}
    groups = np.array([positions.setdefault(labels, len(positions)) for labels in grid.labels], dtype=np.intp)
    values = np.zeros((len(positions), grid.values.shape[1]))
    present = np.zeros(values.shape, dtype=np.bool_)
    for row, group in enumerate(groups):
        mine = grid.present[row]
        if (present[group] & mine).any():
            raise PreconditionError(
                "promql.execution",
                f"vector cannot contain metrics with the same labelset: {show_labels(grid.labels[row])}",
                hint="two series differ only in their metric name or in a label that this expression drops",
            )
        values[group] = np.where(mine, grid.values[row], values[group])
        present[group] |= mine
    return VectorGrid(list(positions), values, present)

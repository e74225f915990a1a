"""Binary operators between two vectors: elements meet by the labels that the matching compares.

Every step of a query is matched on its own (a series that is absent at a step can't collide there), though all
steps are computed at once. Source: Prometheus documentation, "Vector matching".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pgherd.promql.aggregate import group_keys
from pgherd.promql.ast import BinaryOp, Matching
from pgherd.promql.grid import Bools, Floats, Labels, VectorGrid, merged, show_labels, without_name
from pgherd.promql.operators import calculate, compare
from pgherd.proto.errors import PreconditionError

_HINT = "add the distinguishing labels to on(...), or aggregate one side first"


def one_to_one(op: BinaryOp, left: VectorGrid, right: VectorGrid, matching: Matching, *, return_bool: bool) -> VectorGrid:
    """Arithmetic or comparison between the elements that match.

    Raises `promql.execution` where two elements of one side belong to the same match group at the same step.
    """
    left_keys, right_keys = _signatures(left, matching), _signatures(right, matching)
    partners = _unique_by_key(right, right_keys, needed=left.inhabited_steps())
    rows = [row for row, key in enumerate(left_keys) if key in partners]
    if not rows:
        return VectorGrid.empty(left.values.shape[1])
    mine = left.rows(rows)
    keys = [left_keys[row] for row in rows]
    other_values = np.stack([partners[key][0] for key in keys])
    present = mine.present & np.stack([partners[key][1] for key in keys])
    if op.is_comparison:
        holds = compare(op, mine.values, other_values)
        values = holds.astype(np.float64) if return_bool else mine.values
        present = present if return_bool else present & holds
    else:
        values = calculate(op, mine.values, other_values)
    _refuse_collisions(keys, present)
    keeps_name = op.is_comparison and not return_bool
    labels = [_result_labels(labels, matching, keeps_name=keeps_name) for labels in mine.labels]
    return merged(VectorGrid(labels, values, present).inhabited())


def combine_sets(op: BinaryOp, left: VectorGrid, right: VectorGrid, matching: Matching) -> VectorGrid:
    """`and`, `or`, `unless`: many to many, by presence only; values and labels stay as they are."""
    left_keys, right_keys = _signatures(left, matching), _signatures(right, matching)
    if op is BinaryOp.OR:
        extra = right.present & ~_presence(right_keys, left_keys, left.present)
        return merged(
            VectorGrid(
                [*left.labels, *right.labels],
                np.concatenate((left.values, right.values)),
                np.concatenate((left.present, extra)),
            ).inhabited()
        )
    matched = _presence(left_keys, right_keys, right.present)
    present = left.present & (matched if op is BinaryOp.AND else ~matched)
    return VectorGrid(left.labels, left.values, present).inhabited()


def _signatures(grid: VectorGrid, matching: Matching) -> list[Labels]:
    return group_keys(grid.labels, matching.labels, without=not matching.on)


def _result_labels(labels: Labels, matching: Matching, *, keeps_name: bool) -> Labels:
    named = labels if keeps_name else without_name(labels)
    chosen = frozenset(matching.labels)
    return tuple(pair for pair in named if (pair[0] in chosen) is matching.on)


def _unique_by_key(grid: VectorGrid, keys: Sequence[Labels], needed: Bools) -> dict[Labels, tuple[Floats, Bools]]:
    """One (values, present) pair per match group; several series may share a group at different steps.

    Collisions count only at steps where the other side has anything to match (`needed`).
    """
    found: dict[Labels, tuple[Floats, Bools]] = {}
    for row, key in enumerate(keys):
        values, present = grid.values[row], grid.present[row]
        known = found.get(key)
        if known is None:
            found[key] = (values, present)
            continue
        if (known[1] & present & needed).any():
            raise PreconditionError(
                "promql.execution",
                f"found duplicate series for the match group {show_labels(key)} on the right hand-side of the operation: "
                f"{show_labels(grid.labels[row])} and another; many-to-many matching not allowed: "
                "matching labels must be unique on one side",
                hint=_HINT,
            )
        found[key] = (np.where(present, values, known[0]), known[1] | present)
    return found


def _refuse_collisions(keys: Sequence[Labels], present: Bools) -> None:
    """Two results of one match group at the same step mean that the left side wasn't unique."""
    seen: dict[Labels, Bools] = {}
    for row, key in enumerate(keys):
        known = seen.get(key)
        if known is not None and (known & present[row]).any():
            raise PreconditionError(
                "promql.execution",
                "multiple matches for labels: many-to-one matching must be explicit (group_left/group_right), "
                f"match group {show_labels(key)}",
                hint=_HINT,
            )
        seen[key] = present[row] if known is None else known | present[row]


def _presence(keys: Sequence[Labels], other_keys: Sequence[Labels], other_present: Bools) -> Bools:
    """For each of `keys`, at which steps the other side has an element of the same match group."""
    groups: dict[Labels, NDArray[np.bool_]] = {}
    for row, key in enumerate(other_keys):
        known = groups.get(key)
        groups[key] = other_present[row] if known is None else known | other_present[row]
    result = np.zeros((len(keys), other_present.shape[1]), dtype=np.bool_)
    for row, key in enumerate(keys):
        if key in groups:
            result[row] = groups[key]
    return result

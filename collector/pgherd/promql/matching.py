"""Binary operators between two vectors: elements meet by the labels that the matching compares.

Every step of a query is matched on its own (a series that is absent at a step can't collide there), though all
steps are computed at once. Source: Prometheus documentation, "Vector matching".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pgherd.promql.aggregate import group_keys
from pgherd.promql.ast import BinaryOp, ManySide, Matching
from pgherd.promql.grid import Bools, Floats, Labels, VectorGrid, merged, show_labels, without_name
from pgherd.promql.operators import calculate, compare
from pgherd.proto.errors import PreconditionError

_HINT = "add the distinguishing labels to on(...), or aggregate one side first"


def combine(
    op: BinaryOp, left: VectorGrid, right: VectorGrid, matching: Matching, *, return_bool: bool, cells_max: int
) -> VectorGrid:
    """Arithmetic or comparison between the elements that match.

    Raises `promql.execution` where two elements of the side that must be unique belong to the same match group at the
    same step, or two results would be equal in their labels; `promql.limit` for more than `cells_max` possible results.
    """
    swapped = matching.many is ManySide.RIGHT
    many, one = (right, left) if swapped else (left, right)
    many_keys, one_keys = _signatures(many, matching), _signatures(one, matching)
    partners = _partners(one, one_keys, matching, needed=many.inhabited_steps(), side="left" if swapped else "right")
    if sum(len(partners.get(key, ())) for key in many_keys) * many.values.shape[1] > cells_max:
        raise PreconditionError("promql.limit", f"matching two vectors could give more than {cells_max} results")
    pairs = [(row, partner) for row, key in enumerate(many_keys) for partner in partners.get(key, ())]
    pairs = [(row, partner) for row, partner in pairs if bool((many.present[row] & partner.present).any())]
    if not pairs:
        return VectorGrid.empty(many.values.shape[1])
    mine = many.rows([row for row, _ in pairs])
    keys = [many_keys[row] for row, _ in pairs]
    theirs = np.stack([partner.values for _, partner in pairs])
    present = mine.present & np.stack([partner.present for _, partner in pairs])
    keeps_name = op.is_comparison and not return_bool
    labels = [
        _result_labels(series, matching, partner.include, keeps_name=keeps_name)
        for series, (_, partner) in zip(mine.labels, pairs, strict=True)
    ]
    # Before a comparison filters: whether a query is wrong doesn't depend on the values it meets.
    _refuse_collisions(keys, labels, present, matching)
    first, second = (theirs, mine.values) if swapped else (mine.values, theirs)
    if op.is_comparison:
        holds = compare(op, first, second)
        values = holds.astype(np.float64) if return_bool else first
        present = present if return_bool else present & holds
    else:
        values = calculate(op, first, second)
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


def _result_labels(labels: Labels, matching: Matching, include: Labels, *, keeps_name: bool) -> Labels:
    named = labels if keeps_name else without_name(labels)
    if matching.many is None:
        chosen = frozenset(matching.labels)
        return tuple(pair for pair in named if (pair[0] in chosen) is matching.on)
    if not matching.include:
        return named
    return tuple(sorted([*(pair for pair in named if pair[0] not in matching.include), *include]))


@dataclass(frozen=True, slots=True, eq=False)
class _Partner:
    """What one match group has on its unique side: values and presence per step, and the labels it passes on."""

    values: Floats
    present: Bools
    include: Labels


def _partners(
    grid: VectorGrid, keys: Sequence[Labels], matching: Matching, *, needed: Bools, side: str
) -> dict[Labels, list[_Partner]]:
    """One partner per match group and labels passed on; several series may share a group at different steps.

    Collisions count only at steps where the other side has anything to match (`needed`).
    """
    found: dict[Labels, dict[Labels, _Partner]] = {}
    taken: dict[Labels, tuple[Bools, int]] = {}
    for row, key in enumerate(keys):
        values, present = grid.values[row], grid.present[row]
        known, before = taken.get(key, (None, row))
        if known is not None and bool((known & present & needed).any()):
            raise PreconditionError(
                "promql.execution",
                f"found duplicate series for the match group {show_labels(key)} on the {side} hand-side of the operation: "
                f"[{show_labels(grid.labels[row])}, {show_labels(grid.labels[before])}];many-to-many matching not allowed: "
                "matching labels must be unique on one side",
                hint=_HINT,
            )
        taken[key] = (present if known is None else known | present, row)
        include = tuple(pair for pair in grid.labels[row] if pair[0] in matching.include)
        group = found.setdefault(key, {})
        same = group.get(include)
        if same is not None:
            values, present = np.where(present, values, same.values), same.present | present
        group[include] = _Partner(values, present, include)
    return {key: list(group.values()) for key, group in found.items()}


def _refuse_collisions(keys: Sequence[Labels], labels: Sequence[Labels], present: Bools, matching: Matching) -> None:
    """Results of one match group at the same step must differ: there is one, or the many side's labels tell them apart."""
    seen: dict[tuple[Labels, Labels], Bools] = {}
    for row, key in enumerate(keys):
        identity = (key, () if matching.many is None else labels[row])
        known = seen.get(identity)
        if known is not None and bool((known & present[row]).any()):
            reason = (
                "many-to-one matching must be explicit (group_left/group_right)"
                if matching.many is None
                else "grouping labels must ensure unique matches"
            )
            raise PreconditionError(
                "promql.execution", f"multiple matches for labels: {reason}, match group {show_labels(key)}", hint=_HINT
            )
        seen[identity] = present[row] if known is None else known | present[row]


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

"""Functions that change labels and orders by labels. Source: Prometheus documentation, "label_replace()" and relatives.

Regular expressions are RE2, as in Prometheus: time linear in the input, whatever a dashboard asks. Arrow carries it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cmp_to_key

import pyarrow as pa
import pyarrow.compute as pc

from pgherd.promql.grid import Labels, VectorGrid, merged
from pgherd.proto.errors import PreconditionError

PATTERN_CHARS_MAX = 16_384
_REFERENCE = re.compile(r"\$(?:\$|(\w+)|\{(\w+)\})")
_CHUNK = re.compile(r"\d+|\D+", re.ASCII)
# What may hold a parenthesis that opens no group, and what does open one.
_PATTERN_TOKEN = re.compile(
    r"""\\Q.*?(?:\\E|\Z)                             # quoted text
      | \\.                                        # an escaped character
      | \[\^?\]?(?:\[:\^?\w+:\]|\\.|[^\]\\])*\]     # a class of characters
      | (?P<open>\()(?P<special>\?(?:P?<(?P<name>[^>]*)>)?)?""",
    re.VERBOSE | re.DOTALL,
)


def label_replace(grid: VectorGrid, target: str, replacement: str, source: str, pattern: str) -> VectorGrid:
    """Set `target` to the replacement, with `$1` or `${name}` of the match, where `source` matches the whole pattern.

    Raises `promql.execution` for a bad pattern or label name and for labels that collide.
    """
    _check_label(target, "destination label name in label_replace()")
    values = [dict(series).get(source, "") for series in grid.labels]
    matches = dict(_matches(pattern, sorted(set(values))))
    labels = []
    for series, value in zip(grid.labels, values, strict=True):
        groups = matches[value]
        labels.append(series if groups is None else _with(series, target, _expanded(replacement, groups)))
    return merged(VectorGrid(labels, grid.values, grid.present))


def label_join(grid: VectorGrid, target: str, separator: str, sources: Sequence[str]) -> VectorGrid:
    """Set `target` to the values of the source labels with a separator between them."""
    for source in sources:
        _check_label(source, "source label name in label_join()")
    _check_label(target, "destination label name in label_join()")
    labels = []
    for series in grid.labels:
        known = dict(series)
        labels.append(_with(series, target, separator.join(known.get(source, "") for source in sources)))
    return merged(VectorGrid(labels, grid.values, grid.present))


def sorted_by_labels(grid: VectorGrid, names: Sequence[str], *, descending: bool) -> VectorGrid:
    """By the values of these labels, numbers within them as numbers, then by all labels."""

    def compare(left: int, right: int) -> int:
        mine, theirs = dict(grid.labels[left]), dict(grid.labels[right])
        for name in names:
            order = _natural_order(mine.get(name, ""), theirs.get(name, ""))
            if order:
                return order
        return (grid.labels[left] > grid.labels[right]) - (grid.labels[left] < grid.labels[right])

    return grid.rows(sorted(range(len(grid.labels)), key=cmp_to_key(compare), reverse=descending))


def _natural_order(left: str, right: str) -> int:
    if left == right:
        return 0
    for mine, theirs in zip(_CHUNK.findall(left), _CHUNK.findall(right), strict=False):
        if mine == theirs:
            continue
        if mine[0].isdigit() and theirs[0].isdigit():
            if int(mine[:100]) != int(theirs[:100]):
                return -1 if int(mine[:100]) < int(theirs[:100]) else 1
            continue
        return -1 if mine < theirs else 1
    return -1 if (len(left), left) < (len(right), right) else 1


def _check_label(name: str, what: str) -> None:
    if not name:
        raise PreconditionError("promql.execution", f"invalid {what}: {name}")


def _matches(pattern: str, values: Sequence[str]) -> list[tuple[str, Mapping[str, str] | None]]:
    """For each value the groups of its match, by number and name; None where the whole pattern doesn't match."""
    if len(pattern) > PATTERN_CHARS_MAX:
        raise _bad_pattern(pattern, f"longer than {PATTERN_CHARS_MAX} characters")
    named, references = _with_own_names(pattern)
    try:
        # Alone first: "a)|(b" must not become valid by our parentheses.
        pc.match_substring_regex(pa.array([""], pa.string()), pattern)
        found = pc.extract_regex(pa.array(values, pa.string()), f"^(?s:(?P<__0>{named}))$").to_pylist()
    except pa.ArrowInvalid as error:
        raise _bad_pattern(pattern, str(error)) from None
    return [
        (value, None if groups is None else {reference: groups[name] for reference, name in references.items()})
        for value, groups in zip(values, found, strict=True)
    ]


def _with_own_names(pattern: str) -> tuple[str, Mapping[str, str]]:
    """The pattern with a name of ours for every group, since Arrow tells no others, and ours by what a template may call it.

    A template never sees ours: `$__1` is a group that doesn't exist, unless the pattern names one so.
    """
    numbers, given = {"0": "__0"}, {}

    def named(token: re.Match[str]) -> str:
        if not token["open"] or token["special"] == "?":
            return token[0]
        number = str(len(numbers))
        numbers[number] = f"__{number}"
        if token["name"]:
            given[token["name"]] = numbers[number]
        return f"(?P<{numbers[number]}>"

    own = _PATTERN_TOKEN.sub(named, pattern)
    return own, numbers | given


def _bad_pattern(pattern: str, reason: str) -> PreconditionError:
    return PreconditionError(
        "promql.execution",
        f"invalid regular expression in label_replace(): {pattern[:64]}: {reason}",
        hint="it takes RE2 syntax",
    )


def _expanded(template: str, groups: Mapping[str, str]) -> str:
    """The template with the match's groups; a group that doesn't exist or took no part is empty, as in Go."""
    return _REFERENCE.sub(lambda found: _group(found[1] or found[2], groups), template)


def _group(name: str | None, groups: Mapping[str, str]) -> str:
    if name is None:
        return "$"
    known = groups.get(name.lstrip("0") or "0" if name.isdigit() else name)
    return known or ""


def _with(labels: Labels, name: str, value: str) -> Labels:
    """The labels with one set, or removed when the value is empty."""
    others = [pair for pair in labels if pair[0] != name]
    return tuple(sorted([*others, (name, value)])) if value else tuple(others)

"""Selectors: from fetched samples to values per step.

Series that share their timestamps (an agent stamps a whole cycle once) are kept as one block, so that one
binary search serves all of them and every later operation runs over two dimensions.

Intervals are left-open as in Prometheus 3: a sample exactly `range` or `lookback` old is outside.
A stale marker ends a series for instant selectors and doesn't exist for range selectors.
Source: Prometheus documentation, "Querying basics" (staleness), "Prometheus 3.0 migration guide" (left-open ranges).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pgherd.promql.grid import Bools, Floats, Integers, Labels, VectorGrid, to_labels
from pgherd.promql.source import SeriesWindow
from pgherd.proto.samples import STALE_NAN_BITS

# Samples looked at between two checkpoints, a sample counting once for every range that it is in; bounds temporaries too.
_CHUNK_SAMPLES = 4_000_000
# How many recent timestamp arrays of equal length and ends a series is compared with.
_CANDIDATES_MAX = 4

Checkpoint = Callable[[], None]


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Series with common timestamps: `values` is (S, N), `times_ms` (N,), `rows` their places in the selection."""

    rows: NDArray[np.intp]
    times_ms: Integers
    values: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """What one selector fetched; `labels` are in label order, each of them in exactly one block or in none."""

    labels: Sequence[Labels]
    blocks: Sequence[Block]


@dataclass(frozen=True, slots=True, eq=False)
class RangeWindow:
    """The samples of a block within each step's range, T steps of at least one sample each.

    Column t covers `values[:, low[t]:high[t]]` of the interval `(start_ms[t], end_ms[t]]`. It belongs to the step
    `steps[t]` of the evaluation, whose own time is `at_ms[t]` (an offset or `@` moves the interval away from it).
    """

    times_ms: Integers
    values: Floats
    low: Integers
    high: Integers
    start_ms: Integers
    end_ms: Integers
    steps: NDArray[np.intp]
    at_ms: Integers

    @property
    def counts(self) -> Integers:
        """Samples per step."""
        return self.high - self.low

    def rounds(self) -> Iterator[tuple[slice | Integers, Integers]]:
        """The first sample of every range, then the second of those that have one, …: (columns, places of the samples)."""
        counts = self.counts
        everywhere = int(counts.min())
        for place in range(int(counts.max())):
            columns = slice(None) if place < everywhere else np.flatnonzero(counts > place)
            yield columns, self.low[columns] + place


# A function of a range vector: (S, T) values for a window whose steps all hold enough samples.
RangeFunction = Callable[[RangeWindow], Floats]


def is_stale(values: Floats) -> Bools:
    """Where the bits are Prometheus' staleness marker."""
    stale: Bools = np.ascontiguousarray(values).view(np.uint64) == STALE_NAN_BITS
    return stale


def arrange(series: Sequence[SeriesWindow], *, drop_stale: bool) -> Selection:
    """Order fetched series by labels and gather those with equal timestamps into blocks."""
    ordered = sorted(((to_labels(window.labels), window) for window in series), key=lambda pair: pair[0])
    entries = [(row, window.times_ms, window.values) for row, (_, window) in enumerate(ordered)]
    blocks = list(_blocks(entries))
    if drop_stale:
        blocks = [left for block in blocks for left in _without_stale(block)]
    return Selection([labels for labels, _ in ordered], blocks)


def _blocks(entries: Sequence[tuple[int, Integers, Floats]]) -> Iterator[Block]:
    groups: dict[tuple[int, int, int], list[tuple[Integers, list[int], list[Floats]]]] = {}
    for row, times, values in entries:
        if not len(times):
            continue
        candidates = groups.setdefault((len(times), int(times[0]), int(times[-1])), [])
        for known, rows, columns in candidates[-_CANDIDATES_MAX:]:
            if known is times or np.array_equal(known, times):
                rows.append(row)
                columns.append(values)
                break
        else:
            candidates.append((times, [row], [values]))
    for candidates in groups.values():
        for times, rows, columns in candidates:
            yield Block(np.array(rows, dtype=np.intp), times, np.stack(columns))


def _without_stale(block: Block) -> Iterator[Block]:
    """The block less its stale markers: series with some get times of their own."""
    stale = is_stale(block.values)
    marked = stale.any(axis=1)
    if not marked.any():
        yield block
        return
    if not marked.all():
        yield Block(block.rows[~marked], block.times_ms, block.values[~marked])
    kept = ~stale
    yield from _blocks(
        [(int(block.rows[row]), block.times_ms[kept[row]], block.values[row][kept[row]]) for row in np.flatnonzero(marked)]
    )


def instant_vector(selection: Selection, at_ms: Integers, lookback_ms: int, checkpoint: Checkpoint) -> VectorGrid:
    """The newest sample in `(t - lookback, t]` of every series, unless it is a stale marker."""
    values = np.zeros((len(selection.labels), len(at_ms)))
    present = np.zeros(values.shape, dtype=np.bool_)
    for block in selection.blocks:
        newest = np.searchsorted(block.times_ms, at_ms, side="right") - 1
        steps = np.flatnonzero((newest >= 0) & (block.times_ms[np.maximum(newest, 0)] > at_ms - lookback_ms))
        for rows, part in _chunks(block, len(steps)):
            checkpoint()
            found = part[:, newest[steps]]
            values[np.ix_(rows, steps)] = found
            present[np.ix_(rows, steps)] = ~is_stale(found)
    return VectorGrid(selection.labels, values, present).inhabited()


def newest_times(selection: Selection, at_ms: Integers, lookback_ms: int) -> VectorGrid:
    """As `instant_vector`, but with the samples' own times in seconds."""
    timed = [Block(block.rows, block.times_ms, _times_where_fresh(block)) for block in selection.blocks]
    return instant_vector(Selection(selection.labels, timed), at_ms, lookback_ms, lambda: None)


def _times_where_fresh(block: Block) -> Floats:
    return np.where(is_stale(block.values), block.values, block.times_ms / 1000.0)


def range_vector(
    selection: Selection,
    at_ms: Integers,
    looked_at_ms: Integers,
    range_ms: int,
    function: RangeFunction,
    samples_min: int,
    checkpoint: Checkpoint,
) -> VectorGrid:
    """`function` of every series' samples in `(t - range, t]`, t of `looked_at_ms`; absent where fewer than `samples_min`.

    `at_ms` are the evaluation's steps.
    """
    values = np.zeros((len(selection.labels), len(at_ms)))
    present = np.zeros(values.shape, dtype=np.bool_)
    start_ms = looked_at_ms - range_ms
    for block in selection.blocks:
        low = np.searchsorted(block.times_ms, start_ms, side="right")
        high = np.searchsorted(block.times_ms, looked_at_ms, side="right")
        steps = np.flatnonzero(high - low >= samples_min)
        if not len(steps):
            continue
        low, high = low[steps], high[steps]
        for rows, part in _chunks(block, int((high - low).sum())):
            checkpoint()
            window = RangeWindow(block.times_ms, part, low, high, start_ms[steps], looked_at_ms[steps], steps, at_ms[steps])
            values[np.ix_(rows, steps)] = function(window)
            present[np.ix_(rows, steps)] = True
    return VectorGrid(selection.labels, values, present).inhabited()


def as_selection(grid: VectorGrid, times_ms: Integers) -> Selection:
    """An instant vector per step as samples: what a subquery hands to a range function."""
    alike: dict[bytes, list[int]] = {}
    for row in range(len(grid.labels)):
        alike.setdefault(grid.present[row].tobytes(), []).append(row)
    blocks = []
    for rows in alike.values():
        present = grid.present[rows[0]]
        if present.any():
            blocks.append(Block(np.array(rows, dtype=np.intp), times_ms[present], grid.values[rows][:, present]))
    return Selection(grid.labels, blocks)


def _chunks(block: Block, looked_at: int) -> Iterator[tuple[NDArray[np.intp], Floats]]:
    """The block by slices of series small enough to work on at once; `looked_at` samples of each are."""
    size = max(1, _CHUNK_SAMPLES // max(looked_at, len(block.times_ms)))
    for start in range(0, len(block.rows), size):
        yield block.rows[start : start + size], block.values[start : start + size]

"""Which series exist and which of them a selector means: label → value → ids, in memory.

Never broken: `select` answers exactly the series that a scan with every matcher would (a series without
a label counts as having the empty value). One lock; nothing slow is done under it.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pgherd.proto.selectors import Matcher, MatchOp
from pgherd.storage.series.batch import Labels
from pgherd.storage.series.patterns import full_matches

Ids = NDArray[np.int32]
_NEVER_MIN, _NEVER_MAX = np.iinfo(np.int64).max, np.iinfo(np.int64).min


class SeriesIndex:
    """Ids grow by one and are never used again while the process lives."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._id_of: dict[Labels, int] = {}
        self._labels_of: dict[int, Labels] = {}
        self._postings: dict[str, dict[str, array[int]]] = {}
        self._pairs: dict[tuple[str, str], tuple[str, str]] = {}  # label pairs are stored once
        self._present = np.zeros(1024, np.bool_)
        self._first_ms = np.full(1024, _NEVER_MIN, np.int64)
        self._last_ms = np.full(1024, _NEVER_MAX, np.int64)
        self._next_id = 0

    def __len__(self) -> int:
        return len(self._id_of)

    @property
    def next_id(self) -> int:
        """The id that the next new series gets."""
        return self._next_id

    @property
    def newest_ms(self) -> int | None:
        """The time of the newest sample known; None without any."""
        with self._lock:
            newest = int(self._last_ms.max())
        return None if newest == _NEVER_MAX else newest

    def id_of(self, labels: Labels) -> int | None:
        """The id of exactly this label set."""
        return self._id_of.get(labels)

    def add(self, rows: Iterable[tuple[int, Labels]]) -> None:
        """Make series known, in ascending order of id."""
        with self._lock:
            for series_id, labels in rows:
                shared = tuple(self._pairs.setdefault(pair, pair) for pair in labels)
                self._id_of[shared] = series_id
                self._labels_of[series_id] = shared
                for name, value in shared:
                    self._postings.setdefault(name, {}).setdefault(value, array("i")).append(series_id)
                self._next_id = max(self._next_id, series_id + 1)
                if series_id >= len(self._present):
                    self._grow(series_id + 1)
                self._present[series_id] = True

    def _grow(self, needed: int) -> None:
        extra = max(needed, 2 * len(self._present)) - len(self._present)
        self._present = np.concatenate([self._present, np.zeros(extra, np.bool_)])
        self._first_ms = np.concatenate([self._first_ms, np.full(extra, _NEVER_MIN, np.int64)])
        self._last_ms = np.concatenate([self._last_ms, np.full(extra, _NEVER_MAX, np.int64)])

    def touch(self, ids: Ids, times_ms: NDArray[np.int64]) -> None:
        """Widen the known time range of each series by the points just stored."""
        with self._lock:
            np.minimum.at(self._first_ms, ids, times_ms)
            np.maximum.at(self._last_ms, ids, times_ms)

    def remove(self, ids: Iterable[int]) -> None:
        """Forget series whose samples have all expired."""
        with self._lock:
            affected: dict[tuple[str, str], set[int]] = {}
            for series_id in ids:
                labels = self._labels_of.pop(series_id)
                del self._id_of[labels]
                self._present[series_id] = False
                self._first_ms[series_id], self._last_ms[series_id] = _NEVER_MIN, _NEVER_MAX
                for pair in labels:
                    affected.setdefault(pair, set()).add(series_id)
            for (name, value), gone in affected.items():
                left = array("i", (i for i in self._postings[name][value] if i not in gone))
                if left:
                    self._postings[name][value] = left
                    continue
                del self._postings[name][value]
                del self._pairs[name, value]
                if not self._postings[name]:
                    del self._postings[name]

    def known(self, ids: Iterable[int]) -> list[int]:
        """Those of `ids` that exist."""
        with self._lock:
            return [i for i in ids if i in self._labels_of]

    def last_ms(self, ids: Collection[int]) -> int:
        """The earliest of these series' last samples; 0 for none."""
        with self._lock:
            return max(0, min((int(self._last_ms[i]) for i in ids), default=0))

    def expired(self, before_ms: int) -> list[int]:
        """Series whose last known sample is older than `before_ms`, or that have none."""
        with self._lock:
            return [int(i) for i in np.flatnonzero(self._present & (self._last_ms < before_ms))]

    def labels(self, ids: Ids) -> list[Labels]:
        """Labels of ids that `select` gave; a series removed since is left empty."""
        with self._lock:
            return [self._labels_of.get(int(i), ()) for i in ids]

    def select(self, matchers: Sequence[Matcher], start_ms: int | None = None, end_ms: int | None = None) -> Ids:
        """Ids, ascending, of the series that satisfy every matcher and may have samples in [start, end].

        Raises ConfigError promql.parse for a regular expression that isn't RE2.
        """
        wanted = [(matcher, self._accepted_values(matcher)) for matcher in matchers]
        with self._lock:
            keep = self._present.copy()
            if start_ms is not None:
                keep &= self._last_ms >= start_ms
            if end_ms is not None:
                keep &= self._first_ms <= end_ms
            for matcher, accepted in wanted:
                keep &= self._mask(matcher, accepted)
            return np.flatnonzero(keep).astype(np.int32)

    def _accepted_values(self, matcher: Matcher) -> tuple[list[str], bool]:
        """The values that the positive form of the matcher accepts, and whether it accepts the empty one."""
        if matcher.op in (MatchOp.EQUAL, MatchOp.NOT_EQUAL):
            return ([matcher.value] if matcher.value else []), not matcher.value
        with self._lock:
            values = list(self._postings.get(matcher.name, ()))
        matched = full_matches(matcher.value, [*values, ""])
        return [values[i] for i in np.flatnonzero(matched[:-1])], bool(matched[-1])

    def _mask(self, matcher: Matcher, accepted: tuple[list[str], bool]) -> NDArray[np.bool_]:
        values, accepts_empty = accepted
        postings = self._postings.get(matcher.name, {})
        mask = np.zeros(len(self._present), np.bool_)
        for value in values:
            if (ids := postings.get(value)) is not None:
                mask[np.array(ids, np.int32)] = True
        if accepts_empty:
            absent = np.ones(len(self._present), np.bool_)
            for ids in postings.values():
                absent[np.array(ids, np.int32)] = False
            mask |= absent
        return ~mask if matcher.op in (MatchOp.NOT_EQUAL, MatchOp.NOT_REGEX) else mask

    def cardinality(self) -> Mapping[str, int]:
        """Distinct values per label name."""
        with self._lock:
            return {name: len(values) for name, values in self._postings.items()}

"""Batches and stores for tests of the series store."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pgherd.proto.selectors import Matcher, MatchOp
from pgherd.runtime.clock import SystemClock
from pgherd.storage.series.batch import Batch, SeriesLayout, Shipment, layout_of
from pgherd.storage.series.store import SeriesSettings, SeriesStore
from pgherd.storage.series.writer import WriterSettings

BASE_MS = 1_795_000_000_000


@dataclass
class HandClock:
    """A clock that the test moves; monotonic time is real, so that the writer's rhythm goes on."""

    unix_ms: int = BASE_MS

    def wall_unix_ns(self) -> int:
        return self.unix_ms * 1_000_000

    def mono_s(self) -> float:
        return SystemClock().mono_s()


def name_is(name: str) -> Matcher:
    return Matcher("__name__", MatchOp.EQUAL, name)


def layout(count: int = 3, name: str = "m", **labels: str) -> SeriesLayout:
    return layout_of({"__name__": name, "i": str(i), **labels} for i in range(count))


def batch(
    made: SeriesLayout,
    time_ms: int,
    values: list[float],
    sequence: int | None = None,
    *,
    agent: str = "agent-a",
    incarnation: str = "one",
) -> Batch:
    """`values[i]` is series i's value at `time_ms`."""
    shipment = None if sequence is None else Shipment(agent, incarnation, sequence)
    ids = np.arange(len(values), dtype=np.int32)
    return Batch(made, ids, np.full(len(values), time_ms, np.int64), np.array(values, np.float64), shipment)


def quiet(**writer: float) -> SeriesSettings:
    """Settings under which the writer does no chores unless the test asks."""
    calm = WriterSettings(checkpoint_interval_s=3600.0, expiry_interval_s=3600.0, checkpoint_wal_bytes=1 << 40, linger_s=0.0)
    return SeriesSettings(writer=replace(calm, **writer))  # type: ignore[arg-type]


def open_store(directory: Path, settings: SeriesSettings | None = None, clock: HandClock | None = None) -> SeriesStore:
    return SeriesStore.open(directory / "series.duckdb", settings or quiet(), clock or HandClock())


def read_all(store: SeriesStore, name: str = "m") -> dict[tuple[tuple[str, str], ...], list[tuple[int, float]]]:
    """Everything of one metric: labels → [(time, value)]."""
    windows = store.select([name_is(name)], 0, 1 << 60)
    return {tuple(sorted(w.labels.items())): list(zip(w.times_ms.tolist(), w.values.tolist(), strict=True)) for w in windows}

"""The door to the series store.

store = SeriesStore.open(directory / "series.duckdb", SeriesSettings(), SystemClock())
receipt = await asyncio.wrap_future(store.append(batch))   # durable now
windows = await asyncio.to_thread(store.select, matchers, start_ms, end_ms)
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from pgherd.proto.clock import Clock
from pgherd.storage.series.batch import Batch, Receipt, ShipmentState, Tap
from pgherd.storage.series.database import Database, DatabaseSettings
from pgherd.storage.series.reader import SeriesReader
from pgherd.storage.series.writer import Writer, WriterCounters, WriterSettings


@dataclass(frozen=True, slots=True)
class SeriesSettings:
    """Everything that may be set."""

    database: DatabaseSettings = field(default_factory=DatabaseSettings)
    writer: WriterSettings = field(default_factory=WriterSettings)
    select_samples_max: int = 50_000_000


@dataclass(frozen=True, slots=True)
class StoreGauges:
    """How the store stands now."""

    series: int
    queued_points: int
    wal_bytes: int
    file_bytes: int
    set_aside: int  # files and logs waiting beside the store: may hold samples that were acknowledged and aren't served
    damage: str  # what reading met in the file; "" for nothing
    is_writable: bool


class SeriesStore(SeriesReader):
    """One DuckDB file, one writer thread, readers in their callers' threads."""

    def __init__(self, database: Database, writer: Writer, samples_max: int) -> None:
        super().__init__(database, lambda: writer.catalog, samples_max)
        self._database = database
        self._writer = writer

    @classmethod
    def open(cls, path: Path, settings: SeriesSettings, clock: Clock, tap: Tap | None = None) -> SeriesStore:
        """Open or create; replays DuckDB's log. `tap` sees what is about to be committed. Raises as `Database.open`."""
        database = Database.open(path, settings.database, clock)
        writer = Writer(database, database.catalog, settings.writer, clock, tap)
        writer.start()
        return cls(database, writer, settings.select_samples_max)

    def append(self, batch: Batch) -> Future[Receipt]:
        """Queue a batch; the future resolves when its samples and its high-water mark are durable together.

        A sequence at or below the high-water mark of its incarnation resolves with `repeated` and stores
        nothing. Raises TransientError ingest.overloaded when the bounded queue is full; the future raises
        TransientError store.unavailable when the commit failed: nothing of the batch is acknowledged, send it again.
        """
        return self._writer.append(batch)

    def shipments(self) -> list[ShipmentState]:
        """The durable state of every sender's incarnation."""
        return list(self._writer.catalog.shipments.values())

    @property
    def counters(self) -> WriterCounters:
        """Counts since start."""
        return self._writer.counters

    def notes(self) -> list[str]:
        """What somebody should look at although the store works, one sentence each."""
        found = [
            f"series store: {path.name} was set aside; it may hold samples that aren't served"
            for path in self._database.set_aside()
        ]
        return [*found, *([f"series store: a part can't be read: {self._database.damage}"] if self._database.damage else [])]

    def gauges(self) -> StoreGauges:
        """How it stands now."""
        return StoreGauges(
            series=len(self._writer.catalog.index),
            queued_points=self._writer.queued_points,
            wal_bytes=self._database.wal_bytes,
            file_bytes=self._database.path.stat().st_size,
            set_aside=len(self._database.set_aside()),
            damage=self._database.damage,
            is_writable=self._writer.is_alive and not self._writer.is_failing,
        )

    def close(self, timeout_s: float = 30.0, *, checkpoint: bool = True) -> None:
        """Commit what waits, checkpoint, release the file. Later appends raise store.unavailable.

        Without the checkpoint it is quicker, and the next start replays the log.
        """
        try:
            self._writer.close(timeout_s, checkpoint=checkpoint)
        finally:
            self._database.close()

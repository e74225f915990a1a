"""The one thread that writes: group commit, checkpoints, expiry, and coming back from a full disk.

Everything that waits goes into one transaction (samples, new series, high-water marks); futures resolve
only after its COMMIT returned, because the log was synced then. A transaction that fails acknowledges
nothing: every sender keeps its batch and sends it again, and the high-water marks tell repeats apart.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import duckdb
import pyarrow as pa

from pgherd.proto.clock import Clock
from pgherd.proto.errors import PgherdError
from pgherd.proto.steps import UnsteppedClock
from pgherd.runtime.logging import get_logger
from pgherd.storage.series.batch import Batch, Receipt, ShipmentState, Tap
from pgherd.storage.series.catalog import Catalog, labels_to_json
from pgherd.storage.series.database import Database, first_line, unavailable
from pgherd.storage.series.expiry import Expiry
from pgherd.storage.series.plan import CommitPlan, SeriesLimits, plan_commit
from pgherd.storage.series.queue import CommitQueue, Waiting

_CHECKPOINT_MARGIN_BYTES = 4 * 1024 * 1024
_CHECKPOINT_REST_MAX_S = 30.0
_AWAY_MS = 86400_000  # a collector that was away for longer waits a day before it deletes

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class WriterSettings:
    """Limits and rhythm of the writer."""

    series_max: int = 1_000_000
    series_per_owner_max: int = 200_000
    queue_points_max: int = 2_000_000
    queue_bytes_max: int = 128 * 1024 * 1024
    linger_s: float = 0.05  # a commit costs 4 ms of CPU however small it is: few points wait for others
    linger_points: int = 1_000
    commit_points_max: int = 500_000  # of one transaction: bounds what the last in the group waits for
    checkpoint_interval_s: float = 60.0
    checkpoint_wal_bytes: int = 64 * 1024 * 1024
    retention_s: float = 15 * 86400.0
    expiry_interval_s: float = 300.0
    expiry_chunk_rows: int = 200_000


@dataclass(slots=True)
class WriterCounters:
    """Self-metrics: monotonic since start, written by the writer thread only."""

    batches: int = 0
    points_stored: int = 0
    batches_repeated: int = 0
    gaps: int = 0
    points_over_series_max: int = 0
    commits: int = 0
    commit_seconds: float = 0.0
    commits_failed: int = 0
    checkpoints: int = 0
    checkpoints_failed: int = 0
    reopened: int = 0
    points_expired: int = 0
    series_expired: int = 0


class Writer:
    """Owns the database's connection and the catalog while it runs."""

    def __init__(
        self, database: Database, catalog: Catalog, settings: WriterSettings, clock: Clock, tap: Tap | None = None
    ) -> None:
        """`tap` gets what is about to be committed, in this thread; it may not raise."""
        self._tap = tap
        self._database = database
        self._settings = settings
        self._clock = clock
        self._queue = CommitQueue(points_max=settings.queue_points_max, bytes_max=settings.queue_bytes_max)
        self._expiry = Expiry(settings.retention_s, settings.expiry_chunk_rows)
        self._broken = False
        self._last_commit_failed = False
        self._checkpoint_last = True
        self._next_checkpoint_mono_s = clock.mono_s() + settings.checkpoint_interval_s
        self._checkpoint_rest_mono_s = 0.0
        # What is deleted is gone: a clock that steps, or is years ahead at boot, is followed only after a day.
        last_unix_ms = catalog.index.newest_ms
        self._steady = UnsteppedClock(clock, None if last_unix_ms is None else (last_unix_ms + _AWAY_MS) * 1_000_000)
        self._next_expiry_mono_s = clock.mono_s() + min(10.0, settings.expiry_interval_s)
        self.catalog = catalog
        self.counters = WriterCounters()
        self._thread = threading.Thread(target=self._run, name="series-writer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """False only before start and after close: the loop survives every error."""
        return self._thread.is_alive()

    @property
    def is_failing(self) -> bool:
        """The last commit failed, or the database is closed until the next attempt; each new write tries again."""
        return self._broken or self._last_commit_failed

    @property
    def queued_points(self) -> int:
        return self._queue.points

    def append(self, batch: Batch) -> Future[Receipt]:
        """See SeriesStore.append."""
        return self._queue.put(batch)

    def close(self, timeout_s: float, *, checkpoint: bool = True) -> None:
        """Commit what waits, checkpoint, stop. Raises TransientError store.unavailable if that takes too long."""
        self._checkpoint_last = checkpoint
        self._queue.close()
        if not self._thread.is_alive():
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise unavailable(f"the series writer didn't stop within {timeout_s} s")

    def _run(self) -> None:
        while not self._queue.is_drained:
            settings = self._settings
            group = self._queue.take(
                points_max=settings.commit_points_max,
                timeout_s=self._idle_s(),
                linger_s=settings.linger_s,
                linger_points=settings.linger_points,
            )
            try:
                if group:
                    self._commit(group)
                self._chores()
            except Exception as error:  # the writer's loop guard: one bad round must not end ingest
                log.exception("series.writer_round_failed")
                _fail(group, error)
                self._broken = True
        if self._checkpoint_last and not self._broken:
            self._checkpoint()

    def _idle_s(self) -> float:
        if self._expiry.is_underway:
            return 0.0
        due = min(self._next_checkpoint_mono_s, self._next_expiry_mono_s)
        return min(max(due - self._clock.mono_s(), 0.05), 1.0)

    # --- commit ---------------------------------------------------------------------------------

    def _commit(self, group: list[Waiting]) -> None:
        started = self._clock.mono_s()
        try:
            self._recover()
            plan = plan_commit(
                [batch for batch, _ in group],
                self.catalog.known(),
                limits=SeriesLimits(self._settings.series_max, self._settings.series_per_owner_max),
                now_unix_ms=self._clock.wall_unix_ns() // 1_000_000,
            )
            if self._tap is not None and len(plan.series_ids):
                self._tap(self.catalog.rows(plan))  # before the commit: a crash in between repeats, it never loses
            if len(plan.series_ids) or plan.shipments:
                self._write(plan)
        except (duckdb.Error, PgherdError) as error:
            self.counters.commits_failed += 1
            self._last_commit_failed = True
            log.warning("series.commit_failed", batches=len(group), reason=first_line(error))
            _fail(group, error)
            self._recover_from(error)
            return
        self._last_commit_failed = False
        self.catalog.apply(plan)
        self._count(plan, self._clock.mono_s() - started)
        for (_, future), receipt in zip(group, plan.receipts, strict=True):
            if future.set_running_or_notify_cancel():
                future.set_result(receipt)

    def _write(self, plan: CommitPlan) -> None:
        connection = self._database.connection
        series = pa.table(
            {
                "id": pa.array([made.id for made in plan.new_series], pa.int32()),
                "name": pa.array([dict(made.labels)["__name__"] for made in plan.new_series], pa.string()),
                "labels": pa.array([labels_to_json(made.labels) for made in plan.new_series], pa.string()),
                "owner": pa.array([made.owner for made in plan.new_series], pa.string()),
            }
        )
        samples = pa.table({"series_id": plan.series_ids, "ts_ms": plan.times_ms, "value": plan.values})
        connection.execute("BEGIN")
        try:
            if plan.new_series:
                _insert(connection, "series", series)
            for metric in plan.metrics:
                connection.execute("DELETE FROM metrics WHERE name = ?", [metric.name])
                connection.execute(
                    "INSERT INTO metrics VALUES (?, ?, ?, ?)", [metric.name, metric.kind, metric.help, metric.unit]
                )
            if len(samples):
                _insert(connection, "samples", samples)
            self._write_shipments(connection, plan)
            connection.execute("COMMIT")
        except duckdb.Error:
            _roll_back(connection)
            raise

    def _write_shipments(self, connection: duckdb.DuckDBPyConnection, plan: CommitPlan) -> None:
        """All in two statements: one UPDATE per sender cost 1.1 ms each, three quarters of a commit of 16 senders."""
        known = self.catalog.shipments
        new = [row for row in plan.shipments if (row.agent_id, row.incarnation) not in known]
        moved = [row for row in plan.shipments if (row.agent_id, row.incarnation) in known]
        if new:
            _insert(connection, "shipments", _shipment_table(new))
        if moved:
            connection.register("moved", _shipment_table(moved))
            try:
                connection.execute(
                    "UPDATE shipments SET last_sequence = moved.last_sequence, gaps = moved.gaps,"
                    " stored_points = moved.stored_points, committed_unix_ms = moved.committed_unix_ms FROM moved"
                    " WHERE shipments.agent_id = moved.agent_id AND shipments.incarnation = moved.incarnation"
                )
            finally:
                connection.unregister("moved")

    def _count(self, plan: CommitPlan, seconds: float) -> None:
        counters = self.counters
        counters.commits += 1
        counters.commit_seconds += seconds
        counters.points_stored += len(plan.series_ids)
        for receipt in plan.receipts:
            counters.batches += not receipt.repeated
            counters.batches_repeated += receipt.repeated
            counters.gaps += receipt.gap
            counters.points_over_series_max += receipt.points_refused

    # --- chores ---------------------------------------------------------------------------------

    def _recover(self) -> None:
        """After DuckDB gave the database up: open it again and believe only what is on disk."""
        if not self._broken:
            return
        self._database.reopen()
        self.catalog = self._database.catalog
        self._broken = False
        self.counters.reopened += 1
        log.warning("series.reopened", store=str(self._database.path))

    def _recover_from(self, error: Exception) -> None:
        """At once, because an invalidated database serves no reader either; if that fails, with the next write or chore."""
        if _is_clean_failure(error):
            return
        was_broken, self._broken = self._broken, True
        if was_broken:
            return
        try:
            self._recover()
        except (duckdb.Error, PgherdError) as again:
            log.warning("series.reopen_failed", reason=first_line(again))

    def _has_room(self) -> bool:
        """A checkpoint that fails costs a reopening: don't begin one that can't end."""
        return shutil.disk_usage(self._database.path.parent).free > 2 * self._database.wal_bytes + _CHECKPOINT_MARGIN_BYTES

    def _chores(self) -> None:
        now = self._clock.mono_s()
        if now >= self._next_expiry_mono_s or self._expiry.is_underway:
            self._next_expiry_mono_s = now + self._settings.expiry_interval_s
            self._expire()
        is_large = self._database.wal_bytes >= self._settings.checkpoint_wal_bytes
        if now >= self._next_checkpoint_mono_s or (is_large and now >= self._checkpoint_rest_mono_s):
            if self._checkpoint():
                self._next_checkpoint_mono_s = now + self._settings.checkpoint_interval_s
                return
            # A failing one may reopen the database, which interrupts readers: give them time in between.
            pause_s = min(max(self._settings.checkpoint_interval_s, 1.0), _CHECKPOINT_REST_MAX_S)
            self._next_checkpoint_mono_s = self._checkpoint_rest_mono_s = self._clock.mono_s() + pause_s

    def _expire(self) -> None:
        try:
            self._recover()
            now_unix_ns = min(self._clock.wall_unix_ns(), self._steady.wall_unix_ns())
            if self._steady.has_stepped:
                log.warning("series.expiry_by_former_clock", reason="the wall clock stepped; it is followed after a day")
            points, series = self._expiry.step(self._database.connection, self.catalog, now_unix_ns // 1_000_000)
        except (duckdb.Error, PgherdError) as error:
            log.warning("series.expiry_failed", reason=first_line(error))
            self._recover_from(error)
            return
        self.counters.points_expired += points
        self.counters.series_expired += series

    def _checkpoint(self) -> bool:
        if not self._has_room():
            self.counters.checkpoints_failed += 1
            log.warning("series.checkpoint_skipped", wal_bytes=self._database.wal_bytes, reason="the disk has no room for it")
            return False
        try:
            self._recover()
            self._database.checkpoint()
        except (duckdb.Error, PgherdError) as error:
            self.counters.checkpoints_failed += 1
            log.warning("series.checkpoint_failed", reason=first_line(error))
            self._recover_from(error)
            return False
        self.counters.checkpoints += 1
        return True


def _insert(connection: duckdb.DuckDBPyConnection, table: str, rows: pa.Table) -> None:
    connection.from_arrow(rows).insert_into(table)


def _shipment_table(rows: Sequence[ShipmentState]) -> pa.Table:
    return pa.Table.from_pydict({name: [getattr(row, name) for row in rows] for name in ShipmentState.__dataclass_fields__})


def _roll_back(connection: duckdb.DuckDBPyConnection) -> None:
    try:
        connection.execute("ROLLBACK")
    except duckdb.Error as error:
        log.debug("series.nothing_to_roll_back", reason=first_line(error))  # a failed COMMIT already did


def _is_clean_failure(error: Exception) -> bool:
    """Whether the open database is as good as before: DuckDB rolled back (seen for a full disk in COMMIT)."""
    return isinstance(error, duckdb.TransactionException | duckdb.OutOfMemoryException)


def _fail(group: list[Waiting], error: Exception) -> None:
    answer = error if isinstance(error, PgherdError) else unavailable(f"the series store can't commit: {first_line(error)}")
    for _, future in group:
        if not future.done() and future.set_running_or_notify_cancel():
            future.set_exception(answer)

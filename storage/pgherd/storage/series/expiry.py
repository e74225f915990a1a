"""Retention in its first form: older samples are deleted in bounded chunks between commits.

DuckDB reuses the freed space but never shrinks the file (duckdb issues 12286, 16148), so the store stays as big
as its biggest retention window was. One file per day, removed whole, is the next form and gives the disk back.
"""

from __future__ import annotations

import duckdb

from pgherd.storage.series.catalog import Catalog


class Expiry:
    """One pass is many steps; a step deletes at most `chunk_rows` samples in a transaction of its own."""

    def __init__(self, retention_s: float, chunk_rows: int) -> None:
        self._retention_ms = int(retention_s * 1000)
        self._chunk_rows = chunk_rows
        self.is_underway = False

    def step(self, connection: duckdb.DuckDBPyConnection, catalog: Catalog, now_unix_ms: int) -> tuple[int, int]:
        """Delete one chunk; with the last one also series and incarnations that nothing refers to.

        Returns (samples, series) deleted. Raises duckdb.Error; then nothing was.
        """
        cutoff_ms = now_unix_ms - self._retention_ms
        row = connection.execute(
            "DELETE FROM samples WHERE rowid IN (SELECT rowid FROM samples WHERE ts_ms < ? LIMIT ?)",
            [cutoff_ms, self._chunk_rows],
        ).fetchone()
        deleted = int(row[0]) if row else 0
        self.is_underway = deleted == self._chunk_rows
        if self.is_underway:
            return deleted, 0
        gone = catalog.index.expired(cutoff_ms)
        if gone:
            rows = connection.execute("DELETE FROM series WHERE id IN (SELECT unnest(?::INTEGER[])) RETURNING owner", [gone])
            catalog.forget_series(gone, [owner for (owner,) in rows.fetchall()])
        if any(state.committed_unix_ms < cutoff_ms for state in catalog.shipments.values()):
            connection.execute("DELETE FROM shipments WHERE committed_unix_ms < ?", [cutoff_ms])
            catalog.forget_shipments(cutoff_ms)
        return deleted, len(gone)

"""The DuckDB file: opening it safely, keeping it open, coming back after DuckDB gave it up.

What DuckDB 1.5.6 was seen to do, and what is done about it here:
- a write-ahead log with a damaged entry refuses to open (duckdb issues 19712, 22044): the log is set aside
  under a `.damaged-<time>` name, never deleted, and the store opens as of its last checkpoint, loudly;
- a log with a damaged *header* is ignored and overwritten by the next insert without a word: noticed by the
  log's replayed size being nothing, and set aside too. So that an honest first commit that was torn by a crash
  doesn't look like that, each checkpoint is followed by one tiny commit;
- a damaged entry *length* looks to DuckDB like a torn last entry: it drops that and everything behind it without a
  word. So the log is copied before it is opened, and the copy is kept as `.torn-<time>` if DuckDB took less than all;
- a failing checkpoint (disk full) invalidates the open database: it is closed and opened again in place;
- a file with a flipped, missing or foreign byte where opening looks is set aside whole, with its log, under one
  `.damaged-<time>` name, and an empty store begins in its place, loudly: samples that agents still hold must find a door.
  Damage that only reading meets is named in the answer and in the gauges; the rest goes on being served;
- any DDL in the log is a risk at replay: tables are made once, then checkpointed, and there is no index at all.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import duckdb

from pgherd.proto.clock import Clock
from pgherd.proto.errors import IntegrityError, PgherdError, PreconditionError, TransientError
from pgherd.runtime.durable import exclusive_lock, fsync_directory, newer_format, storage_error
from pgherd.runtime.logging import get_logger
from pgherd.storage.series.catalog import Catalog
from pgherd.storage.series.damage import DamagedFileError, is_file_damage, require_duckdb_file
from pgherd.storage.series.overdue import OverdueReaders

FORMAT_NAME = "pgherd-series"
FORMAT_VERSION = 2
_STORAGE_VERSION = "v1.5.0"  # what the file may use: pinned, so that a downgrade within 1.5 stays possible
_WAL_HEADER_BYTES = 128  # a log this small can't hold a commit of ours

_SCHEMA = (
    "CREATE TABLE meta (key VARCHAR NOT NULL, value VARCHAR NOT NULL)",
    "CREATE TABLE series (id INTEGER NOT NULL, name VARCHAR NOT NULL, labels VARCHAR NOT NULL, owner VARCHAR NOT NULL)",
    "CREATE TABLE metrics (name VARCHAR NOT NULL, kind VARCHAR NOT NULL, help VARCHAR NOT NULL, unit VARCHAR NOT NULL)",
    "CREATE TABLE samples (series_id INTEGER NOT NULL, ts_ms BIGINT NOT NULL, value DOUBLE NOT NULL)",
    """CREATE TABLE shipments (agent_id VARCHAR NOT NULL, incarnation VARCHAR NOT NULL, last_sequence BIGINT NOT NULL,
           gaps BIGINT NOT NULL, stored_points BIGINT NOT NULL, committed_unix_ms BIGINT NOT NULL)""",
)

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class DatabaseSettings:
    """DuckDB takes 80 % of the machine unless told."""

    memory_limit_bytes: int = 512 * 1024 * 1024
    threads: int = 2
    spill_bytes_max: int = 1024 * 1024 * 1024
    read_timeout_s: float = 30.0


class Database:
    """The open file. The writer thread owns `connection`; everybody else reads through `read()`."""

    def __init__(self, path: Path, settings: DatabaseSettings, clock: Clock) -> None:
        self.path = path
        self._settings = settings
        self._clock = clock
        self._held = contextlib.ExitStack()
        self._gate = threading.Condition()
        self._readers: set[duckdb.DuckDBPyConnection] = set()
        self._overdue = OverdueReaders(settings.read_timeout_s, clock)
        self._connection: duckdb.DuckDBPyConnection | None = None
        self._closed = False
        self.catalog = Catalog()  # as of the last opening
        self.damage = ""  # what reading met that opening didn't: DuckDB's words

    @classmethod
    def open(cls, path: Path, settings: DatabaseSettings, clock: Clock) -> Database:
        """Open or create the store at `path`.

        A damaged file is set aside and an empty store begins (see `set_aside`). Raises PreconditionError state.locked
        (another process has it), IntegrityError format.newer | format.corrupt (not ours; named, left as it is),
        TransientError store.unavailable | disk.io.
        """
        database = cls(path, settings, clock)
        try:
            database._held.enter_context(exclusive_lock(path.with_name(path.name + ".lock"), f"the series store {path}"))
        except OSError as error:
            raise storage_error(error, path, "locking") from error
        try:
            database._open_usable()
        except BaseException:
            database.close()
            raise
        return database

    # --- the writer's side ----------------------------------------------------------------------

    @property
    def connection(self) -> duckdb.DuckDBPyConnection:
        """The writer's connection. Raises TransientError store.unavailable while there is none."""
        if self._connection is None:
            raise unavailable("the series store is closed")
        return self._connection

    @property
    def wal_bytes(self) -> int:
        """Size of the write-ahead log: what a crash now would have to replay."""
        try:
            return self._wal.stat().st_size
        except FileNotFoundError:
            return 0

    def set_aside(self) -> tuple[Path, ...]:
        """Files and logs that wait beside the store for somebody to look at them.

        A whole store: `series.duckdb.damaged-<time>`, with its log beside it under a name that DuckDB pairs with it.
        Logs, `.damaged-`: could not be replayed. `.torn-`: replayed up to a place where the last commit was torn off by a
        crash (it had not been acknowledged), or where an entry's length is damaged (what follows had been).
        """
        marks = (f"{self.path.name}.damaged-*Z", f"{self._wal.name}.damaged-*", f"{self._wal.name}.torn-*")
        return tuple(path for mark in marks for path in sorted(self.path.parent.glob(mark)))

    def checkpoint(self) -> None:
        """Move the log into the file. Raises duckdb.Error; after a FatalException call `reopen`."""
        self.connection.execute("CHECKPOINT")
        _write_something(self.connection)

    def reopen(self) -> None:
        """Close what DuckDB invalidated and open it again; readers wait meanwhile.

        Raises TransientError store.unavailable, IntegrityError; the database is then closed, call again.
        """
        with self._gate:
            if self._closed:
                raise unavailable("the series store is closed")
            connection, self._connection = self._connection, None
            for reader in self._readers:
                reader.interrupt()
            if not self._gate.wait_for(lambda: not self._readers, self._settings.read_timeout_s):
                raise unavailable("readers don't leave the invalidated series store")
            if connection is not None:
                connection.close()
            self._open_usable()
            self._gate.notify_all()

    def close(self) -> None:
        """Let go of file and lock; readers are interrupted."""
        with self._gate:
            self._closed = True
            connection, self._connection = self._connection, None
            for reader in self._readers:
                reader.interrupt()
            self._gate.wait_for(lambda: not self._readers, self._settings.read_timeout_s)
            if connection is not None:
                connection.close()
        self._overdue.close()
        self._held.close()

    # --- the readers' side ----------------------------------------------------------------------

    @contextlib.contextmanager
    def read(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A cursor of the calling thread's own, for one short query.

        Raises TransientError query.timeout | store.unavailable, PreconditionError promql.limit (memory).
        """
        with self._gate:
            if not self._gate.wait_for(lambda: self._closed or self._connection is not None, timeout=5.0):
                raise unavailable("the series store is closed")
            cursor = self.connection.cursor()
            self._readers.add(cursor)
        self._overdue.watch(cursor)
        try:
            yield cursor
        except duckdb.InterruptException as error:
            raise TransientError("query.timeout", "reading the series store took too long or was cut off") from error
        except duckdb.OutOfMemoryException as error:
            raise PreconditionError(
                "promql.limit", "the query needs more memory than series.memory_limit", hint="select fewer series or less time"
            ) from error
        except duckdb.Error as error:
            if is_file_damage(error):
                self._note_damage(error)
                raise IntegrityError(
                    "store.damaged",
                    f"a part of {self.path} is damaged: {first_line(error)}",
                    hint="other series and times are still served; see the runbook on damaged stores",
                    path=str(self.path),
                ) from error
            raise unavailable(f"the series store can't be read: {first_line(error)}") from error
        finally:
            self._overdue.release(cursor)
            cursor.close()
            with self._gate:
                self._readers.discard(cursor)
                self._gate.notify_all()

    def _note_damage(self, error: duckdb.Error) -> None:
        if not self.damage:
            log.error("series.damage_found", store=str(self.path), reason=first_line(error))
        self.damage = first_line(error)

    # --- opening --------------------------------------------------------------------------------

    @property
    def _wal(self) -> Path:
        return self.path.with_name(self.path.name + ".wal")

    def _connect(self) -> duckdb.DuckDBPyConnection:
        connection = duckdb.connect(
            str(self.path),
            config={
                "storage_compatibility_version": _STORAGE_VERSION,
                "memory_limit": f"{self._settings.memory_limit_bytes // 1024}KiB",
                "threads": self._settings.threads,
                "max_temp_directory_size": f"{self._settings.spill_bytes_max // 1024}KiB",
                "checkpoint_threshold": "1TiB",  # the writer decides when
                "enable_external_access": False,
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
            },
        )
        connection.execute("PRAGMA disable_checkpoint_on_shutdown")
        return connection

    def _open_usable(self) -> None:
        """Open, setting aside what is damaged. Raises as `open`."""
        try:
            self._open_checked()
        except DamagedFileError as error:
            self._set_file_aside(error)
            self._open_checked()

    def _open_checked(self) -> None:
        """Open and read what everything rests on."""
        try:
            require_duckdb_file(self.path)
            self._connection = self._open_with_log()
            self._check_format()
            self.catalog = Catalog.load(self._connection)
            self.damage = ""
        except BaseException as error:
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.close()
            if isinstance(error, duckdb.Error):
                raise _opening_error(self.path, error) from error
            if isinstance(error, OSError):
                raise storage_error(error, self.path, "opening") from error
            raise

    def _set_file_aside(self, error: DamagedFileError) -> None:
        aside = self._aside(self.path, "damaged")
        self.path.rename(aside)
        with contextlib.suppress(FileNotFoundError):
            self._wal.rename(aside.with_name(aside.name + ".wal"))  # so named, DuckDB opens the two together
        fsync_directory(self.path.parent)
        log.error(
            "series.store_set_aside", store=str(self.path), kept_as=str(aside), reason=error.message,
            consequence="an empty store begins; earlier samples are only in the file that was set aside; what agents hold comes",
        )  # fmt: skip

    def _open_with_log(self) -> duckdb.DuckDBPyConnection:
        log_bytes = self.wal_bytes
        is_worth_judging = log_bytes > _WAL_HEADER_BYTES
        copy = self._copy_log() if is_worth_judging else None
        try:
            connection = self._connect()
            if not is_worth_judging:
                return connection
            if _replayed(connection):
                return self._judge_tail(connection, copy, log_bytes)
            connection.close()
            return self._open_without_log("DuckDB doesn't recognise the header of the log and would overwrite it")
        except duckdb.Error as error:
            if log_bytes == 0 or not _is_damage(error) or is_file_damage(error):
                raise _opening_error(self.path, error) from error
            return self._open_without_log(first_line(error))
        finally:
            if copy is not None:
                copy.unlink(missing_ok=True)

    def _copy_log(self) -> Path | None:
        copy = self._wal.with_name(f".tmp-{self._wal.name}")
        try:
            shutil.copyfile(self._wal, copy)
        except OSError as error:
            log.warning("series.log_not_copied", store=str(self.path), reason=str(error))  # full disk: open without the copy
            copy.unlink(missing_ok=True)
            return None
        return copy

    def _judge_tail(
        self, connection: duckdb.DuckDBPyConnection, copy: Path | None, log_bytes: int
    ) -> duckdb.DuckDBPyConnection:
        """DuckDB cuts the log after the last entry it could read, at the next write: write, then compare."""
        try:
            with contextlib.suppress(duckdb.CatalogException):  # a store that crashed while it was made
                _write_something(connection)
        except duckdb.Error:
            connection.close()
            raise
        dropped_bytes = log_bytes - self.wal_bytes
        if dropped_bytes > 0:
            aside = self._aside(self._wal, "torn")
            if copy is not None:
                copy.rename(aside)
            log.warning(
                "series.log_tail_dropped", store=str(self.path), kept_as=str(aside) if copy else None, dropped_bytes=dropped_bytes,
                consequence="a commit that a crash tore wasn't acknowledged; if the disk damaged the log, more is missing",
            )  # fmt: skip
        return connection

    def _aside(self, what: Path, mark: str) -> Path:
        stamp = datetime.fromtimestamp(self._clock.wall_unix_ns() / 1e9, UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        path = what.with_name(f"{what.name}.{mark}-{stamp}")
        while path.exists():
            path = what.with_name(f"{path.name.removesuffix('Z')}xZ")
        return path

    def _open_without_log(self, why: str) -> duckdb.DuckDBPyConnection:
        aside = self._aside(self._wal, "damaged")
        self._wal.rename(aside)
        fsync_directory(self.path.parent)
        try:
            connection = self._connect()
        except duckdb.Error as error:
            aside.rename(self._wal)  # the log isn't what is wrong
            raise _opening_error(self.path, error) from error
        log.error(
            "series.log_set_aside", store=str(self.path), kept_as=str(aside), log_bytes=aside.stat().st_size, reason=why,
            consequence="samples acknowledged since the last checkpoint are only in the file that was set aside",
        )  # fmt: skip
        return connection

    def _check_format(self) -> None:
        connection = self.connection
        tables = {name for (name,) in connection.execute("SELECT table_name FROM duckdb_tables()").fetchall()}
        if not tables:
            self._create(connection)
            return
        version = None
        if "meta" in tables:
            rows = dict(connection.execute("SELECT key, value FROM meta WHERE key IN ('format', 'version')").fetchall())
            version = int(rows["version"]) if rows.get("format") == FORMAT_NAME else None
        if version is None:
            raise IntegrityError("format.corrupt", f"{self.path} isn't a series store of pgherd", path=str(self.path))
        if version > FORMAT_VERSION:
            raise newer_format(self.path, version, FORMAT_VERSION)
        if version < FORMAT_VERSION:
            self._upgrade(connection)

    def _upgrade(self, connection: duckdb.DuckDBPyConnection) -> None:
        """From version 1, which didn't say who made a series; checkpointed at once, since DDL in a log is a risk."""
        try:
            connection.execute("BEGIN")
            connection.execute("ALTER TABLE series ADD COLUMN owner VARCHAR DEFAULT ''")
            connection.execute("UPDATE meta SET value = ? WHERE key = 'version'", [str(FORMAT_VERSION)])
            connection.execute("COMMIT")
            self.checkpoint()
        except duckdb.Error as error:
            raise _opening_error(self.path, error) from error

    def _create(self, connection: duckdb.DuckDBPyConnection) -> None:
        try:
            connection.execute("BEGIN")
            for statement in _SCHEMA:
                connection.execute(statement)
            connection.executemany(
                "INSERT INTO meta VALUES (?, ?)",
                [("format", FORMAT_NAME), ("version", str(FORMAT_VERSION)), ("generation", "0")],
            )
            connection.execute("COMMIT")
            self.checkpoint()
        except duckdb.Error as error:
            raise _opening_error(self.path, error) from error


def unavailable(message: str) -> TransientError:
    """The store can't serve now; nothing was acknowledged."""
    return TransientError("store.unavailable", message, hint="free disk space if it is full; the store comes back by itself")


def first_line(error: BaseException) -> str:
    """DuckDB's messages carry stack traces below the first line."""
    return str(error).split("\n", 1)[0]


def _write_something(connection: duckdb.DuckDBPyConnection) -> None:
    """One tiny commit, whose log entry a single write() carries."""
    connection.execute("UPDATE meta SET value = (value::BIGINT + 1)::VARCHAR WHERE key = 'generation'")


def _replayed(connection: duckdb.DuckDBPyConnection) -> bool:
    row = connection.execute("SELECT wal_size FROM pragma_database_size()").fetchone()
    return row is not None and row[0] != "0 bytes"


def _is_damage(error: duckdb.Error) -> bool:
    if isinstance(error, duckdb.OutOfMemoryException):
        return False
    return not any(
        os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)
    )


def _opening_error(path: Path, error: duckdb.Error) -> PgherdError:
    text = first_line(error)
    if "database file with version number" in str(error):
        return IntegrityError(
            "format.newer", f"{path} was written by a newer DuckDB: {text}",
            hint="run the pgherd version that wrote it, or a newer one", path=str(path),
        )  # fmt: skip
    if "lock on file" in text:
        return PreconditionError(
            "state.locked", f"another program has {path} open: {text}", hint="close it (a DuckDB shell?)", path=str(path)
        )
    if is_file_damage(error):
        return DamagedFileError("format.corrupt", f"{path} is damaged: {text}", path=str(path))
    if not _is_damage(error):
        return unavailable(f"can't open {path}: {text}")
    return IntegrityError(
        "format.corrupt",
        f"{path} can't be opened: {text}",
        hint=f"move {path} aside and restore it, or start empty",
        path=str(path),
    )

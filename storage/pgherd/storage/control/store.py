"""The control store: a SQLite file with full durability, brought to its schema by Alembic.

Synchronous; an asyncio caller goes through `asyncio.to_thread`. Writers serialise on SQLite's own lock
(BEGIN IMMEDIATE), readers see the last committed state. After `with store.begin()` returns, what was
written survives a power cut.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, create_engine, event, inspect
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from pgherd.proto.errors import PreconditionError, TransientError
from pgherd.runtime.durable import fsync_directory, storage_error
from pgherd.storage.control.health import corrupt, require_healthy_content, require_healthy_files
from pgherd.storage.control.schema import HEAD_REVISION

_BUSY_TIMEOUT_S = 15.0
_CONNECTIONS_MAX = 48  # more than the threads that may ask at once, so that only SQLite's lock makes anybody wait


def _connect_pragmas(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # SQLAlchemy's BEGIN below is the only one
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute(f"PRAGMA busy_timeout = {int(_BUSY_TIMEOUT_S * 1000)}")
    cursor.close()


def _begin_immediate(connection: Connection) -> None:
    read_only = connection.get_execution_options().get("pgherd_read_only", False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


def sqlite_engine(path: Path) -> Engine:
    """An engine on `path` with the pragmas and transactions that the store relies on."""
    engine = create_engine(
        f"sqlite:///{path}",
        connect_args={"timeout": _BUSY_TIMEOUT_S, "check_same_thread": False},
        pool_size=4,
        max_overflow=_CONNECTIONS_MAX - 4,
        pool_timeout=_BUSY_TIMEOUT_S,
    )
    event.listen(engine, "connect", _connect_pragmas)
    event.listen(engine, "begin", _begin_immediate)
    return engine


class ControlStore:
    """Transactions on the control store. Thread-safe."""

    def __init__(self, engine: Engine, path: Path) -> None:
        self._engine = engine
        self.path = path

    @classmethod
    def open(cls, path: Path, *, create: bool = True) -> ControlStore:
        """Open the store and migrate it to this version's head; make it if it isn't there and `create` allows that.

        A store that is made appears whole or not at all. Raises PreconditionError store.missing, IntegrityError format.newer
        for a store that a newer pgherd wrote, format.corrupt for a file that isn't a healthy store of ours; the file is left as
        it was. TransientError disk.*.
        """
        try:
            if not path.exists():
                if not create:
                    raise PreconditionError(
                        "store.missing",
                        f"{path} isn't there: it holds the herd's identities, revocations, commands and alert clocks",
                        hint="restore your last copy of it; `pgherd collector init --new-control-store` begins with an empty one,"
                        " to which every agent has to join again",
                        path=str(path),
                    )
                _make(path)
            require_healthy_files(path)
        except OSError as error:
            raise storage_error(error, path, "opening") from error
        return cls(_opened(path, path), path)

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """One durable transaction: committed when the block ends, rolled back when it raises.

        Raises TransientError store.unavailable when the disk or the lock doesn't allow it, IntegrityError format.corrupt.
        """
        try:
            with self._engine.begin() as connection:
                yield connection
        except (DatabaseError, PoolTimeoutError) as error:
            raise self._problem(error) from error

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A consistent read; keep it short. Raises as `begin`."""
        try:
            with self._engine.connect().execution_options(pgherd_read_only=True) as connection, connection.begin():
                yield connection
        except (DatabaseError, PoolTimeoutError) as error:
            raise self._problem(error) from error

    def close(self) -> None:
        """Release the file."""
        self._engine.dispose()

    def _problem(self, error: DatabaseError | PoolTimeoutError) -> Exception:
        if isinstance(error, OperationalError | PoolTimeoutError):
            reason = error.orig if isinstance(error, OperationalError) else "all connections are in use"
            return TransientError("store.unavailable", f"control store: {reason}", path=str(self.path))
        if type(error) is DatabaseError:  # its subclasses are about our statements; this one is about the file
            return corrupt(self.path, f"is damaged: {error.orig}")
        return error


def _opened(path: Path, named: Path) -> Engine:
    """An engine on a migrated store at `path`, called `named` in errors."""
    require_healthy_content(path, named)
    engine = sqlite_engine(path)
    try:
        if _revision(engine) != HEAD_REVISION:
            from pgherd.storage.control.migrate import migrate  # Alembic costs 11 MiB and 0.3 s: only when it's needed

            migrate(engine, named)
    except OperationalError as error:
        engine.dispose()
        raise TransientError("disk.io", f"can't open {named}: {error.orig}", path=str(named)) from error
    except DatabaseError as error:
        engine.dispose()
        raise corrupt(named, f"isn't a healthy SQLite database: {error.orig}") from error
    except BaseException:
        engine.dispose()
        raise
    return engine


def _make(path: Path) -> None:
    """An empty store under a temporary name, then under its own: a file that is there is never a beginning."""
    draft = path.with_name(f".tmp-{path.name}")
    for left in (draft, *(draft.with_name(draft.name + end) for end in ("-wal", "-shm", "-journal"))):
        left.unlink(missing_ok=True)
    draft.touch(mode=0o600)
    _opened(draft, path).dispose()  # the last connection leaves no log behind
    draft.rename(path)
    fsync_directory(path.parent)


def _revision(engine: Engine) -> str | None:
    """The schema revision of the file; None for one without any, or with something odd (Alembic then says what)."""
    with engine.connect().execution_options(pgherd_read_only=True) as connection:
        if not inspect(connection).has_table("alembic_version"):
            return None
        found = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalars().all()
    return str(found[0]) if len(found) == 1 else None

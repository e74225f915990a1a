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

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DatabaseError, OperationalError

from pgherd.proto.errors import IntegrityError, TransientError
from pgherd.storage.control.schema import metadata

_BUSY_TIMEOUT_S = 15.0


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
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": _BUSY_TIMEOUT_S, "check_same_thread": False})
    event.listen(engine, "connect", _connect_pragmas)
    event.listen(engine, "begin", _begin_immediate)
    return engine


def alembic_config() -> Config:
    """Alembic's view of the revisions that are shipped with this version."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    return config


class ControlStore:
    """Transactions on the control store. Thread-safe."""

    def __init__(self, engine: Engine, path: Path) -> None:
        self._engine = engine
        self.path = path

    @classmethod
    def open(cls, path: Path) -> ControlStore:
        """Open or create the store and migrate it to this version's head.

        Raises IntegrityError format.newer for a store that a newer pgherd wrote, format.corrupt for a
        file that isn't a healthy SQLite database; the file is left as it was.
        """
        existed = path.exists()
        if not existed:
            path.touch(mode=0o600)
        engine = sqlite_engine(path)
        try:
            _refuse_newer(engine, path)
            with engine.connect() as connection:
                config = alembic_config()
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
        except OperationalError as error:
            engine.dispose()
            raise TransientError("disk.io", f"can't open {path}: {error.orig}", path=str(path)) from error
        except DatabaseError as error:
            engine.dispose()
            raise IntegrityError(
                "format.corrupt",
                f"{path} isn't a healthy SQLite database: {error.orig}",
                hint=f"move {path} aside and restore the last copy of it",
                path=str(path),
            ) from error
        except BaseException:
            engine.dispose()
            raise
        return cls(engine, path)

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """One durable transaction: committed when the block ends, rolled back when it raises.

        Raises TransientError store.unavailable when the disk or the lock doesn't allow it.
        """
        try:
            with self._engine.begin() as connection:
                yield connection
        except OperationalError as error:
            raise TransientError("store.unavailable", f"control store: {error.orig}", path=str(self.path)) from error

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A consistent read; keep it short. Raises TransientError store.unavailable."""
        try:
            with self._engine.connect().execution_options(pgherd_read_only=True) as connection, connection.begin():
                yield connection
        except OperationalError as error:
            raise TransientError("store.unavailable", f"control store: {error.orig}", path=str(self.path)) from error

    def close(self) -> None:
        """Release the file."""
        self._engine.dispose()


def _refuse_newer(engine: Engine, path: Path) -> None:
    script = ScriptDirectory.from_config(alembic_config())
    with engine.connect() as connection:
        current = MigrationContext.configure(connection).get_current_revision()
    if current is None:
        return
    try:
        script.get_revision(current)
    except CommandError as error:
        raise IntegrityError(
            "format.newer",
            f"{path} is at schema revision {current}, which this pgherd doesn't know",
            hint="run the pgherd version that wrote it, or a newer one",
            path=str(path),
            revision=current,
        ) from error


__all__ = ["ControlStore", "alembic_config", "metadata", "sqlite_engine"]

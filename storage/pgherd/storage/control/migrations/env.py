"""Alembic's environment: runs on a connection that `ControlStore` (or a test) hands over.

SQLite changes a table by copying it: foreign keys are off before BEGIN and checked before COMMIT, so
that a batch migration neither cascades nor leaves a dangling row.
"""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection

from pgherd.storage.control.schema import metadata


def _run(connection: Connection) -> None:
    sqlite = connection.dialect.name == "sqlite"
    raw = connection.connection.dbapi_connection
    assert raw is not None
    if sqlite:
        connection.rollback()  # leave any implicit transaction: this pragma does nothing inside one
        raw.cursor().execute("PRAGMA foreign_keys = OFF")
    context.configure(
        connection=connection,
        target_metadata=metadata,
        render_as_batch=sqlite,
        transactional_ddl=True,
        transaction_per_migration=False,
    )
    try:
        with context.begin_transaction():
            context.run_migrations()
            if sqlite:
                dangling = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall()
                if dangling:
                    raise RuntimeError(f"a migration left dangling rows: {dangling[:5]}")
        connection.commit()
    finally:
        if sqlite:
            connection.rollback()
            raw.cursor().execute("PRAGMA foreign_keys = ON")


_run(context.config.attributes["connection"])

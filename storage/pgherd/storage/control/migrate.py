"""Bringing a control store to this version's schema with Alembic; imported only by who has something to migrate."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy import Engine

from pgherd.proto.errors import IntegrityError


def alembic_config() -> Config:
    """Alembic's view of the revisions that are shipped with this version."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    return config


def migrate(engine: Engine, path: Path) -> None:
    """Upgrade to the newest revision. Raises IntegrityError format.newer, sqlalchemy.exc.DatabaseError."""
    _refuse_newer(engine, path)
    with engine.connect() as connection:
        config = alembic_config()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


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

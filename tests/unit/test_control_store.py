"""The control store's schema, its revisions and its refusals."""

from __future__ import annotations

import sqlite3
from contextlib import suppress
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, select

from pgherd.proto.errors import IntegrityError, TransientError
from pgherd.storage.control.schema import metadata, settings
from pgherd.storage.control.store import ControlStore, alembic_config, sqlite_engine


def test_the_revisions_build_exactly_the_schema(tmp_path: Path) -> None:
    path = tmp_path / "control.db"
    ControlStore.open(path).close()
    engine = sqlite_engine(path)
    with engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection, opts={"render_as_batch": True}), metadata)
    engine.dispose()
    assert differences == []


def test_every_revision_goes_down_and_up_again(tmp_path: Path) -> None:
    engine = sqlite_engine(tmp_path / "control.db")
    config = alembic_config()
    revisions = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        for _ in revisions:
            command.downgrade(config, "-1")
        assert inspect(connection).get_table_names() == ["alembic_version"]
        command.upgrade(config, "head")
        assert set(inspect(connection).get_table_names()) == {*metadata.tables, "alembic_version"}
    engine.dispose()


def test_what_was_committed_is_there_after_reopening(tmp_path: Path) -> None:
    path = tmp_path / "control.db"
    store = ControlStore.open(path)
    with store.begin() as connection:
        connection.execute(settings.insert().values(name="a", value="1"))
    with suppress(ZeroDivisionError), store.begin() as connection:
        connection.execute(settings.insert().values(name="b", value="2"))
        _ = 1 / 0
    store.close()
    store = ControlStore.open(path)
    with store.read() as connection:
        assert connection.execute(select(settings.c.name)).scalars().all() == ["a"]
    store.close()
    assert path.stat().st_mode & 0o077 == 0


def test_full_durability_is_on(tmp_path: Path) -> None:
    store = ControlStore.open(tmp_path / "control.db")
    with store.read() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
    store.close()


def test_a_newer_schema_is_refused_and_untouched(tmp_path: Path) -> None:
    path = tmp_path / "control.db"
    ControlStore.open(path).close()
    with sqlite3.connect(path) as raw:
        raw.execute("UPDATE alembic_version SET version_num = '9999'")
    raw.close()
    before = path.read_bytes()
    with pytest.raises(IntegrityError, match="9999") as caught:
        ControlStore.open(path)
    assert caught.value.code == "format.newer"
    assert path.read_bytes() == before


def test_a_damaged_file_is_named_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "control.db"
    path.write_bytes(b"this is not a database, whatever its name says" * 100)
    before = path.read_bytes()
    with pytest.raises(IntegrityError) as caught:
        ControlStore.open(path)
    assert caught.value.code == "format.corrupt"
    assert path.read_bytes() == before


def test_a_write_that_the_disk_refuses_is_transient(tmp_path: Path) -> None:
    """SQLite's own page limit stands for a full disk: the same SQLITE_FULL."""
    store = ControlStore.open(tmp_path / "control.db")
    with store.begin() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(TransientError) as caught, store.begin() as connection:
        connection.execute(settings.insert().values(name="big", value="x" * 1_000_000))
    assert caught.value.code == "store.unavailable"
    with store.read() as connection:
        assert connection.execute(select(settings.c.name)).all() == []
    store.close()

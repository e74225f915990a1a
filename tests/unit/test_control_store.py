"""The control store's schema, its revisions and its refusals."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, select

from pgherd.proto.errors import IntegrityError, TransientError
from pgherd.storage.control.migrate import alembic_config
from pgherd.storage.control.schema import HEAD_REVISION, metadata, settings
from pgherd.storage.control.store import ControlStore, sqlite_engine


def test_the_revisions_build_exactly_the_schema(tmp_path: Path) -> None:
    path = tmp_path / "control.db"
    ControlStore.open(path).close()
    engine = sqlite_engine(path)
    with engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection, opts={"render_as_batch": True}), metadata)
    engine.dispose()
    assert differences == []


def test_the_head_revision_is_the_newest_script() -> None:
    assert ScriptDirectory.from_config(alembic_config()).get_heads() == [HEAD_REVISION]


def test_a_store_at_head_is_opened_without_alembic(tmp_path: Path) -> None:
    """It costs memory and time at every start of the collector."""
    path = tmp_path / "control.db"
    ControlStore.open(path).close()
    script = (
        "import sys; from pathlib import Path; from pgherd.storage.control.store import ControlStore;"
        "ControlStore.open(Path(sys.argv[1])).close(); print('alembic' in sys.modules)"
    )
    opened = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True, timeout=60)
    assert opened.stdout == "False\n"


def test_damage_found_while_running_is_told_as_such(tmp_path: Path) -> None:
    path = tmp_path / "control.db"
    store = ControlStore.open(path)
    with store.read() as connection:
        page_bytes = connection.exec_driver_sql("PRAGMA page_size").scalar_one()
    store.close()
    content = bytearray(path.read_bytes())
    content[page_bytes * 2 :] = b"\xff" * (len(content) - page_bytes * 2)
    store = ControlStore.open(path)
    path.write_bytes(content)

    def read_all() -> None:
        with store.begin() as connection:
            for table in metadata.sorted_tables:
                connection.execute(select(table)).all()

    with pytest.raises(IntegrityError) as caught:
        read_all()
    assert caught.value.code == "format.corrupt"
    store.close()


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

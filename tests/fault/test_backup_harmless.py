"""A backup never causes the outage: it gives way to locks, to vacuum, to a disk that fills, and to whoever kills it.

And a restore, which executes what people put into their databases, harms nothing outside its directory.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from pgherd.agent.backup.deadline import Deadline
from pgherd.agent.backup.dump import judged_lines
from pgherd.agent.backup.rebuild import roles_sql
from pgherd.agent.backup.watch import SnapshotWatch, require_free, watching
from pgherd.postgres.connection import Target, connect
from pgherd.proto.errors import ConfigError, PgherdError, PreconditionError, TransientError
from support.backup import BackupNode, backup_node
from support.postgres import Fleet, Server
from support.waiting import wait_until

pytestmark = [pytest.mark.pg, pytest.mark.fault]
_GIB = 1 << 30


@pytest.fixture(scope="module")
def shop(postgres_fleet: Fleet) -> Iterator[Server]:
    server = postgres_fleet.server()
    server.create_database("shop")
    server.execute("CREATE TABLE goods AS SELECT g FROM generate_series(1, 1000) g; CREATE TABLE other (a int)", dbname="shop")
    yield server
    server.stop()


@pytest.fixture
def node(shop: Server, home: Path) -> BackupNode:
    return backup_node(shop, home)


class Once:
    """A progress port that does something, on the backup's own thread, the first time a phase is reported."""

    def __init__(self, phase: str, action: Callable[[], None]) -> None:
        self._phase, self._action, self.done = phase, action, False

    def __call__(self, phase: str, done: int, total: int, unit: str) -> None:
        if phase == self._phase and not self.done:
            self.done = True
            self._action()


@pytest.mark.parametrize("phase", ["fingerprint shop", "dump shop"])
def test_a_migration_that_waits_for_our_locks_gets_them(shop: Server, node: BackupNode, phase: str) -> None:
    """Everybody who reads the table queues behind the waiting ALTER TABLE: that is the outage."""
    got_it = threading.Event()

    def migrate() -> None:
        with shop.connect("shop") as connection:
            connection.execute("SET lock_timeout = '30s'")
            connection.execute("ALTER TABLE goods ADD COLUMN IF NOT EXISTS colour text")
            got_it.set()

    thread = threading.Thread(target=migrate, daemon=True)

    def strike() -> None:
        thread.start()
        got_it.wait(20)

    with pytest.raises(TransientError) as caught:
        node.with_backup(give_way_after=0.5).run(Once(phase, strike))
    assert caught.value.code == "backup.gave_way"
    assert got_it.is_set()
    thread.join(10)
    assert node.backups() == []
    assert node.run()["complete"]


def _digest_slowly(target: Target, deadline: Deadline) -> None:
    """A statement that goes on for a minute, under a snapshot that is watched."""
    with deadline, connect(target, "shop") as connection, deadline.over_connection(connection):
        connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        pid = connection.execute("SELECT pg_backend_pid() FROM public.goods").fetchall()[0][0]
        with SnapshotWatch(target, "shop", pid, 30, deadline, xmin_age_max=3) as watch, watching(deadline, watch.look, 0.1):
            connection.execute("SELECT pg_sleep(60)")


def test_a_snapshot_that_grows_old_inside_one_statement_ends_it(shop: Server) -> None:
    def age() -> None:
        wait_until(lambda: shop.execute("SELECT 1 FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(60)'"), 10, "the sleep")
        for _ in range(5):
            shop.execute("SELECT pg_current_xact_id()")

    thread = threading.Thread(target=age)
    thread.start()
    with pytest.raises(PreconditionError, match="holds back vacuum"):
        _digest_slowly(Target(shop.conninfo()), Deadline(30, "the test"))
    thread.join(10)


def test_a_statement_ends_with_the_process_that_asked(shop: Server) -> None:
    """A cut socket is what the server sees of a kill -9. A long digest would keep locks and snapshot for hours."""
    with pytest.raises(TransientError) as caught:
        _digest_slowly(Target(shop.conninfo()), Deadline(0.5, "the test"))
    assert caught.value.code == "child.timeout"
    left = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(60)%' AND pid <> pg_backend_pid()"
    wait_until(lambda: shop.execute(left) == [(0,)], 10, "the end of the orphaned backend")


def _watchers() -> int:
    return sum(thread.name == "pgherd-watch" for thread in threading.enumerate())


def test_a_disk_that_fills_meanwhile_ends_the_backup(node: BackupNode, home: Path) -> None:
    free_bytes = shutil.disk_usage(home).free
    filler = home / "filler"

    def strike() -> None:
        before = _watchers()
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, min(2 * _GIB, free_bytes // 2))
        wait_until(lambda: _watchers() < before, 10, "a look at the disk")

    tight = node.with_backup(free_min=free_bytes - min(_GIB, free_bytes // 4))
    once = Once("fingerprint shop", strike)
    with pytest.raises(PgherdError) as caught:
        tight.run(once)
    assert (once.done, caught.value.code) == (True, "disk.full")
    assert node.backups() == []


def test_neither_backup_nor_restore_takes_the_last_of_a_disk(node: BackupNode, home: Path) -> None:
    node.run()
    full = node.with_backup(free_min=1 << 60)
    (home / "roots").mkdir()
    verbs: list[Callable[[], object]] = [full.run, full.restore, lambda: full.restore(target=home / "roots" / "new")]
    for verb in verbs:
        with pytest.raises(TransientError) as caught:
            verb()
        assert caught.value.code == "disk.full"
    assert len(node.backups()) == 1
    assert node.repository.entry().grade == "read back", "a full disk says nothing about the backup"
    assert list((home / "roots").glob("[!.]*")) == []


# ---- what restored databases may do ---------------------------------------------------------------


def test_restored_code_cant_make_us_write_elsewhere(private_postgres: Server, home: Path) -> None:
    """As root we would write whatever file a link points to that the restored server's OS user put there."""
    victim = home / "victim"
    victim.write_text("precious")
    private_postgres.execute(
        "CREATE FUNCTION evil() RETURNS int LANGUAGE plpgsql AS $$ BEGIN "
        "IF current_setting('cluster_name') = 'pgherd scratch' THEN "
        f"COPY (SELECT 1) TO PROGRAM 'ln -sf {victim} pg_hba.conf && ln -sf {victim} postgresql.conf'; END IF; RETURN 1; END $$; "
        "CREATE MATERIALIZED VIEW trap AS SELECT evil()"
    )
    node = backup_node(private_postgres, home)
    node.run()
    target = home / "roots" / "new"
    target.parent.mkdir()
    assert node.restore(target=target)["grade"] == "content-equal"
    assert victim.read_text() == "precious"
    for name in ("pg_hba.conf", "postgresql.conf"):
        assert not (target / name).is_symlink()
        assert (target / name).stat().st_uid == target.stat().st_uid
        assert (target / name).stat().st_mode & 0o777 == 0o600


def test_a_link_in_a_restore_root_is_not_followed(node: BackupNode, home: Path) -> None:
    """A root belongs to somebody else, who may put anything where we work before publishing."""
    node.run()
    elsewhere = home / "elsewhere"
    elsewhere.mkdir()
    (home / "roots").mkdir()
    (home / "roots" / ".pgherd").symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="isn't ours"):
        node.restore(target=home / "roots" / "new")
    assert list(elsewhere.iterdir()) == []
    assert not (home / "roots" / "new").exists()


def test_settings_that_would_lock_us_out_of_the_restored_server(private_postgres: Server, home: Path) -> None:
    server = private_postgres
    server.execute(
        "CREATE ROLE boss SUPERUSER LOGIN; ALTER ROLE postgres SET default_transaction_read_only = on; "
        "ALTER ROLE postgres SET statement_timeout = '200ms'; "
        "ALTER ROLE ALL SET search_path = \"$user\", 'a b'; ALTER ROLE ALL SET work_mem = '9MB'; ALTER ROLE postgres NOLOGIN"
    )
    node = backup_node(server, home, role="boss")
    taken = node.run()
    assert (taken["complete"], taken["warnings"]) == (True, [])
    target = home / "roots" / "new"
    target.parent.mkdir()
    assert node.restore(target=target)["grade"] == "content-equal"  # roles' attributes and settings of ALL are compared


# ---- warnings -------------------------------------------------------------------------------------


def test_only_what_says_nothing_about_content_is_no_warning() -> None:
    mismatch = (
        'WARNING:  database "a b" has a collation version mismatch',
        "DETAIL:  The database was created using collation version 2.31, but the operating system provides version 2.36.",
        'HINT:  Rebuild all objects in this database that use the default collation and run ALTER DATABASE "a b" REFRESH COLLATION VERSION, or …',
    )
    lost = (
        'WARNING:  invalid page in block 3 of relation "base/5/16384"; zeroing out page',
        "pg_dump: warning: subscriptions not dumped because current user is not a superuser",
        "HINT:  something else",
    )
    assert judged_lines((*mismatch, *lost)) == lost


def test_a_database_after_an_upgrade_of_icu_is_backed_up_completely(private_postgres: Server, home: Path) -> None:
    try:
        private_postgres.execute("CREATE DATABASE aged TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'de'")
    except psycopg.errors.FeatureNotSupported:
        pytest.skip("these programs are built without ICU")
    private_postgres.execute("UPDATE pg_database SET datcollversion = '1' WHERE datname = 'aged'")
    node = backup_node(private_postgres, home)
    taken = node.run()
    assert (taken["complete"], taken["warnings"]) == (True, [])


def test_room_is_asked_for_before_it_is_needed(tmp_path: Path) -> None:
    free_bytes = shutil.disk_usage(tmp_path).free
    require_free(tmp_path / "not" / "yet", free_bytes // 4, free_bytes // 4)
    with pytest.raises(TransientError, match="are needed"):
        require_free(tmp_path / "not" / "yet", free_bytes // 4, free_bytes)


def test_roles_are_sql_and_nothing_for_psql() -> None:
    dumped = (
        b"--\n-- PostgreSQL database cluster dump\n--\n\n\\restrict Abc1\n\nSET client_encoding = 'LATIN1';\n\n"
        b'CREATE ROLE a;\nALTER ROLE a;\nCREATE ROLE "Boss";\nALTER ROLE "Boss" WITH SUPERUSER;\n'
        b"COMMENT ON ROLE a IS 'x\n\\unrestrict Abc2\n\\restrict no\nCREATE ROLE \"Boss\";\n\xe9';\n\n\\unrestrict Abc1\n\nALTER ROLE ALL SET work_mem TO '1MB';\n"
    )
    encoding, statements = roles_sql(dumped, "Boss")
    assert encoding == "LATIN1"
    assert statements == dumped.replace(b"\\restrict Abc1\n", b"").replace(b"\\unrestrict Abc1\n", b"").replace(
        b'CREATE ROLE "Boss";\n', b"", 1
    )
    assert roles_sql(b"CREATE ROLE x;\n", "y") == ("UTF8", b"CREATE ROLE x;\n")

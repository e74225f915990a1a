"""What goes wrong around a backup, done on purpose. Nothing half-made may ever look like a backup."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest

from pgherd.agent.backup.retain import retain
from pgherd.proto.errors import IntegrityError, PgherdError, PreconditionError
from pgherd.storage.manifest import MANIFEST_FORMAT, Manifest, parse_manifest, seal
from support.backup import BackupNode, backup_node
from support.postgres import Fleet, Server

pytestmark = [pytest.mark.pg, pytest.mark.fault]
SEED = 20261123


@pytest.fixture(scope="module")
def shop(postgres_fleet: Fleet) -> Iterator[Server]:
    """A server with one database that is big enough to be caught in the middle of its dump."""
    server = postgres_fleet.server()
    server.create_database("shop")
    server.execute(
        "CREATE TABLE big AS SELECT g, repeat(md5(g::text), 20) AS t FROM generate_series(1, 30000) g; "
        "CREATE TABLE small AS SELECT g AS number, 'row ' || g AS text FROM generate_series(1, 500) g",
        dbname="shop",
    )
    yield server
    server.stop()


@pytest.fixture
def node(shop: Server, home: Path) -> BackupNode:
    return backup_node(shop, home)


class Once:
    """A progress port that does something the first time a phase is reported."""

    def __init__(self, phase: str, action: object) -> None:
        self._phase, self._action, self.done = phase, action, False

    def __call__(self, phase: str, done: int, total: int, unit: str) -> None:
        if phase == self._phase and not self.done:
            self.done = True
            self._action()  # type: ignore[operator]


def _fails(node: BackupNode, once: Once) -> PgherdError:
    """Run, expect a failure after `once` struck, and nothing published or left."""
    with pytest.raises(PgherdError) as caught:
        node.run(once)
    assert once.done
    assert node.backups() == []
    return caught.value


# ---- pg_dump and the server -----------------------------------------------------------------------


def test_the_backend_of_pg_dump_is_terminated(shop: Server, node: BackupNode) -> None:
    def strike() -> None:
        assert shop.execute("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE query LIKE 'COPY %'") == [(1,)]

    error = _fails(node, Once("dump shop", strike))
    assert error.code == "child.failed"
    assert 'table "big" failed' in str(error.context["stderr"])
    assert node.run()["complete"]


def test_pg_dump_is_killed(node: BackupNode) -> None:
    def strike() -> None:
        for child in psutil.Process().children():
            if child.name() == "pg_dump":
                child.kill()

    error = _fails(node, Once("dump shop", strike))
    assert (error.code, "signal 9" in error.message) == ("child.failed", True)


def test_the_role_loses_a_right_in_the_middle(shop: Server, node: BackupNode) -> None:
    shop.execute("DROP ROLE IF EXISTS reader; CREATE ROLE reader LOGIN; GRANT SELECT ON pg_authid TO reader")
    shop.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader; GRANT pg_read_all_data TO reader", dbname="shop")
    shop.execute("GRANT SELECT ON pg_stat_statements, pg_stat_statements_info TO reader")
    mine = backup_node(shop, node.config.state_directory.parent, role="reader")
    try:
        error = _fails(
            mine,
            Once(
                "fingerprint shop",
                lambda: shop.execute("REVOKE pg_read_all_data FROM reader; REVOKE SELECT ON big FROM reader", dbname="shop"),
            ),
        )
        assert error.code in ("child.failed", "postgres.privilege")
        assert "permission denied for table big" in error.message
    finally:
        shop.execute("DROP OWNED BY reader", dbname="shop")
        shop.execute("DROP OWNED BY reader; DROP ROLE reader")


def test_a_hung_server_is_given_up_at_the_deadline(private_postgres: Server, home: Path) -> None:
    private_postgres.execute("CREATE TABLE t AS SELECT 1 AS a")
    node = backup_node(private_postgres, home, timeout=2.0)
    started_s = time.monotonic()
    error = _fails(node, Once("fingerprint postgres", private_postgres.pause))
    private_postgres.resume()
    assert error.code == "child.timeout"
    assert time.monotonic() - started_s < 30
    assert node.with_backup(timeout=60.0).run()["complete"]


def test_a_locked_table_isnt_waited_for_for_ever(shop: Server, node: BackupNode) -> None:
    with shop.connect("shop", autocommit=False) as holder:
        holder.execute("LOCK TABLE small IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(PgherdError) as caught:
            node.with_backup(lock_wait_timeout=0.2).run()
    assert caught.value.code == "postgres.timeout"
    assert node.backups() == []


def test_nobody_empties_a_table_between_fingerprint_and_dump(shop: Server, node: BackupNode) -> None:
    """TRUNCATE isn't MVCC-safe: without our lock both would see the table empty, and agree."""

    def strike() -> None:
        with shop.connect("shop") as other, pytest.raises(psycopg.errors.LockNotAvailable):
            other.execute("SET lock_timeout = '100ms'; TRUNCATE small")

    once = Once("fingerprint shop", strike)
    node.run(once)
    assert once.done


def test_databases_come_and_go(shop: Server, node: BackupNode) -> None:
    shop.create_database("a_doomed")
    shop.create_database("zz_doomed")

    def strike() -> None:
        shop.drop_database("zz_doomed")
        shop.create_database("newcomer")

    try:
        taken = node.run(Once("dump a_doomed", strike))
    finally:
        for name in ("a_doomed", "newcomer"):
            shop.drop_database(name)
    assert taken["complete"]
    assert "zz_doomed" not in taken["databases"]
    notes = node.repository.entry().manifest.notes
    assert [note for note in notes if "zz_doomed was dropped" in note]
    assert [note for note in notes if "newcomer was created" in note]


# ---- rights ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _role(server: Server, name: str, grant: str = "GRANT pg_read_all_data TO plain") -> Iterator[str]:
    server.execute(f"CREATE ROLE {name} LOGIN")
    server.execute(grant, dbname="shop")
    try:
        yield name
    finally:
        server.execute(f"DROP OWNED BY {name}", dbname="shop")
        server.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


def test_row_security_without_bypass_fails_loudly(shop: Server, home: Path) -> None:
    shop.execute(
        "CREATE TABLE guarded (a int); ALTER TABLE guarded ENABLE ROW LEVEL SECURITY; INSERT INTO guarded VALUES (1)",
        dbname="shop",
    )
    try:
        with _role(shop, "plain") as role:
            node = backup_node(shop, home, role=role)
            with pytest.raises(PgherdError, match="row-level security") as caught:
                node.run()
            assert caught.value.code == "postgres.privilege"
            assert node.backups() == []
            shop.execute("ALTER ROLE plain BYPASSRLS")
            assert node.run()["complete"]
    finally:
        shop.execute("DROP TABLE guarded", dbname="shop")


def test_an_unreadable_subscription_makes_it_incomplete(shop: Server, home: Path) -> None:
    shop.execute("CREATE SUBSCRIPTION sub CONNECTION 'dbname=x' PUBLICATION p WITH (connect = false)", dbname="shop")
    try:
        with _role(shop, "plain") as role:
            node = backup_node(shop, home, role=role)
            taken = node.run()
            assert (taken["complete"], taken["grade"]) == (False, "unproven")
            assert any("subscriptions not dumped" in warning for warning in taken["warnings"])
            with pytest.raises(IntegrityError, match=r"subscriptions differ \(0 instead of 1\)"):
                node.restore()
    finally:
        shop.execute("ALTER SUBSCRIPTION sub SET (slot_name = NONE)", dbname="shop")
        shop.execute("DROP SUBSCRIPTION sub", dbname="shop")


def test_missing_role_passwords_are_said_and_can_be_accepted(shop: Server, home: Path) -> None:
    with _role(shop, "plain", "GRANT SELECT ON ALL TABLES IN SCHEMA public TO plain") as role:
        node = backup_node(shop, home, role=role)
        taken = node.run()
        assert (taken["complete"], len(taken["warnings"])) == (False, 1)
        accepting = node.with_backup(role_passwords=False)
        taken = accepting.run()
        assert (taken["complete"], taken["warnings"]) == (True, [])
        assert any("role passwords" in note for note in accepting.repository.entry().manifest.notes)


def test_a_database_that_allows_no_connections_makes_it_incomplete(shop: Server, node: BackupNode) -> None:
    shop.create_database("closed")
    shop.execute("ALTER DATABASE closed ALLOW_CONNECTIONS false")
    try:
        taken = node.run()
        assert not taken["complete"]
        assert "closed" in taken["warnings"][0]
    finally:
        shop.drop_database("closed")


# ---- the repository -------------------------------------------------------------------------------


def _parts(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if not path.name.startswith(("proof", "manifest", ".")))


@pytest.mark.parametrize("compression", ["zstd", "gzip", "none"])
def test_every_flipped_bit_is_found(node: BackupNode, compression: str) -> None:
    node = node.with_backup(compression=compression)
    node.run()
    (directory,) = node.backups()
    chance = random.Random(SEED)
    for _ in range(30):
        part = chance.choice(_parts(directory))
        content = bytearray(part.read_bytes())
        position, bit = chance.randrange(len(content)), chance.randrange(8)
        content[position] ^= 1 << bit
        part.write_bytes(content)
        with pytest.raises(IntegrityError) as caught:
            node.verify()
        assert caught.value.code == "backup.corrupt", (SEED, part.name, position, bit)
        assert node.repository.entry().grade == "unproven"
        content[position] ^= 1 << bit
        part.write_bytes(content)
    assert node.verify()["grade"] == "read back"


def _forge(directory: Path, old: bytes, new: bytes) -> None:
    """Change content inside an uncompressed archive and recompute every outer hash, as a bug upstream of them would."""
    import hashlib

    manifest = parse_manifest((directory / "manifest.json").read_bytes(), "m")
    parts = []
    for part in manifest.parts:
        path = directory / part.name
        content = path.read_bytes()
        if part.role == "database" and old in content:
            content = content.replace(old, new)
            path.write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        parts.append(dataclasses.replace(part, stored_sha256=digest, plain_sha256=digest))
    (directory / "manifest.json").write_bytes(dataclasses.replace(manifest, parts=tuple(parts)).serialise())


def test_wrong_content_under_right_hashes_is_found_by_restoring(node: BackupNode) -> None:
    node = node.with_backup(compression="none")
    node.run()
    _forge(node.backups()[0], b"row 321\n", b"row 323\n")
    assert node.verify()["grade"] == "read back"  # bytes are as written: only a restore can know better
    with pytest.raises(IntegrityError, match="same 500 rows by number, but their content differs") as caught:
        node.restore()
    assert caught.value.code == "backup.content_differs"
    assert node.repository.entry().grade == "unproven"


def test_a_damaged_archive_never_becomes_a_directory(node: BackupNode, home: Path) -> None:
    node.run()
    part = next(path for path in _parts(node.backups()[0]) if "shop" in path.name)
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    (home / "roots").mkdir()
    with pytest.raises(IntegrityError) as caught:
        node.restore(target=home / "roots" / "new")
    assert caught.value.code == "backup.corrupt"
    assert list((home / "roots").rglob("*")) in ([], [home / "roots" / ".pgherd"])


def test_a_lost_part_and_a_newer_manifest(node: BackupNode) -> None:
    node.run()
    node.run()
    first, second = node.backups()
    _parts(second)[0].unlink()
    with pytest.raises(IntegrityError, match="is missing"):
        node.verify(second.name)
    document = json.loads((first / "manifest.json").read_bytes())
    (first / "manifest.json").write_bytes(seal(MANIFEST_FORMAT, {**document, "version": 2}))
    for verb in (node.verify, node.restore):
        with pytest.raises(IntegrityError) as caught:
            verb(first.name)
        assert caught.value.code == "format.newer"
    for _ in range(2):
        node.with_backup(keep=1).run()
    assert first in node.backups(), "what can't be read must never be deleted"


def test_a_disk_without_room(node: BackupNode) -> None:
    """The real command under a file size limit, which the kernel reports where a full disk is reported."""
    program = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000)); from pgherd.agent.main import main; main()"
    command = [sys.executable, "-c", program, "--config", str(node.config_file()), "backup", "run", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stderr)["error"]["code"] == "disk.full"
    assert done.returncode == 1
    assert node.backups() == [], "the failed backup's bytes are still there"


def test_two_at_once_and_a_reader_against_retention(node: BackupNode) -> None:
    node.run()
    (first,) = node.backups()
    with node.repository.writing(), pytest.raises(PreconditionError) as caught:
        node.run()
    assert caught.value.code == "state.locked"
    node.run()
    with node.repository.reading(first.name):
        assert [decision.keep for decision in retain(node.repository, 1)] == [True, True]
    assert [decision.name for decision in retain(node.repository, 1) if not decision.keep] == [first.name]
    assert first not in node.backups()


def test_backups_of_another_cluster_arent_mixed(postgres_fleet: Fleet, node: BackupNode) -> None:
    node.run()
    stranger = postgres_fleet.server(own_identifier=True)
    with pytest.raises(IntegrityError) as caught:
        node.with_node(conninfo=stranger.conninfo()).run()
    stranger.stop()
    assert caught.value.code == "backup.repository_foreign"
    assert len(node.backups()) == 1


def test_kill_9_at_any_point_leaves_no_backup_and_no_obstacle(node: BackupNode) -> None:
    """Seeded points: after so many progress lines of the real command."""
    chance = random.Random(SEED)
    command = [sys.executable, "-m", "pgherd.agent", "--config", str(node.config_file()), "backup", "run", "--ndjson"]
    command[1:3] = ["-c", "from pgherd.agent.main import main; main()"]
    for _ in range(4):
        lines = chance.randrange(1, 8)
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            for _, line in zip(range(lines), process.stdout, strict=False):
                assert '"progress"' in line, "finished before it was struck"
            process.send_signal(signal.SIGKILL)
        assert [path for path in node.backups() if (path / "manifest.json").exists()] == [], (SEED, lines)
    assert node.repository.entries() == []
    assert node.run()["grade"] == "read back"
    assert len(node.backups()) == 1, "leftovers of the killed runs weren't swept"


def test_kill_9_of_a_restore_leaves_a_server_that_the_next_run_sweeps(node: BackupNode, home: Path) -> None:
    node.run()
    command = [sys.executable, "-c", "from pgherd.agent.main import main; main()", "--config", str(node.config_file())]
    with subprocess.Popen(
        [*command, "backup", "restore", "--ndjson"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "restore db-" in line:
                break
        process.send_signal(signal.SIGKILL)
    assert list((home / "scratch").iterdir()) != []
    node.run()  # the hourly one: nobody may ever restore again
    assert list((home / "scratch").iterdir()) == []
    assert node.restore()["grade"] == "content-equal"
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(home) in " ".join(p.info["cmdline"] or [])]


def test_a_result_file_and_its_lock(node: BackupNode, home: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "from pgherd.agent.main import main; main()",
        "--config",
        str(node.config_file()),
        "backup",
    ]
    result = home / "result.json"
    done = subprocess.run([*command, "run", "--ndjson", "--result-file", result], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last == json.loads(result.read_text())
    assert last["result"]["grade"] == "read back"
    done = subprocess.run(
        [*command, "verify", "--backup", "20200101T000000.000Z-0000", "--ndjson", "--result-file", result],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert json.loads(result.read_text())["error"]["code"] == "backup.not_found"
    assert json.loads(done.stdout.splitlines()[-1])["error"]["code"] == "backup.not_found"
    done = subprocess.run(
        [*command, "restore", "--root", "nowhere", "--name", "x", "--json"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 4
    assert json.loads(done.stderr)["error"]["code"] == "restore.outside_roots"


def test_the_manifest_says_what_is_in_it(node: BackupNode) -> None:
    node.run()
    manifest: Manifest = node.repository.entry().manifest
    assert {part.role for part in manifest.parts} == {"roles", "tablespaces", "database", "fingerprint"}
    shop = next(database for database in manifest.databases if database.name == "shop")
    assert (shop.tables, shop.rows, shop.encoding) == (2, 30500, "UTF8")
    assert shop.extensions[0].name == "plpgsql"
    (directory,) = node.backups()
    assert {oct(path.stat().st_mode & 0o777) for path in directory.iterdir()} == {"0o600"}
    assert oct(directory.stat().st_mode & 0o777) == "0o700"

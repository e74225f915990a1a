"""Backup → restore → equal content, over every kind of type and object that is known to lie about equality."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from pathlib import Path

import psycopg
import pytest

from pgherd.postgres.connection import Target, connect
from pgherd.postgres.content import fingerprint, plan_content
from pgherd.postgres.fingerprint import Fingerprint, differences
from pgherd.postgres.scratch import serving, socket_directory, socket_settings, write_settings
from pgherd.proto.errors import PgherdError, PreconditionError
from support.backup import backup_node
from support.postgres import Fleet, Server, default_major, majors

pytestmark = pytest.mark.pg

# Each line is here because something compares, hashes or restores it in a surprising way.
MANY_TYPES = r"""
CREATE SCHEMA "Odd ""schema";
CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy');
CREATE DOMAIN positive AS int CHECK (VALUE > 0);
CREATE TYPE span AS RANGE (subtype = timestamptz);
CREATE TYPE pair AS (a int, b text);
CREATE TABLE kinds (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, e mood, es mood[], d positive, r span, c pair, cs pair[],
    n numeric, f float8, f4 float4, j json, jb jsonb, x xml, p point, box box, i interval, ts timestamptz, t time with time zone,
    by bytea, ch char(10), v varchar(20), m money, bits bit varying, net inet, mac macaddr, u uuid, tsv tsvector, rc regclass,
    rt regtype, o oid, "weird "" name" text, doubled int GENERATED ALWAYS AS (d * 2) STORED
);
INSERT INTO kinds (e, es, d, r, c, cs, n, f, f4, j, jb, x, p, box, i, ts, t, by, ch, v, m, bits, net, mac, u, tsv, rc, rt, o, "weird "" name")
SELECT (ARRAY['sad','ok','happy'])[1 + g % 3]::mood, ARRAY['ok', NULL]::mood[], g, span(now(), now() + g * interval '1 h'), ROW(g, 'b' || g)::pair,
       ARRAY[ROW(g, NULL)::pair], CASE g % 2 WHEN 0 THEN 1.0 ELSE 1.00 END, CASE g % 3 WHEN 0 THEN 0.0 WHEN 1 THEN '-0.0' ELSE 0.1 + g / 3.0 END,
       g / 7.0, '{"b": 1,  "a": 1.0}', '{"b": 1,  "a": 1.00}', '<a  b="1"/>', point(g, 0.1), box(point(0, 0), point(g, g)),
       CASE g % 2 WHEN 0 THEN interval '1 day' ELSE interval '24 hours' END, now() + g * interval '1 us', '12:00+05:30', decode(md5(g::text), 'hex'),
       'x', E'tab\t\\ ünï', g, B'101', '10.0.0.1/8', '08:00:2b:01:02:03', md5(g::text)::uuid, to_tsvector('english', 'fat cats ' || g),
       'kinds', 'mood', g, CASE g % 3 WHEN 0 THEN NULL WHEN 1 THEN '' ELSE 'NULL' END
FROM generate_series(1, 200) g;
CREATE TABLE parted (k mood, v int) PARTITION BY HASH (k);
CREATE TABLE parted_0 PARTITION OF parted FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE parted_1 PARTITION OF parted FOR VALUES WITH (MODULUS 2, REMAINDER 1);
INSERT INTO parted SELECT (ARRAY['sad','ok','happy'])[1 + g % 3]::mood, g FROM generate_series(1, 60) g;
CREATE TABLE parent (a int, b text);
CREATE TABLE child (c int) INHERITS (parent);
ALTER TABLE parent ADD COLUMN z int;
ALTER TABLE child DROP COLUMN c, ADD COLUMN d int;
INSERT INTO parent VALUES (1, 'p', 2); INSERT INTO child VALUES (3, 'c', 4, 5);
CREATE TABLE guarded (who text); ALTER TABLE guarded ENABLE ROW LEVEL SECURITY; ALTER TABLE guarded FORCE ROW LEVEL SECURITY;
CREATE POLICY own ON guarded USING (who = current_user); INSERT INTO guarded VALUES ('a'), ('b');
CREATE TABLE "Odd ""schema"."Table; --" ("select" int, empty text); INSERT INTO "Odd ""schema"."Table; --" VALUES (1, '');
CREATE TABLE nothing (); INSERT INTO nothing DEFAULT VALUES;
CREATE UNLOGGED TABLE unlogged (a int); INSERT INTO unlogged VALUES (7);
CREATE SEQUENCE down INCREMENT -3; SELECT nextval('down');
CREATE MATERIALIZED VIEW stale AS SELECT count(*) FROM parent; INSERT INTO parent VALUES (9, 'later', 0);
CREATE VIEW seen AS SELECT * FROM parent;
CREATE FUNCTION f(int) RETURNS int LANGUAGE sql IMMUTABLE RETURN $1 + 1;
CREATE FUNCTION tf() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
CREATE TRIGGER tr BEFORE INSERT ON parent FOR EACH ROW EXECUTE FUNCTION tf();
CREATE INDEX expr ON parent (f(a)); CREATE INDEX on_parted ON parted (v); ALTER TABLE parent ADD CONSTRAINT positive_a CHECK (a > 0) NOT VALID;
CREATE PUBLICATION pub FOR TABLE kinds;
CREATE FOREIGN DATA WRAPPER nowhere; CREATE SERVER elsewhere FOREIGN DATA WRAPPER nowhere; CREATE FOREIGN TABLE remote (a int) SERVER elsewhere;
SELECT lo_from_bytea(0, decode(repeat('ab', 400000), 'hex')), lo_from_bytea(0, ''), lo_create(0);
COMMENT ON TABLE parent IS 'a
CREATE ROLE postgres;
trap';
"""

# Settings that bend text output if nobody pins them.
BENT = """
ALTER DATABASE {db} SET datestyle = 'German'; ALTER DATABASE {db} SET extra_float_digits = 0; ALTER DATABASE {db} SET bytea_output = 'escape';
ALTER DATABASE {db} SET timezone = 'Asia/Kathmandu'; ALTER DATABASE {db} SET intervalstyle = 'iso_8601';
ALTER DATABASE {db} SET search_path = "$user", 'Odd "schema', public; ALTER DATABASE {db} SET default_transaction_read_only = on;
"""


def _filled(fleet: Fleet, major: int) -> Server:
    server = fleet.server(major)
    for database in ("types", "second"):
        server.create_database(database)
    # an 18 wheel is built without libxml
    text = MANY_TYPES if _has_xml(server) else MANY_TYPES.replace(" x xml,", " x text,")
    server.execute(text, dbname="types")
    server.execute(
        "CREATE ROLE app LOGIN PASSWORD 'x'; CREATE ROLE team; GRANT team TO app; ALTER ROLE app SET work_mem = '8MB'"
    )
    server.execute("GRANT SELECT ON parent TO app; ALTER TABLE child OWNER TO team", dbname="types")
    server.execute(BENT.format(db="types"))
    return server


def _has_xml(server: Server) -> bool:
    try:
        server.execute("SELECT '<a/>'::xml")
    except psycopg.errors.FeatureNotSupported:
        return False
    return True


def read_fingerprint(server: Server, dbname: str) -> Fingerprint:
    with connect(Target(server.conninfo()), dbname) as connection:
        connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        return fingerprint(connection, plan_content(connection))


@pytest.mark.parametrize(("major", "compression"), list(zip(majors(), itertools.cycle(["zstd", "gzip", "none"]))))
def test_every_type_comes_back_equal(postgres_fleet: Fleet, home: Path, major: int, compression: str) -> None:
    server = _filled(postgres_fleet, major)
    node = backup_node(server, home, compression=compression)
    taken = node.run()
    assert (taken["complete"], taken["warnings"], taken["grade"]) == (True, [], "read back")
    assert taken["databases"] == ["postgres", "second", "template1", "types"]
    restored = node.restore()
    assert restored["grade"] == "content-equal"
    assert restored["rows_compared"] == sum(read_fingerprint(server, db).rows for db in taken["databases"])
    assert node.repository.entry().grade == "content-equal"
    assert list((home / "scratch").iterdir()) == []
    server.stop()


CHANGES = [
    "UPDATE kinds SET n = 1.000 WHERE id = 2",
    "UPDATE kinds SET f = '-0.0' WHERE f = 0 AND f::text = '0'",
    'UPDATE kinds SET jb = \'{"b": 1, "a": 1.0}\'',
    "UPDATE kinds SET i = '24 hours' WHERE id = 2",
    "UPDATE kinds SET e = 'ok' WHERE id = 3",
    'UPDATE kinds SET "weird "" name" = NULL WHERE "weird "" name" = \'\'',
    "UPDATE kinds SET by = set_byte(by, 0, get_byte(by, 0) # 1) WHERE id = 5",
    "UPDATE kinds SET ts = ts + interval '1 us' WHERE id = 7",
    "INSERT INTO nothing DEFAULT VALUES",
    "DELETE FROM ONLY parent WHERE a = 1",
    "UPDATE parted SET v = v + 1 WHERE v = 4",
    "SELECT setval('kinds_id_seq', 3)",
    "SELECT lo_put((SELECT min(oid) FROM pg_largeobject_metadata), 300000, 'x')",
    "DROP INDEX expr",
    "ALTER TABLE parent DISABLE TRIGGER tr",
    "ALTER TYPE mood ADD VALUE 'new'",
    "DROP POLICY own ON guarded",
]


def test_every_change_of_content_is_seen(postgres_fleet: Fleet) -> None:
    server = _filled(postgres_fleet, default_major())
    before = read_fingerprint(server, "types")
    assert differences(before, before) == []
    for change in CHANGES:
        with connect(Target(server.conninfo()), "types") as reader:
            reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ WRITE")
            reader.execute("SET LOCAL search_path = public")
            reader.execute(change.encode())
            reader.execute("SET LOCAL search_path = ''")
            unlike = differences(before, fingerprint(reader, plan_content(reader)))
            reader.execute("ROLLBACK")
        if "setval" in change:  # not transactional
            server.execute("SET TRANSACTION READ WRITE; SELECT setval('kinds_id_seq', 200)", dbname="types")
        assert len(unlike) == 1, (change, unlike)
    # And what isn't content: physical order, a refreshed view; nor does a bent setting change more than itself.
    server.execute("SET TRANSACTION READ WRITE; UPDATE kinds SET v = v; REFRESH MATERIALIZED VIEW stale", dbname="types")
    server.execute("ALTER DATABASE types SET datestyle = 'SQL, DMY'")
    assert differences(before, read_fingerprint(server, "types")) == ["settings differ (7 instead of 7)"]
    server.stop()


def test_a_restored_directory_is_a_whole_server(postgres: Server, home: Path, database: str) -> None:
    postgres.execute("CREATE TABLE t AS SELECT g FROM generate_series(1, 100) g", dbname=database)
    node = backup_node(postgres, home)
    node.run()
    target = home / "roots" / "new"
    target.parent.mkdir()
    restored = node.restore(target=target)
    assert (restored["grade"], restored["directory"]) == ("content-equal", str(target))
    assert [path.name for path in target.parent.iterdir()] == ["new"]
    assert "trust" not in (target / "pg_hba.conf").read_text().replace("# ", "")
    with pytest.raises(PreconditionError, match="exists already") as caught:
        node.restore(target=target)
    assert caught.value.code == "restore.target_exists"
    (target.parent / "empty").mkdir()
    with pytest.raises(PreconditionError, match="exists already"):
        node.restore(target=target.parent / "empty")
    assert list((target.parent / "empty").iterdir()) == []
    with socket_directory(home, postgres.user) as sockets:
        postgres.user.own_tree(target)
        write_settings(target, socket_settings(sockets), postgres.user)
        (target / "pg_hba.conf").write_text("local all all trust\n")
        with (
            serving(postgres.binaries, target, postgres.user),
            psycopg.connect(host=str(sockets), user="postgres", dbname=database) as connection,
        ):
            assert connection.execute("SELECT count(*) FROM t").fetchone() == (100,)
            rows = connection.execute("SELECT datname FROM pg_database WHERE datname LIKE 'pgherd%'").fetchall()
            assert rows == []


def test_tablespaces_are_restored_inside_the_new_directory(private_postgres: Server, home: Path) -> None:
    location = home / "space"
    location.mkdir()
    private_postgres.user.own(location)
    private_postgres.execute(f"CREATE TABLESPACE fast LOCATION '{location}'")
    private_postgres.execute("CREATE TABLE t TABLESPACE fast AS SELECT 1 AS a")
    before = sorted(location.rglob("*"))
    node = backup_node(private_postgres, home)
    node.run()
    assert node.restore()["grade"] == "content-equal"
    assert sorted(location.rglob("*")) == before


def test_a_standby_can_be_backed_up(postgres_fleet: Fleet, home: Path) -> None:
    pair = postgres_fleet.pair()
    pair.primary.execute("CREATE TABLE t AS SELECT g FROM generate_series(1, 100) g; CREATE UNLOGGED TABLE u AS SELECT 1 AS a")
    pair.wait_caught_up()
    node = backup_node(pair.standby, home)
    assert node.run()["complete"] is True
    assert node.repository.entry().manifest.from_standby
    restored = node.restore()
    assert (restored["grade"], restored["tables_compared"]) == ("content-equal", 1)  # an unlogged table has no content there
    pair.standby.stop()
    pair.primary.stop()


@pytest.mark.skipif(shutil.which("zstd") is None, reason="the zstd program isn't installed")
def test_the_runbook_restores_with_stock_tools(postgres: Server, private_postgres: Server, home: Path, database: str) -> None:
    """Runs docs/runbooks/restore-without-pgherd.md's commands as they are printed there."""
    postgres.execute("CREATE TABLE t AS SELECT g, md5(g::text) FROM generate_series(1, 1000) g", dbname=database)
    postgres.execute("DROP ROLE IF EXISTS runbook_app; CREATE ROLE runbook_app LOGIN")
    node = backup_node(postgres, home)
    node.run()
    text = (Path(__file__).parents[2] / "docs/runbooks/restore-without-pgherd.md").read_text()
    script = "set -euo pipefail\n" + "\n".join(
        block.split("```", 1)[0] for block in text.split("```sh\n")[1:] if "# variant" not in block
    )
    environment = {
        "PATH": f"{private_postgres.binaries.bin_directory}:/usr/bin:/bin",
        "BACKUP": str(node.backups()[0]),
        "PGHOST": str(private_postgres.socket_directory),
        "PGPORT": str(private_postgres.port),
        "PGUSER": "postgres",
    }
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert private_postgres.execute("SELECT count(*) FROM t", dbname=database) == [(1000,)]
    assert private_postgres.execute("SELECT 1 FROM pg_roles WHERE rolname = 'runbook_app'") == [(1,)]
    postgres.execute("DROP ROLE runbook_app")
    assert differences(read_fingerprint(postgres, database), read_fingerprint(private_postgres, database)) == []


def test_a_missing_backup_says_so(postgres: Server, home: Path) -> None:
    with pytest.raises(PgherdError) as caught:
        backup_node(postgres, home).restore()
    assert caught.value.code == "backup.not_found"

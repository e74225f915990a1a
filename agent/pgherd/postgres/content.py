"""Reading a database's content fingerprint through a connection (docs/formats/fingerprint-v1.md).

The canonical form of a row is the text that pg_dump would carry: `ROW(columns…)::text` with every
setting pinned (see `connection.PINNED_SETTINGS`), columns named and sorted. `hash_record_extended`
isn't used: it hashes the OIDs of enum labels and regclass values, which change with every restore,
and it follows `=`, for which 1.0 and 1.00, 0.0 and -0.0 or two cases of citext are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from psycopg import Connection, sql

from pgherd.postgres.fingerprint import EMPTY, Digest, Fingerprint, SequenceState, TableContent
from pgherd.postgres.versions import major_of

_SEED_A, _SEED_B = 0x70676865, 0x72645F31  # part of the format: never change them
_LOCK_BATCH = 200
_LARGE_OBJECT_CHUNK_BYTES = 262144

# User relations and the tables of extensions whose data pg_dump carries (pg_extension.extconfig).
_RELATIONS_SQL = """
SELECT c.oid::bigint, n.nspname, c.relname, quote_ident(n.nspname) || '.' || quote_ident(c.relname),
       c.relkind::text, c.relpersistence::text,
       CASE WHEN c.relispartition THEN pg_partition_root(c.oid)::oid::bigint END,
       d.objid IS NOT NULL, config.condition
FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace
LEFT JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.objsubid = 0
                     AND d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e'
LEFT JOIN LATERAL (
    SELECT x.extcondition[i] AS condition
    FROM pg_extension x, generate_subscripts(x.extconfig, 1) i
    WHERE x.oid = d.refobjid AND x.extconfig[i] = c.oid
) config ON true
WHERE c.relkind IN ('r', 'p', 'f', 'S', 'm') AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
ORDER BY n.nspname, c.relname
"""

_COLUMNS_SQL = """
SELECT attrelid::bigint, attname, format_type(atttypid, atttypmod), attgenerated <> ''
FROM pg_attribute
WHERE attrelid = ANY(%s::oid[]) AND attnum > 0 AND NOT attisdropped
ORDER BY attrelid, attname COLLATE "C"
"""

_LARGE_OBJECTS_SQL = """
SELECT count(DISTINCT loid), sum(hashtextextended(chunk, {a})), sum(hashtextextended(chunk, {b}))
FROM (
    SELECT size.loid,
           (size.loid::text || ':' || size.bytes || ':' || k || ':'
            || encode(lo_get(size.loid, k * {chunk}::bigint, {chunk}), 'hex')) COLLATE "C" AS chunk
    FROM (SELECT opened.loid, lo_lseek64(opened.fd, 0, 2) AS bytes, lo_close(opened.fd)
          FROM (SELECT oid AS loid, lo_open(oid, 262144) AS fd FROM pg_largeobject_metadata OFFSET 0) opened
          OFFSET 0) size,
         generate_series(0, greatest(size.bytes - 1, 0) / {chunk}::bigint) k
    OFFSET 0
) chunks
"""

# One row per object: kind and everything of its name that a restore must bring back. Objects that an
# extension owns come with it. INVALID indexes aren't in a dump and so aren't counted.
_INVENTORY_SQL = """
WITH member AS (SELECT classid, objid FROM pg_depend WHERE refclassid = 'pg_extension'::regclass AND deptype = 'e'),
     space AS (SELECT oid, nspname FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'),
     relation AS (SELECT c.oid, c.relkind, format('%I.%I', s.nspname, c.relname) AS name
                  FROM pg_class c JOIN space s ON s.oid = c.relnamespace
                  WHERE NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_class'::regclass AND m.objid = c.oid)),
     this AS (SELECT oid FROM pg_database WHERE datname = current_database())
SELECT 'relations', relkind::text || ' ' || name FROM relation WHERE relkind IN ('r', 'p', 'v', 'm', 'f', 'S', 'c')
UNION ALL
SELECT 'indexes', i.name || ' on ' || t.name
FROM pg_index x JOIN relation i ON i.oid = x.indexrelid JOIN relation t ON t.oid = x.indrelid
WHERE x.indisvalid OR t.relkind = 'p'
UNION ALL
SELECT 'constraints', k.contype::text || ' ' || k.conname || ' on ' || r.name
FROM pg_constraint k JOIN relation r ON r.oid = k.conrelid
WHERE k.contype IN ('c', 'f', 'p', 'u', 'x') AND k.conparentid = 0
UNION ALL
SELECT 'triggers', t.tgenabled::text || ' ' || t.tgname || ' on ' || r.name
FROM pg_trigger t JOIN relation r ON r.oid = t.tgrelid WHERE NOT t.tgisinternal AND t.tgparentid = 0
UNION ALL
SELECT 'policies', p.polname || ' on ' || r.name FROM pg_policy p JOIN relation r ON r.oid = p.polrelid
UNION ALL
SELECT 'rules', w.rulename || ' on ' || r.name FROM pg_rewrite w JOIN relation r ON r.oid = w.ev_class WHERE w.rulename <> '_RETURN'
UNION ALL
SELECT 'functions', p.prokind::text || format(' %I.%I(%s)', s.nspname, p.proname, pg_get_function_identity_arguments(p.oid))
FROM pg_proc p JOIN space s ON s.oid = p.pronamespace
WHERE NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_proc'::regclass AND m.objid = p.oid)
UNION ALL
SELECT 'types', t.typtype::text || format(' %I.%I ', s.nspname, t.typname)
       || coalesce((SELECT string_agg(quote_literal(enumlabel), ',' ORDER BY enumsortorder) FROM pg_enum WHERE enumtypid = t.oid), '')
FROM pg_type t JOIN space s ON s.oid = t.typnamespace
WHERE t.typtype IN ('e', 'd', 'r') AND NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_type'::regclass AND m.objid = t.oid)
UNION ALL
SELECT 'schemas', nspname FROM space
WHERE NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_namespace'::regclass AND m.objid = space.oid)
UNION ALL
SELECT 'extensions', extname FROM pg_extension
UNION ALL
SELECT 'event triggers', evtname FROM pg_event_trigger
WHERE NOT EXISTS (SELECT FROM member m WHERE m.classid = 'pg_event_trigger'::regclass AND m.objid = pg_event_trigger.oid)
UNION ALL
SELECT 'publications', pubname FROM pg_publication
UNION ALL
SELECT 'subscriptions', subname FROM pg_subscription WHERE subdbid = (SELECT oid FROM this)
UNION ALL
SELECT 'settings', coalesce(r.rolname, '') || ' ' || setting
FROM pg_db_role_setting g LEFT JOIN pg_roles r ON r.oid = g.setrole, unnest(g.setconfig) setting
WHERE g.setdatabase = (SELECT oid FROM this)
"""

_GLOBALS_SQL = """
SELECT 'roles', concat_ws(' ', quote_ident(rolname), rolsuper, rolinherit, rolcreaterole, rolcreatedb, rolcanlogin,
                          rolreplication, rolbypassrls, rolconnlimit, coalesce(rolvaliduntil::text, 'never'))
FROM pg_roles WHERE rolname !~ '^pg_'
UNION ALL
SELECT 'memberships', format('%I in %I %s', m.rolname, g.rolname, a.admin_option)
FROM pg_auth_members a JOIN pg_roles m ON m.oid = a.member JOIN pg_roles g ON g.oid = a.roleid
UNION ALL
SELECT 'role settings', format('%s %s', CASE WHEN g.setrole = 0 THEN 'ALL' ELSE format('%I', r.rolname) END, setting)
FROM pg_db_role_setting g LEFT JOIN pg_roles r ON r.oid = g.setrole, unnest(g.setconfig) setting WHERE g.setdatabase = 0
"""

_COLLATIONS_SQL = """
SELECT DISTINCT format('%I.%I', n.nspname, l.collname), coalesce(pg_collation_actual_version(l.oid), '')
FROM pg_attribute a
JOIN pg_class c ON c.oid = a.attrelid
JOIN pg_namespace s ON s.oid = c.relnamespace
JOIN pg_collation l ON l.oid = a.attcollation
JOIN pg_namespace n ON n.oid = l.collnamespace
WHERE a.attnum > 0 AND NOT a.attisdropped AND s.nspname !~ '^pg_' AND s.nspname <> 'information_schema'
  AND NOT (n.nspname = 'pg_catalog' AND l.collname IN ('default', 'C', 'POSIX', 'ucs_basic'))
"""


@dataclass(frozen=True, slots=True)
class _Relation:
    oid: int
    schema: str
    table: str
    name: str  # quoted and qualified
    kind: str  # relkind
    persistence: str  # relpersistence
    root: int | None  # of a partition: its topmost parent
    owned_by_extension: bool
    condition: str | None  # extension tables whose data is dumped: the filter, "" for all rows


@dataclass(frozen=True, slots=True)
class Plan:
    """What of a database is content, as one snapshot sees it."""

    relations: tuple[_Relation, ...]  # to digest: ordinary tables and leaves of partitioned ones
    roots: tuple[_Relation, ...]  # named in the fingerprint: ordinary and partitioned tables
    sequences: tuple[_Relation, ...]
    skipped: Mapping[str, str]


def plan_content(connection: Connection[Any]) -> Plan:
    """Decide what is content. Run inside the snapshot's transaction."""
    standby = bool(connection.execute("SELECT pg_is_in_recovery()").fetchall()[0][0])
    skipped: dict[str, str] = {}
    relations: list[_Relation] = []
    roots: list[_Relation] = []
    sequences: list[_Relation] = []
    for row in connection.execute(_RELATIONS_SQL):
        relation = _Relation(*row)
        reason = _skip_reason(relation, standby=standby)
        if reason is not None:
            if reason:
                skipped[relation.name] = reason
        elif relation.kind == "S":
            sequences.append(relation)
        else:
            if relation.kind == "r":
                relations.append(relation)
            if relation.root is None:
                roots.append(relation)
    return Plan(tuple(relations), tuple(roots), tuple(sequences), skipped)


def _skip_reason(relation: _Relation, *, standby: bool) -> str | None:
    """Why a relation isn't content; None when it is, "" when that goes without saying."""
    if relation.owned_by_extension and relation.condition is None:
        return ""  # comes with CREATE EXTENSION
    if relation.kind == "f":
        return "foreign: its rows live in another server"
    if relation.kind == "m":
        return "materialised view: refreshed on restore"
    if relation.persistence == "u" and standby and relation.kind != "S":
        return "unlogged: has no content on a standby"
    return None


def lock_tables(connection: Connection[Any], plan: Plan) -> None:
    """Hold ACCESS SHARE on every table, as pg_dump will: a rewrite or TRUNCATE in between would empty our snapshot.

    Waits no longer than the connection's lock_timeout. Raises psycopg.errors.LockNotAvailable.
    """
    for start in range(0, len(plan.relations), _LOCK_BATCH):
        names = [sql.Identifier(r.schema, r.table) for r in plan.relations[start : start + _LOCK_BATCH]]
        connection.execute(
            sql.SQL("LOCK TABLE {} IN ACCESS SHARE MODE").format(sql.SQL(", ").join(sql.SQL("ONLY ") + name for name in names))
        )


def fingerprint(
    connection: Connection[Any], plan: Plan, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> Fingerprint:
    """Digest the content. The connection is pinned and in a REPEATABLE READ transaction.

    Each table is read inside a savepoint that is rolled back, which gives back the index locks that
    planning takes: a database of thousands of tables mustn't fill the server's lock table.
    """
    columns = _columns(connection, plan)
    digests: dict[int, Digest] = {relation.oid: EMPTY for relation in plan.roots}
    for number, relation in enumerate(plan.relations):
        progress(number, len(plan.relations))
        root = relation.root if relation.root is not None else relation.oid
        names = [name for name, _, generated in columns.get(root, ()) if not generated]
        digests[root] = digests.get(root, EMPTY) + _released(connection, _row_digest_query(relation, names))
    progress(len(plan.relations), len(plan.relations))
    row = connection.execute(
        "SELECT current_database(), current_setting('server_version_num')::int, current_setting('server_encoding')"
    ).fetchall()[0]
    return Fingerprint(
        database=row[0],
        server_major=major_of(row[1]),
        encoding=row[2],
        collations=_collations(connection, major_of(row[1])),
        tables={
            root.name: TableContent(
                tuple((name, kind) for name, kind, generated in columns.get(root.oid, ()) if not generated), digests[root.oid]
            )
            for root in plan.roots
        },
        sequences=_sequences(connection, plan.sequences),
        large_objects=_released(
            connection,
            sql.SQL(_LARGE_OBJECTS_SQL).format(
                a=sql.Literal(_SEED_A), b=sql.Literal(_SEED_B), chunk=sql.Literal(_LARGE_OBJECT_CHUNK_BYTES)
            ),
        ),
        inventory=_name_digests(connection, _INVENTORY_SQL),
        skipped=plan.skipped,
    )


def globals_inventory(connection: Connection[Any]) -> dict[str, Digest]:
    """Digests of the cluster's roles, memberships and role settings (no passwords)."""
    return _name_digests(connection, _GLOBALS_SQL)


def _columns(connection: Connection[Any], plan: Plan) -> dict[int, list[tuple[str, str, bool]]]:
    columns: dict[int, list[tuple[str, str, bool]]] = {}
    for oid, name, kind, generated in connection.execute(_COLUMNS_SQL, [[root.oid for root in plan.roots]]):
        columns.setdefault(oid, []).append((name, kind, generated))
    return columns


def _row_digest_query(relation: _Relation, columns: Sequence[str]) -> sql.Composed:
    # The inner OFFSET 0 keeps the planner from computing each row's text twice. The condition is the
    # extension's own text from the catalogue, the one that pg_dump uses.
    return sql.SQL(
        "SELECT count(*), sum(hashtextextended(t.r, {a})), sum(hashtextextended(t.r, {b})) "
        'FROM (SELECT ROW({columns})::text COLLATE "C" AS r FROM ONLY {table} {condition} OFFSET 0) t'
    ).format(
        a=sql.Literal(_SEED_A),
        b=sql.Literal(_SEED_B),
        columns=sql.SQL(", ").join(map(sql.Identifier, columns)),
        table=sql.Identifier(relation.schema, relation.table),
        condition=sql.SQL(relation.condition or ""),
    )


def _released(connection: Connection[Any], query: sql.Composed) -> Digest:
    """One digest, with the locks that its statement took given back."""
    connection.execute("SAVEPOINT digest")
    row = connection.execute(query).fetchall()[0]
    connection.execute("ROLLBACK TO SAVEPOINT digest")
    connection.execute("RELEASE SAVEPOINT digest")
    return Digest.of_sums(*row)


def _sequences(connection: Connection[Any], relations: Iterable[_Relation]) -> dict[str, SequenceState]:
    states: dict[str, SequenceState] = {}
    for relation in relations:
        query = sql.SQL(
            "SELECT q.last_value, q.is_called, s.seqincrement, s.seqcycle FROM {} q, pg_sequence s WHERE s.seqrelid = {}::oid"
        ).format(sql.Identifier(relation.schema, relation.table), sql.Literal(relation.oid))
        states[relation.name] = SequenceState(*connection.execute(query).fetchall()[0])
    return states


def _collations(connection: Connection[Any], major: int) -> dict[str, str]:
    versions = {"default": ""}
    if major >= 15:  # earlier majors don't track the database's own collation
        row = connection.execute(
            "SELECT coalesce(pg_database_collation_actual_version(oid), '') FROM pg_database WHERE datname = current_database()"
        ).fetchall()[0]
        versions["default"] = row[0]
    versions.update(connection.execute(_COLLATIONS_SQL).fetchall())
    return versions


def _name_digests(connection: Connection[Any], query: str) -> dict[str, Digest]:
    rows = connection.execute(
        sql.SQL(
            "SELECT kind, count(*), sum(hashtextextended(name, {a})), sum(hashtextextended(name, {b})) "
            'FROM (SELECT kind, name COLLATE "C" AS name FROM ({query}) objects(kind, name) OFFSET 0) t GROUP BY kind'
        ).format(a=sql.Literal(_SEED_A), b=sql.Literal(_SEED_B), query=sql.SQL(query))
    )
    return {kind: Digest.of_sums(count, a, b) for kind, count, a, b in rows}

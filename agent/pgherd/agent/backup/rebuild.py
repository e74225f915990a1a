"""Filling an empty server from a backup, and comparing what came out with what was recorded."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psycopg import Connection, sql

from pgherd.agent.backup.deadline import Deadline
from pgherd.agent.backup.dump import Progress
from pgherd.agent.backup.parts import plain_chunks
from pgherd.agent.backup.repository import Entry, NodeRepository
from pgherd.agent.backup.verify import Fingerprints, read_fingerprints
from pgherd.postgres.binaries import Binaries
from pgherd.postgres.connection import Target, connect
from pgherd.postgres.content import fingerprint, globals_inventory, plan_content
from pgherd.postgres.fingerprint import EMPTY, Fingerprint, differences, obstacles
from pgherd.postgres.scratch import ScratchServer
from pgherd.proto.errors import IntegrityError
from pgherd.runtime.process import clean_environment, running
from pgherd.runtime.process import run as run_child
from pgherd.storage.manifest import Manifest, Part

_WORKSHOP = "pgherd_restore"  # the database we stand in while postgres and template1 are replaced
_LAST_WORDS_TIMEOUT_S = 3600.0  # pg_restore builds indexes after the last byte; the deadline bounds it
_DIFFERENCES_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Rebuilding:
    """One backup, one empty server, and the programs: `client` reads the archive (its major or newer)."""

    repository: NodeRepository
    entry: Entry
    server: ScratchServer
    client: Binaries
    deadline: Deadline
    progress: Progress

    @property
    def manifest(self) -> Manifest:
        return self.entry.manifest

    def target(self, dbname: str = "postgres") -> Target:
        return Target(self.server.conninfo(dbname))


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far the rebuilt server was proven; `obstacles` say why contents couldn't be compared."""

    tables: int
    rows: int
    obstacles: tuple[str, ...]


# ---- filling ------------------------------------------------------------------------------------


def rebuild(work: Rebuilding) -> bool:
    """Roles, tablespaces (inside the data directory), every database. The first error ends it.

    Returns whether the original's bootstrap superuser may log in: here it may, until `leave_workshop`. Raises PreconditionError child.failed, IntegrityError backup.corrupt.
    """
    with connect(work.target()) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(_WORKSHOP)))
    with connect(work.target(_WORKSHOP)) as connection:
        # The backup brings its own postgres and template1, with their settings and contents.
        connection.execute("ALTER DATABASE template1 IS_TEMPLATE false")
        connection.execute("DROP DATABASE template1")
        connection.execute("DROP DATABASE postgres")
        _create_roles(work, connection)
        logs_in = bool(connection.execute("SELECT rolcanlogin FROM pg_roles WHERE oid = 10").fetchall()[0][0])
        if not logs_in:  # we have no other role to come back as
            connection.execute(_superuser(work, "LOGIN"))
        # Never the original locations: on the source host they hold live files.
        connection.execute("SET allow_in_place_tablespaces = on")
        for tablespace in work.manifest.tablespaces:
            connection.execute(
                sql.SQL("CREATE TABLESPACE {} OWNER {} LOCATION ''").format(
                    sql.Identifier(tablespace.name), sql.Identifier(tablespace.owner)
                )
            )
    for database in work.manifest.databases:
        argv: list[str | Path] = [work.client.program("pg_restore"), "--create", "--exit-on-error"]
        argv += ["-d", work.server.conninfo(_WORKSHOP)]
        _feed(work, work.manifest.part(database.part), argv)
    return logs_in


def leave_workshop(work: Rebuilding, logs_in: bool) -> None:
    """Drop our own database and leave the superuser as it was; call last."""
    names = [database.name for database in work.manifest.databases]
    if names:
        with connect(work.target("postgres" if "postgres" in names else names[0])) as connection:
            connection.execute(sql.SQL("DROP DATABASE {}").format(sql.Identifier(_WORKSHOP)))
            if not logs_in:
                connection.execute(_superuser(work, "NOLOGIN"))


def _superuser(work: Rebuilding, attribute: str) -> sql.Composed:
    return sql.SQL("ALTER ROLE {} {}").format(sql.Identifier(work.manifest.bootstrap_superuser), sql.SQL(attribute))


def _chunks(work: Rebuilding, part: Part) -> Iterator[bytes]:
    def passed(count: int) -> None:
        work.progress(f"restore {part.name}", count, part.stored_bytes, "bytes")

    return plain_chunks(work.repository.store, work.repository.prefix(work.manifest.name), part, passed)


def _create_roles(work: Rebuilding, connection: Connection[Any]) -> None:
    """Execute the roles part as SQL. Not through psql: a backslash command that somebody got into a role's
    name or comment would be executed by us, perhaps as root (CVE-2025-8714)."""
    text = b"".join(_chunks(work, work.manifest.part_of_role("roles")))  # roles are small: a hundred bytes each
    encoding, statements = roles_sql(text, work.manifest.bootstrap_superuser)
    connection.execute(sql.SQL("SET client_encoding TO {}").format(sql.Literal(encoding)))
    connection.execute(statements)
    connection.execute("SET client_encoding TO 'UTF8'")


def roles_sql(text: bytes, bootstrap_superuser: str) -> tuple[str, bytes]:
    """(client encoding, statements) of pg_dumpall's output: without psql's `\\restrict` around them, and without
    the one `CREATE ROLE` of the superuser that initdb made; its ALTER ROLE (attributes, password) stays."""
    restricted = re.match(rb"((?:--[^\n]*\n|\n)*)\\restrict ([A-Za-z0-9]+)\n", text)
    if restricted:
        text = restricted[1] + text[restricted.end() :].replace(b"\n\\unrestrict " + restricted[2] + b"\n", b"\n", 1)
    encoding = re.search(rb"^SET client_encoding = '(\w+)';$", text, re.MULTILINE)
    plain = re.escape(bootstrap_superuser.encode())
    quoted = re.escape(b'"' + bootstrap_superuser.replace('"', '""').encode() + b'"')
    created = re.compile(rb"^CREATE ROLE (?:" + plain + rb"|" + quoted + rb");\n", re.MULTILINE)
    return (encoding[1].decode() if encoding else "UTF8"), created.sub(b"", text, count=1)


def _feed(work: Rebuilding, part: Part, argv: Sequence[str | Path]) -> None:
    """Stream a part's plain bytes into a program and judge its end."""
    chunks = _chunks(work, part)
    with running(argv, env=clean_environment(), pipe_stdin=True) as child, work.deadline.over_child(child):
        damage: IntegrityError | None = None
        try:
            for chunk in chunks:
                child.stdin.write(chunk)
            child.stdin.close()
        except BrokenPipeError:
            # The program gave up: what it says is the cause, unless the archive itself is damaged.
            damage = _damage_in_rest(chunks)
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
        finished = child.wait(_LAST_WORDS_TIMEOUT_S)
        if damage is not None:
            raise damage
        finished.require_success(hint="its last lines are above; an extension or locale of the source may be missing here")


def _damage_in_rest(chunks: Iterator[bytes]) -> IntegrityError | None:
    try:
        for _ in chunks:
            pass
    except IntegrityError as error:
        return error
    return None


# ---- comparing ----------------------------------------------------------------------------------


def compare(work: Rebuilding, logs_in: bool) -> Comparison:
    """Fingerprint every rebuilt database and compare. `logs_in` is what `rebuild` said. Raises IntegrityError backup.content_differs."""
    recorded = read_fingerprints(work.repository, work.entry)
    found = {name: _fingerprint_of(work, name) for name in sorted(recorded.databases)}
    unlike = _unlike(work, recorded, found, logs_in)
    if unlike:
        more = f" (and {len(unlike) - _DIFFERENCES_SHOWN} more)" if len(unlike) > _DIFFERENCES_SHOWN else ""
        raise IntegrityError(
            "backup.content_differs",
            "; ".join(unlike[:_DIFFERENCES_SHOWN]) + more,
            hint="don't rely on this backup: take a new one, and look at what differs",
            differences=len(unlike),
        )
    reasons = [
        f"database {name}: {reason}" for name, print_ in recorded.databases.items() for reason in obstacles(print_, found[name])
    ]
    return Comparison(
        tables=sum(len(print_.tables) for print_ in recorded.databases.values()),
        rows=sum(print_.rows for print_ in recorded.databases.values()),
        obstacles=tuple(reasons),
    )


def _fingerprint_of(work: Rebuilding, dbname: str) -> Fingerprint:
    with connect(work.target(dbname)) as connection, work.deadline.over_connection(connection):
        connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")

        def read(done: int, total: int) -> None:
            work.progress(f"compare {dbname}", done, total, "tables")

        return fingerprint(connection, plan_content(connection), progress=read)


def _unlike(work: Rebuilding, recorded: Fingerprints, found: dict[str, Fingerprint], logs_in: bool) -> list[str]:
    unlike = [
        f"database {name}: {difference}"
        for name, print_ in recorded.databases.items()
        if not obstacles(print_, found[name])
        for difference in differences(print_, found[name])
    ]
    with connect(work.target(_WORKSHOP)) as connection:
        connection.execute("BEGIN")  # rolled back with the connection
        if not logs_in:
            connection.execute(_superuser(work, "NOLOGIN"))
        roles = globals_inventory(connection)
        names = {
            row[0]
            for row in connection.execute("SELECT datname FROM pg_database WHERE datname NOT IN ('template0', %s)", [_WORKSHOP])
        }
    unlike += [
        f"{kind} differ ({roles.get(kind, EMPTY).rows} instead of {recorded.globals.get(kind, EMPTY).rows})"
        for kind in sorted(roles.keys() | recorded.globals.keys())
        if roles.get(kind, EMPTY) != recorded.globals.get(kind, EMPTY)
    ]
    unlike += [f"database {name} is missing" for name in sorted(set(recorded.databases) - names)]
    unlike += [f"database {name} wasn't in the original" for name in sorted(names - set(recorded.databases))]
    return unlike


def amcheck(work: Rebuilding) -> bool:
    """Whether pg_amcheck could look at every relation, and found no damage.

    False when the program or the extension isn't there. Raises IntegrityError backup.corrupt.
    """
    if not work.client.has("pg_amcheck"):
        return False
    argv: list[str | Path] = [
        work.client.program("pg_amcheck"),
        "-d",
        work.server.conninfo(_WORKSHOP),
        "--all",
        "--install-missing",
    ]
    with connect(work.target(_WORKSHOP)) as connection:
        if not connection.execute("SELECT 1 FROM pg_available_extensions WHERE name = 'amcheck'").fetchall():
            return False
    finished = run_child(argv, timeout_s=_LAST_WORDS_TIMEOUT_S)
    if finished.status == 2 or (finished.status == 0 and finished.stdout):
        first = finished.stdout.decode("utf-8", "replace").splitlines()[0]
        raise IntegrityError("backup.corrupt", f"pg_amcheck found damage in the restored server: {first}")
    finished.require_success()
    return True

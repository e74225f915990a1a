"""One database into one part: fingerprint and pg_dump under the same exported snapshot."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psycopg import Connection

from pgherd.agent.backup.deadline import Deadline
from pgherd.agent.backup.parts import SUFFIXES, PartWriter
from pgherd.agent.backup.source import DatabaseFacts, extensions, invalid_indexes
from pgherd.agent.backup.watch import SnapshotWatch, watching
from pgherd.postgres.binaries import Binaries
from pgherd.postgres.connection import Target, connect
from pgherd.postgres.content import fingerprint, lock_tables, plan_content
from pgherd.postgres.fingerprint import Fingerprint
from pgherd.runtime.process import clean_environment, running
from pgherd.storage.manifest import Database, Part
from pgherd.storage.objects.port import CHUNK_BYTES, ObjectStore

_LAST_WORDS_TIMEOUT_S = 60.0
_SERVER_LOOK_INTERVAL_S = 2.0

# What every connection to a database gets after an upgrade of libc or ICU. It is about the server, and no
# row is missing for it: without this, no backup of such a server would ever count as complete. Any other
# line is a warning, also those of the server (zero_damaged_pages says so when it throws pages away).
_HARMLESS_RE = re.compile(
    r'WARNING:  database ".*" has a collation version mismatch'
    r"|DETAIL:  The database was created using collation version .* but the operating system provides version .*"
    r"|HINT:  Rebuild all objects in this database that use the default collation and run ALTER DATABASE .* REFRESH COLLATION VERSION.*"
)
_PLAIN_NAME_RE = re.compile(r"[A-Za-z0-9_.-]{1,60}")

Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True, slots=True)
class Writing:
    """Where parts go and how: fixed for one backup."""

    store: ObjectStore
    prefix: str
    compression: str
    level: int
    target: Target
    binaries: Binaries
    lock_wait_timeout_s: float
    give_way_after_s: float
    deadline: Deadline
    progress: Progress


@dataclass(frozen=True, slots=True)
class Dumped:
    """What became of one database."""

    database: Database
    part: Part
    fingerprint: Fingerprint
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


def stream_program(
    writing: Writing,
    argv: Sequence[str | Path],
    name: str,
    role: str,
    *,
    each_chunk: Callable[[int], None] = lambda count: None,
    appendix: bytes = b"",
) -> tuple[Part, tuple[str, ...]]:
    """Run a program and store its output, then `appendix`, as a part; (part, warnings on stderr).

    The part becomes visible only if the program exited with 0. Raises PreconditionError child.failed,
    TransientError disk.full | disk.io | child.timeout.
    """
    stored = stored_name(writing, name)
    environment = clean_environment(writing.target.environment())
    with writing.store.create(writing.prefix + stored) as writer:
        sink = PartWriter(writer, writing.compression, writing.level)
        with running(argv, env=environment, capture_stdout=True) as child, writing.deadline.over_child(child):
            while chunk := child.stdout.read1(CHUNK_BYTES):  # type: ignore[attr-defined]  # a BufferedReader
                sink.write(chunk)
                each_chunk(sink.plain_bytes)
            finished = child.wait(_LAST_WORDS_TIMEOUT_S).require_success(
                hint="read its last lines above; `pgherd-agent check` tells which grants are missing"
            )
        sink.write(appendix)
        part = sink.finish(stored, role)
    return part, judged_lines(finished.stderr_lines)


def judged_lines(stderr_lines: Sequence[str]) -> tuple[str, ...]:
    """Those lines of a dump program that make a backup incomplete."""
    return tuple(line for line in stderr_lines if _HARMLESS_RE.fullmatch(line) is None)


def stored_name(writing: Writing, name: str) -> str:
    """The object's name: stock tools go by its suffix."""
    return name + SUFFIXES[writing.compression]


def part_name(facts: DatabaseFacts, number: int) -> str:
    """A file name that a person recognises; any database name is possible, so the manifest has the mapping."""
    readable = f"-{facts.name}" if _PLAIN_NAME_RE.fullmatch(facts.name) else ""
    return f"db-{number:03d}{readable}.dump"


def dump_database(writing: Writing, facts: DatabaseFacts, number: int) -> Dumped:
    """Fingerprint, then dump, one database under one snapshot.

    Our connection exports the snapshot and locks the tables as pg_dump does (ACCESS SHARE, bounded
    wait), so that a TRUNCATE or rewrite between fingerprint and dump can't make them differ.
    """
    with (
        connect(writing.target, facts.name, lock_timeout_s=writing.lock_wait_timeout_s) as connection,
        writing.deadline.over_connection(connection),
    ):
        connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        snapshot, lsn, pid = connection.execute(
            "SELECT pg_export_snapshot(), (CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() "
            "ELSE pg_current_wal_insert_lsn() END)::text, pg_backend_pid()"
        ).fetchall()[0]
        plan = plan_content(connection)
        lock_tables(connection, plan)

        def read(done: int, total: int) -> None:
            writing.progress(f"fingerprint {facts.name}", done, total, "tables")

        def dumped(count: int) -> None:
            writing.progress(f"dump {facts.name}", count, 0, "bytes")

        argv: list[str | Path] = [writing.binaries.program("pg_dump"), "-d", writing.target.of_database(facts.name)]
        argv += ["--format=custom", "--compress=0", f"--snapshot={snapshot}"]
        argv += [f"--lock-wait-timeout={int(writing.lock_wait_timeout_s * 1000)}"]
        with (
            SnapshotWatch(writing.target, facts.name, pid, writing.give_way_after_s, writing.deadline) as watch,
            watching(writing.deadline, watch.look, interval_s=_SERVER_LOOK_INTERVAL_S),
        ):
            print_ = fingerprint(connection, plan, progress=read)
            part, warnings = stream_program(writing, argv, part_name(facts, number), "database", each_chunk=dumped)
            _require_alive(connection)
        return Dumped(
            database=Database(
                name=facts.name,
                part=part.name,
                owner=facts.owner,
                encoding=facts.encoding,
                locale_provider=facts.locale_provider,
                lc_collate=facts.lc_collate,
                lc_ctype=facts.lc_ctype,
                locale=facts.locale,
                collation_version=facts.collation_version,
                snapshot_lsn=lsn,
                extensions=extensions(connection),
                tables=len(print_.tables),
                rows=print_.rows,
            ),
            part=part,
            fingerprint=print_,
            warnings=tuple(f"database {facts.name}: {warning}" for warning in warnings),
            notes=tuple(
                f"database {facts.name}: index {name} is INVALID and not in the backup" for name in invalid_indexes(connection)
            ),
        )


def _require_alive(connection: Connection[Any]) -> None:
    """The transaction that held the snapshot and the locks must have lasted to the end."""
    connection.execute("SELECT 1")

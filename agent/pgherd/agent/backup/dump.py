"""One database into one part: fingerprint and pg_dump under the same exported snapshot."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psycopg import Connection

from pgherd.agent.backup.deadline import Deadline
from pgherd.agent.backup.parts import SUFFIXES, PartWriter
from pgherd.agent.backup.source import DatabaseFacts, extensions, invalid_indexes
from pgherd.postgres.binaries import Binaries
from pgherd.postgres.connection import Target, connect
from pgherd.postgres.content import fingerprint, lock_tables, plan_content
from pgherd.postgres.fingerprint import Fingerprint
from pgherd.proto.errors import PgherdError, PreconditionError
from pgherd.runtime.process import clean_environment, running
from pgherd.storage.manifest import Database, Part
from pgherd.storage.objects.port import CHUNK_BYTES, ObjectStore

XMIN_AGE_MAX = 100_000_000  # half of autovacuum_freeze_max_age: our snapshot never forces a freeze
_XMIN_CHECK_INTERVAL_S = 30.0
_LAST_WORDS_TIMEOUT_S = 60.0
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
) -> tuple[Part, tuple[str, ...]]:
    """Run a program and store its output as a part; (part, warnings on stderr).

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
        part = sink.finish(stored, role)
    return part, tuple(f"{finished.program}: {line}" for line in finished.stderr_lines)


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
        guard = _SnapshotGuard(writing.target, facts.name, pid)

        def read(done: int, total: int) -> None:
            guard.check()
            writing.progress(f"fingerprint {facts.name}", done, total, "tables")

        print_ = fingerprint(connection, plan, progress=read)

        def dumped(count: int) -> None:
            guard.check()
            writing.progress(f"dump {facts.name}", count, 0, "bytes")

        argv: list[str | Path] = [writing.binaries.program("pg_dump"), "-d", writing.target.of_database(facts.name)]
        argv += ["--format=custom", "--compress=0", f"--snapshot={snapshot}"]
        argv += [f"--lock-wait-timeout={int(writing.lock_wait_timeout_s * 1000)}"]
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


class _SnapshotGuard:
    """Ends a dump whose snapshot holds back vacuum too far (promise 1: never cause the outage)."""

    def __init__(self, target: Target, dbname: str, pid: int) -> None:
        self._target, self._dbname, self._pid = target, dbname, pid
        self._next_mono_s = time.monotonic() + _XMIN_CHECK_INTERVAL_S

    def check(self) -> None:
        """Every half minute, from a connection of its own: age() stands still within our transaction."""
        if time.monotonic() < self._next_mono_s:
            return
        self._next_mono_s = time.monotonic() + _XMIN_CHECK_INTERVAL_S
        try:
            with connect(self._target, self._dbname) as connection:
                row = connection.execute(
                    "SELECT age(backend_xmin) FROM pg_stat_activity WHERE pid = %s", [self._pid]
                ).fetchone()
        except PgherdError:
            return  # no slot for a look: the deadline still bounds us
        require_young(row[0] if row else None)


def require_young(xmin_age: int | None, xmin_age_max: int = XMIN_AGE_MAX) -> None:
    """Raises PreconditionError postgres.failed when a snapshot of that age must end."""
    if xmin_age is not None and xmin_age > xmin_age_max:
        raise PreconditionError(
            "postgres.failed",
            f"the backup's snapshot is {xmin_age} transactions old and holds back vacuum",
            hint="back up at a quieter time or from a standby; nothing was published",
            xmin_age=xmin_age,
        )

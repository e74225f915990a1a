"""Taking a backup: every database, roles and tablespaces, fingerprints, the manifest last.

Whatever fails before the manifest leaves no backup: what was written is removed, or swept by the next
run when this process was killed. pg_dump omits some things with exit status 0 and a warning; any
warning therefore makes the backup incomplete, which is published, named so, and never proven.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from pgherd.agent.backup.deadline import Deadline
from pgherd.agent.backup.dump import Dumped, Progress, Writing, dump_database, part_name, stored_name, stream_program
from pgherd.agent.backup.parts import PartWriter
from pgherd.agent.backup.repository import NodeRepository
from pgherd.agent.backup.source import DatabaseFacts, ServerFacts, server_facts, settings_of_all_roles
from pgherd.agent.backup.watch import require_free, watching
from pgherd.postgres.binaries import Binaries, client_for
from pgherd.postgres.connection import Target, connect
from pgherd.postgres.content import globals_inventory
from pgherd.postgres.fingerprint import Digest
from pgherd.proto.clock import Clock
from pgherd.proto.errors import IntegrityError, PgherdError, TransientError
from pgherd.runtime.logging import get_logger
from pgherd.runtime.process import run
from pgherd.storage.manifest import MANIFEST_NAME, Manifest, Part, backup_name
from pgherd.storage.objects.port import create_bytes

FINGERPRINT_FORMAT = "pgherd.fingerprints"
FINGERPRINT_NAME = "fingerprint.json"
_TOOLS = ("pg_dump", "pg_dumpall")
_ROLE_ATTEMPTS = 3
_HEADROOM = 1.2  # a backup is expected to need at most so many times its predecessor's bytes

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class TakeSettings:
    """How one node is backed up."""

    target: Target
    cluster: str
    node: str
    node_id: str
    bin_directory: Path | None
    compression: str
    level: int
    timeout_s: float
    lock_wait_timeout_s: float
    give_way_after_s: float
    free_min_bytes: int
    role_passwords: bool = True  # False: the owner accepts backups without role passwords


def take(repository: NodeRepository, settings: TakeSettings, clock: Clock, progress: Progress) -> Manifest:
    """Take and publish one backup; hold `repository.writing()`.

    Raises postgres.* and child.* errors, TransientError disk.full | disk.io, IntegrityError
    backup.repository_foreign | format.*. Then nothing was published.
    """
    for leftover in repository.sweep():
        _log.warning("backup.leftover_swept", backup=leftover, node=settings.node)
    started_unix_ns = clock.wall_unix_ns()
    facts = server_facts(settings.target)
    ordinal = _next_ordinal(repository, facts, settings.free_min_bytes)
    name = backup_name(started_unix_ns, secrets.token_hex(2))
    binaries = client_for(facts.major, settings.bin_directory)
    try:
        with (
            Deadline(settings.timeout_s, "the backup") as deadline,
            watching(deadline, lambda: require_free(repository.directory, settings.free_min_bytes)),
        ):
            writing = Writing(
                store=repository.store,
                prefix=repository.prefix(name),
                compression=settings.compression,
                level=settings.level,
                target=settings.target,
                binaries=binaries,
                lock_wait_timeout_s=settings.lock_wait_timeout_s,
                give_way_after_s=settings.give_way_after_s,
                deadline=deadline,
                progress=progress,
            )
            outcome = _write_parts(writing, facts, settings)
        manifest = _manifest(name, ordinal, settings, facts, binaries, outcome, started_unix_ns, clock.wall_unix_ns())
        create_bytes(repository.store, repository.prefix(name) + MANIFEST_NAME, manifest.serialise())
    except BaseException:
        with contextlib.suppress(PgherdError, OSError):  # the next run sweeps what can't be removed now
            repository.delete(name)
        raise
    _log.info(
        "backup.published", backup=name, node=settings.node, complete=manifest.complete, stored_bytes=manifest.stored_bytes
    )
    return manifest


def _next_ordinal(repository: NodeRepository, facts: ServerFacts, free_min_bytes: int) -> int:
    """One more than any backup here; refuses a repository of another cluster and a disk that won't do."""
    entries = repository.readable()
    newest = max(entries, key=lambda entry: entry.manifest.ordinal, default=None)
    if newest is None:
        return 1
    if newest.manifest.system_identifier != facts.system_identifier:
        raise IntegrityError(
            "backup.repository_foreign",
            f"the repository holds backups of system {newest.manifest.system_identifier}, the server is {facts.system_identifier}",
            hint="was the cluster re-created or upgraded? give it a new cluster alias, or move the old backups away",
        )
    require_free(repository.directory, free_min_bytes, int(newest.manifest.stored_bytes * _HEADROOM))
    return newest.manifest.ordinal + 1


@dataclass(frozen=True, slots=True)
class _Outcome:
    dumped: tuple[Dumped, ...]
    parts: tuple[Part, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    left_out: Mapping[str, str]
    role_passwords: bool


def _write_parts(writing: Writing, facts: ServerFacts, settings: TakeSettings) -> _Outcome:
    warnings = [f"database {name} isn't in the backup: it {reason}" for name, reason in facts.left_out.items()]
    roles, role_digests, warned = _dump_roles(writing, facts)
    warnings += warned
    tablespaces, warned = _dump_globals(writing, "tablespaces", ["--tablespaces-only"])
    warnings += warned
    parts = [roles, tablespaces]
    notes: list[str] = []
    if not facts.may_read_role_passwords:
        text = "role passwords aren't in the backup: the backup role may not read pg_authid"
        (warnings if settings.role_passwords else notes).append(text)
    dumped, left_out = _dump_databases(writing, facts)
    notes += [f"database {name} was dropped while the backup ran" for name in left_out]
    notes += [
        f"database {name} was created while the backup ran and isn't in it" for name in _created_since(settings.target, facts)
    ]
    for one in dumped:
        parts.append(one.part)
        warnings += one.warnings
        notes += one.notes
    parts.append(_write_fingerprint(writing, role_digests, dumped))
    return _Outcome(
        tuple(dumped),
        tuple(parts),
        tuple(warnings),
        tuple(notes),
        {**facts.left_out, **left_out},
        facts.may_read_role_passwords,
    )


def _dump_roles(writing: Writing, facts: ServerFacts) -> tuple[Part, Mapping[str, Digest], tuple[str, ...]]:
    """Roles and their digests. pg_dumpall takes no snapshot of ours: it is repeated until the digests before and after agree."""
    arguments = ["--roles-only", *([] if facts.may_read_role_passwords else ["--no-role-passwords"])]
    before, of_all = _role_digests(writing)
    for _ in range(_ROLE_ATTEMPTS):
        part, warnings = _dump_globals(writing, "roles", arguments, of_all)
        after, of_all = _role_digests(writing)
        if after == before:
            return part, after, warnings
        writing.store.delete(writing.prefix + part.name)
        before = after
    raise TransientError(
        "postgres.timeout", "roles kept changing while they were dumped", hint="try again when role changes are over"
    )


def _role_digests(writing: Writing) -> tuple[Mapping[str, Digest], bytes]:
    """Digests, and the settings that pg_dumpall forgets."""
    with connect(writing.target) as connection, writing.deadline.over_connection(connection):
        return globals_inventory(connection), settings_of_all_roles(connection)


def _dump_globals(writing: Writing, role: str, arguments: Sequence[str], appendix: bytes = b"") -> tuple[Part, tuple[str, ...]]:
    database = writing.target.default_database
    argv: list[str | Path] = [
        writing.binaries.program("pg_dumpall"),
        "-d",
        writing.target.of_database(database),
        "-l",
        database,
    ]
    return stream_program(writing, [*argv, *arguments], f"{role}.sql", role, appendix=appendix)


def _dump_databases(writing: Writing, facts: ServerFacts) -> tuple[list[Dumped], dict[str, str]]:
    dumped: list[Dumped] = []
    dropped: dict[str, str] = {}
    for number, database in enumerate(facts.databases, start=1):
        try:
            dumped.append(dump_database(writing, database, number))
        except PgherdError:
            if writing.deadline.expired or _still_there(writing.target, database):
                raise
            dropped[database.name] = "dropped while the backup ran"
            writing.store.delete(writing.prefix + stored_name(writing, part_name(database, number)))
    return dumped, dropped


def _still_there(target: Target, database: DatabaseFacts) -> bool:
    facts = server_facts(target)
    return database.name in facts.left_out or any(other.name == database.name for other in facts.databases)


def _created_since(target: Target, before: ServerFacts) -> list[str]:
    known = {database.name for database in before.databases}
    return [database.name for database in server_facts(target).databases if database.name not in known]


def _write_fingerprint(writing: Writing, globals_: Mapping[str, Digest], dumped: Sequence[Dumped]) -> Part:
    """Uncompressed: people look into it."""
    document = {
        "format": FINGERPRINT_FORMAT,
        "version": 1,
        "globals": {kind: digest.to_json() for kind, digest in globals_.items()},
        "databases": [one.fingerprint.to_json() for one in dumped],
    }
    with writing.store.create(writing.prefix + FINGERPRINT_NAME) as writer:
        sink = PartWriter(writer, "none", 0)
        sink.write((json.dumps(document, indent=1, sort_keys=True) + "\n").encode())
        return sink.finish(FINGERPRINT_NAME, "fingerprint")


def _manifest(
    name: str,
    ordinal: int,
    settings: TakeSettings,
    facts: ServerFacts,
    binaries: Binaries,
    outcome: _Outcome,
    started_unix_ns: int,
    finished_unix_ns: int,
) -> Manifest:
    return Manifest(
        name=name,
        ordinal=ordinal,
        cluster=settings.cluster,
        node=settings.node,
        node_id=settings.node_id,
        system_identifier=facts.system_identifier,
        server_version_num=facts.version_num,
        server_version=facts.version,
        from_standby=facts.is_standby,
        bootstrap_superuser=facts.bootstrap_superuser,
        started_unix_ns=started_unix_ns,
        finished_unix_ns=finished_unix_ns,
        pgherd_version=version("pgherd"),
        tools={tool: _version_line(binaries, tool) for tool in _TOOLS},
        tools_major=binaries.major,
        complete=not outcome.warnings,
        warnings=outcome.warnings,
        notes=outcome.notes,
        role_passwords=outcome.role_passwords,
        data_checksums=facts.data_checksums,
        databases=tuple(one.database for one in outcome.dumped),
        databases_left_out=outcome.left_out,
        tablespaces=facts.tablespaces,
        parts=outcome.parts,
    )


def _version_line(binaries: Binaries, tool: str) -> str:
    return run([binaries.program(tool), "--version"], timeout_s=10.0).stdout.decode("utf-8", "replace").strip()

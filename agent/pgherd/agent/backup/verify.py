"""Reading a backup back: every stored byte, decompressed, against both SHA-256s.

`pg_restore -l` would prove nothing: an archive that lost its last tenth still lists with status 0.
The verdict, good or bad, becomes a proof beside the manifest, and so part of the backup's grade.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from pgherd.agent.backup.dump import Progress
from pgherd.agent.backup.parts import plain_chunks
from pgherd.agent.backup.repository import Entry, NodeRepository
from pgherd.agent.backup.take import FINGERPRINT_FORMAT
from pgherd.postgres.fingerprint import Digest, Fingerprint
from pgherd.proto.clock import Clock
from pgherd.proto.errors import IntegrityError
from pgherd.storage.manifest import Proof


@dataclass(frozen=True, slots=True)
class Verified:
    """`grade` is the backup's grade now, `read_bytes` the stored bytes that were read."""

    backup: str
    grade: str
    read_bytes: int
    duration_s: float


def verify(repository: NodeRepository, name: str, clock: Clock, progress: Progress) -> Verified:
    """Read a backup (empty name: the newest) back and publish the verdict.

    Raises IntegrityError backup.corrupt | format.* (after publishing the failed proof for a readable
    manifest), PreconditionError backup.not_found | state.locked.
    """
    entry = repository.entry(name)
    started_mono_s = clock.mono_s()
    with repository.reading(entry.manifest.name):
        entry = repository.entry(entry.manifest.name)  # retention may have been faster
        try:
            read_bytes = read_back(repository, entry, progress)
        except IntegrityError as error:
            record_failure(repository, entry, error, clock, started_mono_s)
            raise
        duration_s = clock.mono_s() - started_mono_s
        repository.add_proof(
            Proof(
                backup=entry.manifest.name,
                manifest_sha256=entry.sha256,
                grade="read back",
                finished_unix_ns=clock.wall_unix_ns(),
                duration_s=duration_s,
                read_bytes=read_bytes,
            )
        )
    return Verified(entry.manifest.name, repository.entry(entry.manifest.name).grade, read_bytes, duration_s)


def read_back(repository: NodeRepository, entry: Entry, progress: Progress) -> int:
    """Read all parts and the fingerprint's structure; stored bytes read. Raises IntegrityError."""
    total, done = entry.manifest.stored_bytes, 0
    prefix = repository.prefix(entry.manifest.name)

    def passed(count: int) -> None:
        progress("verify", done + count, total, "bytes")

    for part in entry.manifest.parts:
        for _ in plain_chunks(repository.store, prefix, part, passed):
            pass
        done += part.stored_bytes
    read_fingerprints(repository, entry)
    return done


def record_failure(
    repository: NodeRepository, entry: Entry, error: IntegrityError, clock: Clock, started_mono_s: float
) -> None:
    """Publish the verdict of a verification that found damage. A newer format is no damage."""
    if error.code == "format.newer":
        return
    repository.add_proof(
        Proof(
            backup=entry.manifest.name,
            manifest_sha256=entry.sha256,
            grade="unproven",
            finished_unix_ns=clock.wall_unix_ns(),
            duration_s=clock.mono_s() - started_mono_s,
            read_bytes=0,
            error=error.code,
            detail=error.message,
        )
    )


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """fingerprint.json: digests of the cluster's roles, and one fingerprint per database."""

    globals: dict[str, Digest]
    databases: dict[str, Fingerprint]


def read_fingerprints(repository: NodeRepository, entry: Entry) -> Fingerprints:
    """Read, check and parse the fingerprint part. Raises IntegrityError backup.corrupt | format.*."""
    part = entry.manifest.part_of_role("fingerprint")
    content = b"".join(plain_chunks(repository.store, repository.prefix(entry.manifest.name), part))
    try:
        document = json.loads(content)
        if document["format"] != FINGERPRINT_FORMAT:
            raise ValueError(f"format {document['format']}")
        if document["version"] > 1:
            raise IntegrityError(
                "format.newer",
                f"{part.name} has version {document['version']}; this pgherd reads up to 1",
                hint="use a newer pgherd",
            )
        databases = [Fingerprint.from_json(data) for data in document["databases"]]
        globals_ = {str(kind): Digest.from_json(digest) for kind, digest in document["globals"].items()}
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError("format.corrupt", f"{part.name} isn't a fingerprint document: {error}", path=part.name) from error
    return Fingerprints(globals_, {one.database: one for one in databases})

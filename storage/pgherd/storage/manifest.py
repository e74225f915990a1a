"""Backups as documents: manifest and proofs, format v1 (docs/formats/backup-v1.md). Pure.

Properties:
 1. A backup exists when its manifest does; the manifest is written last and never again.
 2. Every document carries a SHA-256 over its other members: a changed byte is refused, not believed.
 3. A document of a newer version is refused by name, never guessed at.
 4. The grade of a backup follows from its proofs alone: the best one since the last that failed. An
    incomplete backup, or one never proven, is "unproven".
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pgherd.proto.commands import GRADES
from pgherd.proto.errors import IntegrityError

MANIFEST_FORMAT = "pgherd.backup"
PROOF_FORMAT = "pgherd.proof"
VERSION = 1
MANIFEST_NAME = "manifest.json"
_PROOF_NAME_RE = re.compile(r"proof-(\d{4,})\.json")
_NAME_RE = re.compile(r"\d{8}T\d{6}\.\d{3}Z-[0-9a-f]{4}")


# ---- sealed documents ---------------------------------------------------------------------------


def seal(format_name: str, body: Mapping[str, Any]) -> bytes:
    """A JSON document with `format`, `version` and `sha256` (over the compact, sorted rest)."""
    document = {"format": format_name, "version": VERSION, **body}
    return (json.dumps({**document, "sha256": _checksum(document)}, indent=2, sort_keys=True) + "\n").encode()


def unseal(format_name: str, content: bytes, where: str) -> dict[str, Any]:
    """Inverse of `seal`. Raises IntegrityError format.corrupt | format.newer, naming `where`."""
    try:
        document = json.loads(content)
    except ValueError as error:
        raise _corrupt(where, "isn't JSON") from error
    if not isinstance(document, dict) or document.get("format") != format_name or not isinstance(document.get("version"), int):
        raise _corrupt(where, f"isn't a {format_name} document")
    if document["version"] > VERSION:
        raise IntegrityError(
            "format.newer",
            f"{where} has format version {document['version']}; this pgherd reads up to {VERSION}",
            hint="run the pgherd version that wrote it, or a newer one",
            version=document["version"],
            newest_version=VERSION,
        )
    checksum = document.pop("sha256", None)
    if checksum != _checksum(document):
        raise _corrupt(where, "doesn't match its own checksum")
    return document


def _checksum(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _corrupt(where: str, how: str) -> IntegrityError:
    return IntegrityError(
        "format.corrupt", f"{where} {how}", hint="restore another backup; keep this one to look at", path=where
    )


# ---- the manifest -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part:
    """One object of a backup. `plain_*` describe the bytes before compression."""

    name: str  # key below the backup's own prefix
    role: str  # "database" | "roles" | "tablespaces" | "fingerprint"
    compression: str  # "zstd" | "gzip" | "none"
    stored_bytes: int
    stored_sha256: str
    plain_bytes: int
    plain_sha256: str


@dataclass(frozen=True, slots=True)
class Extension:
    name: str
    version: str


@dataclass(frozen=True, slots=True)
class Database:
    """One dumped database. `snapshot_lsn` is where WAL stood when its snapshot was taken, for people only:
    no LSN corresponds exactly to a snapshot."""

    name: str
    part: str
    owner: str
    encoding: str
    locale_provider: str  # "c" libc, "i" ICU, "b" builtin
    lc_collate: str
    lc_ctype: str
    locale: str  # of ICU and builtin providers, else ""
    collation_version: str  # actual version of the provider, "" where it has none
    snapshot_lsn: str
    extensions: tuple[Extension, ...]
    tables: int
    rows: int


@dataclass(frozen=True, slots=True)
class Tablespace:
    name: str
    owner: str
    location: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything about one backup. `ordinal` counts up within a repository: order without a clock."""

    name: str
    ordinal: int
    cluster: str
    node: str
    node_id: str
    system_identifier: str
    server_version_num: int
    server_version: str
    from_standby: bool
    bootstrap_superuser: str
    started_unix_ns: int
    finished_unix_ns: int
    pgherd_version: str
    tools: Mapping[str, str]  # program → version line
    tools_major: int  # an archive is read by this major's pg_restore or a newer one
    complete: bool
    warnings: tuple[str, ...]
    notes: tuple[str, ...]  # facts a reader should know that don't make it incomplete
    role_passwords: bool
    data_checksums: bool
    databases: tuple[Database, ...]
    databases_left_out: Mapping[str, str]  # name → reason
    tablespaces: tuple[Tablespace, ...]
    parts: tuple[Part, ...]

    @property
    def stored_bytes(self) -> int:
        return sum(part.stored_bytes for part in self.parts)

    @property
    def server_major(self) -> int:
        return self.server_version_num // 10000

    def part(self, name: str) -> Part:
        """The part called `name`. Raises IntegrityError format.corrupt."""
        for part in self.parts:
            if part.name == name:
                return part
        raise _corrupt(self.name, f"names no part {name}")

    def part_of_role(self, role: str) -> Part:
        for part in self.parts:
            if part.role == role:
                return part
        raise _corrupt(self.name, f"has no part with role {role}")

    def serialise(self) -> bytes:
        return seal(MANIFEST_FORMAT, dataclasses.asdict(self))


def parse_manifest(content: bytes, where: str) -> Manifest:
    """Raises IntegrityError format.corrupt | format.newer."""
    document = unseal(MANIFEST_FORMAT, content, where)
    try:
        return Manifest(
            **{
                **{field.name: document[field.name] for field in dataclasses.fields(Manifest)},
                "warnings": tuple(document["warnings"]),
                "notes": tuple(document["notes"]),
                "databases": tuple(
                    Database(**{**database, "extensions": tuple(Extension(**e) for e in database["extensions"])})
                    for database in document["databases"]
                ),
                "tablespaces": tuple(Tablespace(**tablespace) for tablespace in document["tablespaces"]),
                "parts": tuple(Part(**part) for part in document["parts"]),
            }
        )
    except (KeyError, TypeError) as error:
        raise _corrupt(where, f"lacks members of a manifest ({error})") from error


def manifest_sha256(content: bytes) -> str:
    """What a proof says it is about: the manifest's bytes as stored."""
    return hashlib.sha256(content).hexdigest()


# ---- proofs and grades --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Proof:
    """The verdict of one verification: the grade it reached, or why it failed (`error` then isn't empty)."""

    backup: str
    manifest_sha256: str
    grade: str  # of GRADES; "unproven" when it failed
    finished_unix_ns: int
    duration_s: float
    read_bytes: int
    tables_compared: int = 0
    rows_compared: int = 0
    error: str = ""
    detail: str = ""

    def serialise(self) -> bytes:
        return seal(PROOF_FORMAT, dataclasses.asdict(self))


def parse_proof(content: bytes, where: str) -> Proof:
    """Raises IntegrityError format.corrupt | format.newer."""
    document = unseal(PROOF_FORMAT, content, where)
    try:
        proof = Proof(**{field.name: document[field.name] for field in dataclasses.fields(Proof)})
    except KeyError as error:
        raise _corrupt(where, f"lacks members of a proof ({error})") from error
    if proof.grade not in GRADES:
        raise _corrupt(where, f"names an unknown grade {proof.grade!r}")
    return proof


def proof_name(number: int) -> str:
    """Proofs are numbered, not dated: the order of verdicts mustn't depend on a clock."""
    return f"proof-{number:04d}.json"


def proof_number(name: str) -> int | None:
    """The number in a proof's object name, None for other objects."""
    match = _PROOF_NAME_RE.fullmatch(name)
    return int(match[1]) if match else None


def grade(manifest: Manifest, sha256: str, proofs: Iterable[Proof]) -> str:
    """The grade of a backup from its proofs in order; proofs about another manifest don't count."""
    best = 0
    for proof in proofs:
        if proof.manifest_sha256 != sha256 or proof.backup != manifest.name:
            continue
        best = 0 if proof.error else max(best, GRADES.index(proof.grade))
    return GRADES[best] if manifest.complete else GRADES[0]


# ---- names --------------------------------------------------------------------------------------


def backup_name(unix_ns: int, suffix: str) -> str:
    """UTC, sortable as text: 20261123T180000.123Z-1a2b."""
    moment = datetime.fromtimestamp(unix_ns // 1_000_000_000, UTC)
    return f"{moment:%Y%m%dT%H%M%S}.{unix_ns // 1_000_000 % 1000:03d}Z-{suffix}"


def is_backup_name(name: str) -> bool:
    return _NAME_RE.fullmatch(name) is not None


def summary(manifest: Manifest, the_grade: str) -> dict[str, Any]:
    """The members of a BackupSummary (proto/commands.py)."""
    return {
        "name": manifest.name,
        "node_id": manifest.node_id,
        "system_identifier": manifest.system_identifier,
        "started_unix_ns": manifest.started_unix_ns,
        "finished_unix_ns": manifest.finished_unix_ns,
        "stored_bytes": manifest.stored_bytes,
        "databases": names_of(manifest.databases),
        "complete": manifest.complete,
        "warnings": list(manifest.warnings),
        "grade": the_grade,
    }


def names_of(databases: Sequence[Database]) -> list[str]:
    return [database.name for database in databases]

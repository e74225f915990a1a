"""The backups of one node in a repository: `<cluster>/<node>/<backup>/`.

A backup is the set of objects below its name; it exists once its manifest does. Proofs are numbered
objects beside the manifest. Who writes holds the node's lock; who reads a backup holds that backup's
lock, which retention respects. Locks live in the file system, dotted, and are never objects.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pgherd.proto.errors import ConfigError, IntegrityError, PgherdError, PreconditionError
from pgherd.runtime.durable import exclusive_lock, is_locked, private_directory, sweep_temporaries
from pgherd.storage.manifest import (
    MANIFEST_NAME,
    Manifest,
    Proof,
    grade,
    is_backup_name,
    manifest_sha256,
    parse_manifest,
    parse_proof,
    proof_name,
    proof_number,
)
from pgherd.storage.objects.directory import DirectoryStore
from pgherd.storage.objects.port import ObjectStore, create_bytes, read_all
from pgherd.storage.retention import Item

_COMPONENT_RE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]{0,127}")
_PROOF_ATTEMPTS = 20


@dataclass(frozen=True, slots=True)
class Entry:
    """One backup as found. `proofs` in order; unreadable ones are named in `problems`."""

    manifest: Manifest
    sha256: str
    proofs: tuple[Proof, ...]
    problems: tuple[str, ...]

    @property
    def grade(self) -> str:
        return grade(self.manifest, self.sha256, self.proofs)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A backup whose manifest can't be used: it is shown, and never touched by retention."""

    name: str
    error: PgherdError


class NodeRepository:
    """Backups of one node; open with `open_repository`."""

    def __init__(self, store: ObjectStore, cluster: str, node: str, directory: Path) -> None:
        self.store = store
        self.cluster = cluster
        self.node = node
        self.directory = directory

    def prefix(self, name: str) -> str:
        """Key prefix of a backup's objects."""
        return f"{self.cluster}/{self.node}/{name}/"

    # ---- locks

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the node's lock: one taker, one retention at a time. Raises PreconditionError state.locked."""
        private_directory(self.directory)
        with exclusive_lock(self.directory / ".lock", f"the backups of {self.cluster}/{self.node}"):
            yield

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Hold a backup while it is read. Raises PreconditionError state.locked."""
        path = self._reader_lock(name)
        with exclusive_lock(path, f"the backup {name}"):
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def _reader_lock(self, name: str) -> Path:
        return self.directory / f".{name}.lock"

    # ---- reading

    def _objects(self) -> dict[str, list[str]]:
        """Backup name → names of its objects."""
        found: dict[str, list[str]] = {}
        base = f"{self.cluster}/{self.node}"
        for info in self.store.list(base):
            name, _, rest = info.key.removeprefix(base + "/").partition("/")
            if rest and is_backup_name(name):
                found.setdefault(name, []).append(rest)
        return found

    def entries(self) -> list[Entry | Unreadable]:
        """Every backup, by name (UTC of its start)."""
        found: list[Entry | Unreadable] = []
        for name, objects in sorted(self._objects().items()):
            if MANIFEST_NAME in objects:
                try:
                    found.append(self._entry(name, objects))
                except IntegrityError as error:
                    found.append(Unreadable(name, error))
        return found

    def entry(self, name: str = "") -> Entry:
        """A backup by name, or the newest by ordinal. Raises PreconditionError backup.not_found, IntegrityError format.*."""
        if name:
            objects = self._objects().get(name, [])
            if MANIFEST_NAME not in objects:
                raise self._not_found(f"no backup {name} of {self.cluster}/{self.node}")
            return self._entry(name, objects)
        newest = max(self.readable(), key=lambda entry: entry.manifest.ordinal, default=None)
        if newest is None:
            raise self._not_found(f"no backup of {self.cluster}/{self.node} yet")
        return newest

    def readable(self) -> list[Entry]:
        return [entry for entry in self.entries() if isinstance(entry, Entry)]

    def _not_found(self, message: str) -> PreconditionError:
        return PreconditionError("backup.not_found", message, hint="see `pgherd-agent backup ls`")

    def _entry(self, name: str, objects: list[str]) -> Entry:
        key = self.prefix(name) + MANIFEST_NAME
        content = read_all(self.store, key)
        manifest = parse_manifest(content, key)
        if manifest.name != name:
            raise IntegrityError("format.corrupt", f"{key} is the manifest of {manifest.name}", path=key)
        proofs: list[Proof] = []
        problems: list[str] = []
        for proof in sorted((n for n in objects if proof_number(n) is not None), key=lambda n: proof_number(n) or 0):
            try:
                proofs.append(parse_proof(read_all(self.store, self.prefix(name) + proof), proof))
            except IntegrityError as error:
                problems.append(f"{proof}: {error.message}")
        return Entry(manifest, manifest_sha256(content), tuple(proofs), tuple(problems))

    # ---- writing

    def add_proof(self, proof: Proof) -> None:
        """Publish a verdict under the next free number."""
        objects = self._objects().get(proof.backup, [])
        number = max((proof_number(name) or 0 for name in objects), default=0) + 1
        for attempt in range(_PROOF_ATTEMPTS):
            try:
                return create_bytes(self.store, self.prefix(proof.backup) + proof_name(number + attempt), proof.serialise())
            except PreconditionError as error:
                if error.code != "object.exists":
                    raise
        raise PreconditionError("object.exists", f"no free proof number after {number + _PROOF_ATTEMPTS}")

    def sweep(self) -> list[str]:
        """Remove what crashed runs left: backups without a manifest, temporaries. Hold `writing`."""
        leftovers = [name for name, objects in self._objects().items() if MANIFEST_NAME not in objects]
        for directory in self.directory.glob("*/"):
            sweep_temporaries(directory)
        for name in leftovers:
            self.delete(name)
        for directory in self.directory.glob("*/"):
            if is_backup_name(directory.name) and not any(directory.iterdir()):
                directory.rmdir()
        return leftovers

    def delete(self, name: str) -> None:
        """Remove a backup, its manifest first: from then on it is a leftover that any sweep may finish."""
        self.store.delete(self.prefix(name) + MANIFEST_NAME)
        for info in list(self.store.list(self.prefix(name).rstrip("/"))):
            self.store.delete(info.key)

    def retention_items(self) -> list[Item]:
        """Readable backups as retention sees them."""
        return [
            Item(
                name=entry.manifest.name,
                system_identifier=entry.manifest.system_identifier,
                ordinal=entry.manifest.ordinal,
                complete=entry.manifest.complete,
                grade=entry.grade,
                in_use=is_locked(self._reader_lock(entry.manifest.name)),
            )
            for entry in self.readable()
        ]


def open_repository(root: Path, cluster: str, node: str) -> NodeRepository:
    """The node's backups below a repository directory. Raises ConfigError config.invalid for unfit names."""
    for what, value in (("cluster", cluster), ("node alias", node)):
        if _COMPONENT_RE.fullmatch(value) is None:
            raise ConfigError(
                "config.invalid", f"{what} {value!r} can't be a directory name", hint="use letters, digits and _ . @ + -"
            )
    return NodeRepository(DirectoryStore(root), cluster, node, root / cluster / node)

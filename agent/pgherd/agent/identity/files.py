"""The identity on disk: identity.json (format v1) names a directory `identity-<n>/` with key, certificate and CA.

A new identity is written into a new directory and takes effect when identity.json is published, last. A
crash before that leaves the old identity (or none) in force and a directory that the next write removes.
Light: the resident reads this without `cryptography`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pgherd.proto.errors import IntegrityError, PreconditionError
from pgherd.runtime.durable import fsync_directory, private_directory, publish, publish_json, read_json, storage_error

FORMAT, VERSION = "pgherd.identity", 1
_DIRECTORY_RE = re.compile(r"identity-(\d{1,9})")


@dataclass(frozen=True, slots=True)
class Identity:
    """An agent's identity as it is in force."""

    agent_id: str
    trust_domain: str
    grpc_address: str  # host:port of the collector's mTLS port
    enrol_address: str  # host:port of its enrolment port
    serial: str
    not_before_unix_ns: int
    not_after_unix_ns: int
    directory: Path

    @property
    def key_file(self) -> Path:
        return self.directory / "agent.key"

    @property
    def certificate_file(self) -> Path:
        return self.directory / "agent.crt"

    @property
    def ca_file(self) -> Path:
        return self.directory / "ca.crt"


@dataclass(frozen=True, slots=True)
class NewIdentity:
    """What joining or renewing yielded, before it is on disk. The repr doesn't show the key."""

    agent_id: str
    trust_domain: str
    grpc_address: str
    enrol_address: str
    serial: str
    not_before_unix_ns: int
    not_after_unix_ns: int
    key_pem: bytes
    certificate_pem: str
    ca_pem: str

    def __repr__(self) -> str:
        return f"NewIdentity(agent_id={self.agent_id!r}, serial={self.serial!r})"


def load_identity(state_directory: Path) -> Identity | None:
    """The identity in force, or None when this agent hasn't joined.

    Raises IntegrityError format.newer | format.corrupt.
    """
    path = state_directory / "identity.json"
    try:
        document = read_json(path, format_name=FORMAT, newest_version=VERSION)
    except FileNotFoundError:
        return None
    try:
        directory = str(document["directory"])
        if _DIRECTORY_RE.fullmatch(directory) is None:
            raise ValueError(f"strange directory {directory!r}")
        identity = Identity(
            agent_id=str(uuid.UUID(str(document["agent_id"]))),
            trust_domain=str(document["trust_domain"]),
            grpc_address=str(document["grpc_address"]),
            enrol_address=str(document["enrol_address"]),
            serial=str(document["serial"]),
            not_before_unix_ns=int(str(document["not_before_unix_ns"])),
            not_after_unix_ns=int(str(document["not_after_unix_ns"])),
            directory=state_directory / directory,
        )
    except (KeyError, ValueError) as error:
        raise IntegrityError(
            "format.corrupt", f"{path} can't be read: {error}", hint=f"move {path} aside and join again", path=str(path)
        ) from error
    missing = [file.name for file in (identity.key_file, identity.certificate_file, identity.ca_file) if not file.is_file()]
    if missing:
        raise IntegrityError(
            "format.corrupt",
            f"{identity.directory} lacks {', '.join(missing)}",
            hint="restore the state directory, or join again with --force",
            path=str(identity.directory),
        )
    return identity


def require_identity(state_directory: Path) -> Identity:
    """The identity in force. Raises PreconditionError renew.not_joined, IntegrityError format.*."""
    identity = load_identity(state_directory)
    if identity is None:
        raise PreconditionError(
            "renew.not_joined", f"no identity in {state_directory}", hint="join the herd first: `pgherd-agent join`"
        )
    return identity


def write_identity(state_directory: Path, new: NewIdentity) -> Identity:
    """Put a new identity in force, all or nothing. Call it under `identity_lock`.

    Raises TransientError disk.full | disk.io; then the former identity is still in force.
    """
    private_directory(state_directory)
    numbers = [int(match[1]) for entry in state_directory.iterdir() if (match := _DIRECTORY_RE.fullmatch(entry.name))]
    directory = state_directory / f"identity-{max(numbers, default=0) + 1}"
    try:
        directory.mkdir(mode=0o700)
        publish(directory / "agent.key", new.key_pem, mode=0o600)
        publish(directory / "agent.crt", new.certificate_pem.encode(), mode=0o644)
        publish(directory / "ca.crt", new.ca_pem.encode(), mode=0o644)
        fsync_directory(state_directory)
        publish_json(
            state_directory / "identity.json",
            {
                "format": FORMAT,
                "version": VERSION,
                "agent_id": new.agent_id,
                "trust_domain": new.trust_domain,
                "grpc_address": new.grpc_address,
                "enrol_address": new.enrol_address,
                "serial": new.serial,
                "not_before_unix_ns": new.not_before_unix_ns,
                "not_after_unix_ns": new.not_after_unix_ns,
                "directory": directory.name,
            },
        )
    except BaseException as error:
        _discard(directory)
        if isinstance(error, OSError):
            raise storage_error(error, directory, "writing") from error
        raise
    identity = require_identity(state_directory)
    _sweep(state_directory, keep=directory.name)
    return identity


@contextlib.contextmanager
def identity_lock(state_directory: Path) -> Iterator[None]:
    """Held by whoever joins or renews; the directory itself is locked, so that nothing is written for it.

    Raises PreconditionError state.locked.
    """
    fd = os.open(state_directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise PreconditionError(
            "state.locked", f"another process joins or renews in {state_directory}", hint="wait for it to end"
        ) from error
    finally:
        os.close(fd)


def _discard(directory: Path) -> None:
    with contextlib.suppress(OSError):
        shutil.rmtree(directory)


def _sweep(state_directory: Path, keep: str) -> None:
    """Remove superseded and half-written identities: an old key is a key."""
    for entry in list(state_directory.iterdir()):
        if _DIRECTORY_RE.fullmatch(entry.name) and entry.name != keep:
            _discard(entry)

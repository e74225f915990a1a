"""Commands and their events as frozen values, and their conversion to and from the wire.

A verb is one dataclass; the set is closed on purpose: whoever holds the collector can ask for these
things with these arguments and for nothing else. Names that reach the agent are checked here, on both
sides: a backup name or a directory name is one harmless path component.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pgherd.proto.control.v1 import control_pb2 as pb
from pgherd.proto.errors import ConfigError, PeerError, PgherdError, from_dict

PROTOCOL_VERSION = 1

_COMPONENT_RE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_DIRECTORY_RE = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_UUID_RE = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def check_uuid(value: str, what: str) -> str:
    """Return a lower-case UUID or raise PeerError peer.protocol."""
    if _UUID_RE.fullmatch(value) is None:
        raise PeerError("peer.protocol", f"{what} isn't a UUID: {value[:60]!r}")
    return value


def check_backup_name(value: str) -> str:
    """A backup's name: one path component; empty means the newest."""
    if value and (_COMPONENT_RE.fullmatch(value) is None or ".." in value):
        raise ConfigError("usage.invalid", f"not a backup name: {value[:60]!r}", hint="take a name from `backups ls`")
    return value


def check_directory_name(value: str) -> str:
    """The leaf of a restore target: lower-case letters, digits, `_` and `-`."""
    if _DIRECTORY_RE.fullmatch(value) is None:
        raise ConfigError(
            "usage.invalid",
            f"not a directory name: {value[:60]!r}",
            hint="use 1-63 of a-z, 0-9, _ and -, starting with a letter or digit",
        )
    return value


@dataclass(frozen=True, slots=True)
class Ping:
    """Does the agent answer and execute?"""


@dataclass(frozen=True, slots=True)
class BackupRun:
    """Take a backup of the node now, by the node's own configuration."""


@dataclass(frozen=True, slots=True)
class BackupVerify:
    """Read every byte of a backup back and compare its checksums. Empty name: the newest."""

    backup: str = ""

    def __post_init__(self) -> None:
        check_backup_name(self.backup)


@dataclass(frozen=True, slots=True)
class Restore:
    """Restore a backup away from production.

    Without `root` into a scratch server that is compared with the backup's fingerprint and removed;
    with it into a new data directory `name` under the agent's restore root called `root`.
    """

    backup: str = ""
    root: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        check_backup_name(self.backup)
        if bool(self.root) != bool(self.name):
            raise ConfigError("usage.invalid", "a restore into a new directory needs both root and name")
        if self.root:
            check_directory_name(self.root)
            check_directory_name(self.name)


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """What keeps this node from being sampled, backed up, restored or promoted."""


Verb = Ping | BackupRun | BackupVerify | Restore | Diagnostics

VERB_NAMES: dict[type[Verb], str] = {
    Ping: "ping",
    BackupRun: "backup.run",
    BackupVerify: "backup.verify",
    Restore: "restore",
    Diagnostics: "diagnostics",
}
_VERB_OF_NAME = {name: cls for cls, name in VERB_NAMES.items()}


def verb_name(verb: Verb) -> str:
    """The name used in policies, the ledger and the CLI."""
    return VERB_NAMES[type(verb)]


def policy_name(verb: Verb) -> str:
    """What a local policy grants: restoring into a scratch server and into a directory differ."""
    if isinstance(verb, Restore):
        return "restore.directory" if verb.root else "restore.scratch"
    return verb_name(verb)


def is_exclusive(verb: Verb) -> bool:
    """Whether a node runs only one such command at a time: these read or write whole backups."""
    return isinstance(verb, BackupRun | BackupVerify | Restore)


def verb_to_json(verb: Verb) -> dict[str, str]:
    """Arguments of a verb as JSON members (for ledger and journal)."""
    return {name: getattr(verb, name) for name in verb.__slots__}


def verb_from_json(name: str, arguments: Mapping[str, object]) -> Verb:
    """Inverse of `verb_name` + `verb_to_json`. Raises ConfigError usage.invalid."""
    cls = _VERB_OF_NAME.get(name)
    if cls is None:
        raise ConfigError("usage.invalid", f"unknown verb {name[:40]!r}", hint=f"one of {', '.join(sorted(_VERB_OF_NAME))}")
    unknown = set(arguments) - set(cls.__slots__)
    if unknown or not all(isinstance(value, str) for value in arguments.values()):
        raise ConfigError("usage.invalid", f"{name} doesn't take {', '.join(sorted(unknown)) or 'values other than text'}")
    return cls(**{str(key): str(value) for key, value in arguments.items()})


@dataclass(frozen=True, slots=True)
class Offer:
    """A command as it is offered to an agent. `accept_within_ms` counts from receipt."""

    command_id: str
    node_id: str
    verb: Verb
    issued_unix_ns: int
    accept_within_ms: int
    actor: str
    epoch: int = 0

    def to_wire(self) -> pb.CommandOffer:
        wire = pb.CommandOffer(
            command_id=self.command_id,
            node_id=self.node_id,
            issued_unix_ns=self.issued_unix_ns,
            accept_within_ms=self.accept_within_ms,
            actor=self.actor,
            epoch=self.epoch,
        )
        match self.verb:
            case Ping():
                wire.ping.SetInParent()
            case BackupRun():
                wire.backup_run.SetInParent()
            case BackupVerify(backup):
                wire.backup_verify.SetInParent()
                wire.backup_verify.backup = backup
            case Restore(backup, root, name):
                wire.restore.backup = backup
                if root:
                    wire.restore.new_directory.root = root
                    wire.restore.new_directory.name = name
                else:
                    wire.restore.scratch_server.SetInParent()
            case Diagnostics():
                wire.diagnostics.SetInParent()
        return wire

    def to_json(self) -> dict[str, Any]:
        """JSON members, for the agent's journal and for events."""
        return {
            "command_id": self.command_id,
            "node_id": self.node_id,
            "verb": verb_name(self.verb),
            "arguments": verb_to_json(self.verb),
            "issued_unix_ns": self.issued_unix_ns,
            "accept_within_ms": self.accept_within_ms,
            "actor": self.actor,
            "epoch": self.epoch,
        }

    @classmethod
    def from_json(cls, members: Mapping[str, Any]) -> Offer:
        """Inverse of `to_json`. Raises ConfigError usage.invalid, PeerError peer.protocol."""
        return cls(
            command_id=check_uuid(str(members["command_id"]), "command_id"),
            node_id=check_uuid(str(members["node_id"]), "node_id"),
            verb=verb_from_json(str(members["verb"]), members["arguments"]),
            issued_unix_ns=int(members["issued_unix_ns"]),
            accept_within_ms=int(members["accept_within_ms"]),
            actor=str(members["actor"]),
            epoch=int(members["epoch"]),
        )

    @classmethod
    def from_wire(cls, wire: pb.CommandOffer) -> Offer:
        """Raises PeerError command.unsupported | peer.protocol, ConfigError usage.invalid."""
        return cls(
            command_id=check_uuid(wire.command_id, "command_id"),
            node_id=check_uuid(wire.node_id, "node_id"),
            verb=_verb_from_wire(wire),
            issued_unix_ns=wire.issued_unix_ns,
            accept_within_ms=wire.accept_within_ms,
            actor=wire.actor,
            epoch=wire.epoch,
        )


def _verb_from_wire(wire: pb.CommandOffer) -> Verb:
    match wire.WhichOneof("verb"):
        case "ping":
            return Ping()
        case "backup_run":
            return BackupRun()
        case "backup_verify":
            return BackupVerify(wire.backup_verify.backup)
        case "restore":
            if wire.restore.WhichOneof("target") == "new_directory":
                return Restore(wire.restore.backup, wire.restore.new_directory.root, wire.restore.new_directory.name)
            if wire.restore.WhichOneof("target") == "scratch_server":
                return Restore(wire.restore.backup)
            raise PeerError("command.unsupported", "the restore names no target that this version knows")
        case "diagnostics":
            return Diagnostics()
        case _:
            raise PeerError("command.unsupported", "the command carries no verb that this version knows")


# ---- events -------------------------------------------------------------------------------------

DURABLE_EVENTS = frozenset({"accepted", "rejected", "succeeded", "failed", "indeterminate"})
FINAL_EVENTS = frozenset({"rejected", "succeeded", "failed", "indeterminate"})


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a command's life; `kind` is the wire's oneof name, `body` its JSON facts.

    Bodies: accepted {} or {issued_here: an offer's `to_json()`} when the agent issued it; progress {phase, done, total, unit}; succeeded {result members};
    rejected | failed | indeterminate: an error's `as_dict()`.
    """

    command_id: str
    sequence: int
    unix_ns: int
    kind: str
    body: Mapping[str, Any] = field(default_factory=dict)

    @property
    def final(self) -> bool:
        return self.kind in FINAL_EVENTS

    def error(self) -> PgherdError | None:
        """The error that a rejected, failed or indeterminate event carries."""
        return from_dict(self.body) if self.kind in ("rejected", "failed", "indeterminate") else None

    def to_wire(self, verb: Verb) -> pb.CommandEvent:
        wire = pb.CommandEvent(command_id=self.command_id, sequence=self.sequence, unix_ns=self.unix_ns)
        match self.kind:
            case "accepted":
                wire.accepted.SetInParent()
                if "issued_here" in self.body:
                    wire.accepted.issued_here.CopyFrom(Offer.from_json(self.body["issued_here"]).to_wire())
            case "progress":
                wire.progress.CopyFrom(pb.Progress(**self.body))
            case "succeeded":
                wire.succeeded.SetInParent()
                _RESULT_TO_WIRE[type(verb)](wire.succeeded, self.body)
            case "rejected" | "failed" | "indeterminate":
                error = getattr(wire, self.kind).error
                error.code = str(self.body["code"])
                error.message = str(self.body["message"])
                error.hint = str(self.body.get("hint", ""))
                for key, value in dict(self.body.get("context", {})).items():
                    error.context[str(key)] = str(value)
            case _:
                raise ValueError(f"unknown event kind {self.kind}")
        return wire

    @classmethod
    def from_wire(cls, wire: pb.CommandEvent) -> Event:
        """Raises PeerError peer.protocol for an event that this version doesn't know."""
        kind = wire.WhichOneof("event")
        if kind is None:
            raise PeerError("peer.protocol", "a command event of an unknown kind")
        body: dict[str, Any] = {}
        match kind:
            case "accepted" if wire.accepted.HasField("issued_here"):
                body = {"issued_here": Offer.from_wire(wire.accepted.issued_here).to_json()}
            case "progress":
                progress = wire.progress
                body = {"phase": progress.phase, "done": progress.done, "total": progress.total, "unit": progress.unit}
            case "succeeded":
                body = _result_from_wire(wire.succeeded)
            case "rejected" | "failed" | "indeterminate":
                error = getattr(wire, kind).error
                body = {"code": error.code, "message": error.message, "hint": error.hint, "context": dict(error.context)}
        return cls(check_uuid(wire.command_id, "command_id"), wire.sequence, wire.unix_ns, kind, body)


GRADES = ("unproven", "read back", "checked", "content-equal")


def _grade(wire: int) -> str:
    """Raises PeerError peer.protocol for a grade that this version doesn't know: a proof that can't be read proves nothing."""
    if not 0 <= wire < len(GRADES):
        raise PeerError("peer.protocol", f"a result of an unknown grade ({wire})")
    return GRADES[wire]


def _seconds(wire: float) -> float:
    """Raises PeerError peer.protocol for what JSON can't carry."""
    if not math.isfinite(wire):
        raise PeerError("peer.protocol", f"a result that took {wire} seconds")
    return wire


def _backup_summary_to_wire(summary: Mapping[str, Any]) -> pb.BackupSummary:
    members = dict(summary)
    members["grade"] = GRADES.index(members.get("grade", "unproven"))
    return pb.BackupSummary(**members)


def _backup_summary_from_wire(wire: pb.BackupSummary) -> dict[str, Any]:
    return {
        "name": wire.name,
        "node_id": wire.node_id,
        "system_identifier": wire.system_identifier,
        "started_unix_ns": wire.started_unix_ns,
        "finished_unix_ns": wire.finished_unix_ns,
        "stored_bytes": wire.stored_bytes,
        "databases": list(wire.databases),
        "complete": wire.complete,
        "warnings": list(wire.warnings),
        "grade": _grade(wire.grade),
    }


def _graded(body: Mapping[str, Any]) -> dict[str, Any]:
    return {**body, "grade": GRADES.index(body["grade"])}


_RESULT_TO_WIRE: dict[type[Verb], Callable[[pb.Succeeded, Mapping[str, Any]], None]] = {
    Ping: lambda wire, body: wire.ping.CopyFrom(pb.PingResult(**body)),
    BackupRun: lambda wire, body: wire.backup_run.backup.CopyFrom(_backup_summary_to_wire(body)),
    BackupVerify: lambda wire, body: wire.backup_verify.CopyFrom(pb.VerifyResult(**_graded(body))),
    Restore: lambda wire, body: wire.restore.CopyFrom(pb.RestoreResult(**_graded(body))),
    Diagnostics: lambda wire, body: wire.diagnostics.CopyFrom(
        pb.DiagnosticsResult(findings=[pb.Finding(**finding) for finding in body["findings"]])
    ),
}


def _result_from_wire(wire: pb.Succeeded) -> dict[str, Any]:
    match wire.WhichOneof("result"):
        case "ping":
            return {"agent_unix_ns": wire.ping.agent_unix_ns}
        case "backup_run":
            return _backup_summary_from_wire(wire.backup_run.backup)
        case "backup_verify":
            verify = wire.backup_verify
            return {
                "backup": verify.backup,
                "grade": _grade(verify.grade),
                "read_bytes": verify.read_bytes,
                "duration_s": _seconds(verify.duration_s),
            }
        case "restore":
            restore = wire.restore
            return {
                "backup": restore.backup,
                "grade": _grade(restore.grade),
                "tables_compared": restore.tables_compared,
                "rows_compared": restore.rows_compared,
                "duration_s": _seconds(restore.duration_s),
                "directory": restore.directory,
            }
        case "diagnostics":
            return {
                "findings": [
                    {"check": f.check, "severity": f.severity, "message": f.message, "remedy": f.remedy}
                    for f in wire.diagnostics.findings
                ]
            }
        case _:
            raise PeerError("peer.protocol", "a result of an unknown kind")

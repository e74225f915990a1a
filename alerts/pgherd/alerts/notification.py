"""What a receiver gets: a group of alerts as a stored document, and as Alertmanager's webhook payload. Pure.

The document (format version 2; 1 held one alert) is what the outbox keeps; it must stay readable by later versions,
since a notification may wait through an upgrade.
Source of the payload: Alertmanager documentation, configuration, <webhook_config>, version "4".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from pgherd.alerts.model import ALERT_NAME_LABEL, fingerprint_of
from pgherd.proto.errors import IntegrityError

_VERSION = 2
_NEVER = "0001-01-01T00:00:00Z"  # Go's zero time: "not ended"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
NOTES_MAX = 200  # in one notification; the rest is counted


def rfc3339(unix_ns: int) -> str:
    """ "2026-11-23T18:04:05.678901Z", as Prometheus and Alertmanager write times."""
    return (_EPOCH + timedelta(microseconds=unix_ns // 1000)).isoformat().replace("+00:00", "Z")


@dataclass(frozen=True, slots=True)
class Note:
    """One alert in a notification. It began at `starts_unix_ns` and is over once `ends_unix_ns` is known."""

    rule_id: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    value: float
    starts_unix_ns: int
    ends_unix_ns: int | None = None
    reason: str = ""
    expr: str = ""

    @property
    def key(self) -> str:
        """Which alert it is: of two rules with equal labels each has its own."""
        return f"{self.fingerprint}.{self.rule_id[-16:]}"

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.labels)

    @property
    def status(self) -> str:
        return "firing" if self.ends_unix_ns is None else "resolved"

    def to_document(self) -> dict[str, object]:
        """A JSON object from which `from_document` makes the same note."""
        return {
            "rule_id": self.rule_id,
            "labels": dict(self.labels),
            "annotations": dict(self.annotations),
            "value": repr(float(self.value)),  # JSON has no NaN and no infinity
            "starts_unix_ns": self.starts_unix_ns,
            "ends_unix_ns": self.ends_unix_ns,
            "reason": self.reason,
            "expr": self.expr,
        }

    @classmethod
    def from_document(cls, document: object) -> Note:
        """Inverse of `to_document`. Raises IntegrityError format.corrupt."""
        match document:
            case {
                "rule_id": str(rule_id),
                "labels": dict(labels),
                "annotations": dict(annotations),
                "value": str(value),
                "starts_unix_ns": int(starts_unix_ns),
                "ends_unix_ns": int() | None as ends_unix_ns,
                "reason": str(reason),
                "expr": str(expr),
            }:
                return cls(rule_id, labels, annotations, float(value), starts_unix_ns, ends_unix_ns, reason, expr)
        raise _corrupt()


@dataclass(frozen=True, slots=True)
class Notification:
    """One message to one receiver: the alerts of a group. `id` is the idempotency key of its delivery."""

    id: str
    group_key: str
    group_labels: Mapping[str, str]
    notes: tuple[Note, ...]
    truncated: int = 0  # alerts that it has no room for

    @property
    def status(self) -> str:
        """Firing while one of them is."""
        return "firing" if any(note.ends_unix_ns is None for note in self.notes) else "resolved"

    @property
    def common_labels(self) -> dict[str, str]:
        return _common([note.labels for note in self.notes])

    @property
    def common_annotations(self) -> dict[str, str]:
        return _common([note.annotations for note in self.notes])

    @property
    def title(self) -> str:
        """One line for people: "[FIRING:2] DiskSpace main"."""
        firing = sum(note.ends_unix_ns is None for note in self.notes)
        count = f":{firing + self.truncated}" if firing else ""
        shown = " ".join(self.group_labels.values()) or self.notes[0].labels.get(ALERT_NAME_LABEL, "alerts")
        return f"[{self.status.upper()}{count}] {shown}"


def notification(id_: str, group_key: str, group_labels: Mapping[str, str], notes: Sequence[Note]) -> Notification:
    """A message about `notes`, the firing ones first; those that don't fit are counted."""
    ordered = sorted(notes, key=lambda note: (note.ends_unix_ns is not None, note.starts_unix_ns))
    return Notification(id_, group_key, group_labels, tuple(ordered[:NOTES_MAX]), max(0, len(ordered) - NOTES_MAX))


def to_document(message: Notification) -> dict[str, object]:
    """A JSON object from which `from_document` makes the same notification."""
    return {
        "version": _VERSION,
        "id": message.id,
        "group_key": message.group_key,
        "group_labels": dict(message.group_labels),
        "notes": [note.to_document() for note in message.notes],
        "truncated": message.truncated,
    }


def from_document(document: Mapping[str, object]) -> Notification:
    """Inverse of `to_document`; reads version 1 too. Raises IntegrityError format.newer | format.corrupt."""
    match document:
        case {"version": 1, "id": str(id_)}:
            note = Note.from_document(document)
            name = {ALERT_NAME_LABEL: note.labels.get(ALERT_NAME_LABEL, "")}
            return Notification(id_, f'{{}}:{{{ALERT_NAME_LABEL}="{name[ALERT_NAME_LABEL]}"}}', name, (note,))
        case {
            "version": 2,
            "id": str(id_),
            "group_key": str(group_key),
            "group_labels": dict(group_labels),
            "notes": [_, *_] as notes,
            "truncated": int(truncated),
        }:
            return Notification(id_, group_key, group_labels, tuple(Note.from_document(one) for one in notes), truncated)
        case {"version": int(version)} if version <= _VERSION:
            raise _corrupt()
    raise IntegrityError(
        "format.newer",
        f"a notification in the outbox has format version {document.get('version')!r}; this pgherd reads {_VERSION}",
        hint="run the pgherd version that wrote it",
    )


def webhook_payload(message: Notification, *, receiver: str, external_url: str) -> dict[str, Any]:
    """The POST body, as Alertmanager sends it: a program written for Alertmanager's webhook reads it unchanged."""
    return {
        "version": "4",
        "groupKey": message.group_key,
        "truncatedAlerts": message.truncated,
        "status": message.status,
        "receiver": receiver,
        "groupLabels": dict(message.group_labels),
        "commonLabels": message.common_labels,
        "commonAnnotations": message.common_annotations,
        "externalURL": external_url,
        "alerts": [
            {
                "status": note.status,
                "labels": dict(note.labels),
                "annotations": dict(note.annotations),
                "startsAt": rfc3339(note.starts_unix_ns),
                "endsAt": _NEVER if note.ends_unix_ns is None else rfc3339(note.ends_unix_ns),
                "generatorURL": f"{external_url}/alerts" if external_url else "",
                "fingerprint": note.fingerprint,
            }
            for note in message.notes
        ],
    }


def _common(mappings: Sequence[Mapping[str, str]]) -> dict[str, str]:
    first, *others = mappings
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}


def _corrupt() -> IntegrityError:
    return IntegrityError("format.corrupt", "a notification in the outbox lacks members")

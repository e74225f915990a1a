"""What a receiver gets: a transition as a stored document, and as Alertmanager's webhook payload. Pure.

The document (format version 1) is what the outbox keeps; it must stay readable by later versions, since
a notification may wait through an upgrade.
Source of the payload: Alertmanager documentation, configuration, <webhook_config>, version "4".
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from pgherd.alerts.model import ALERT_NAME_LABEL, Transition, TransitionKind
from pgherd.proto.errors import IntegrityError

_VERSION = 1
_NEVER = "0001-01-01T00:00:00Z"  # Go's zero time: "not ended"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def rfc3339(unix_ns: int) -> str:
    """ "2026-11-23T18:04:05.678901Z", as Prometheus and Alertmanager write times."""
    return (_EPOCH + timedelta(microseconds=unix_ns // 1000)).isoformat().replace("+00:00", "Z")


def to_document(transition: Transition) -> dict[str, object]:
    """A JSON object from which `from_document` makes the same transition."""
    return {
        "version": _VERSION,
        "id": transition.id,
        "kind": transition.kind.value,
        "rule_id": transition.rule_id,
        "labels": dict(transition.labels),
        "annotations": dict(transition.annotations),
        "value": repr(float(transition.value)),  # JSON has no NaN and no infinity
        "starts_unix_ns": transition.starts_unix_ns,
        "ends_unix_ns": transition.ends_unix_ns,
        "reason": transition.reason,
        "expr": transition.expr,
    }


def from_document(document: Mapping[str, object]) -> Transition:
    """Inverse of `to_document`. Raises IntegrityError format.newer | format.corrupt."""
    if document.get("version") != _VERSION:
        raise IntegrityError(
            "format.newer",
            f"a notification in the outbox has format version {document.get('version')!r}; this pgherd reads {_VERSION}",
            hint="run the pgherd version that wrote it",
        )
    match document:
        case {
            "id": str(id_),
            "kind": str(kind),
            "rule_id": str(rule_id),
            "labels": dict(labels),
            "annotations": dict(annotations),
            "value": str(value),
            "starts_unix_ns": int(starts_unix_ns),
            "ends_unix_ns": int() | None as ends_unix_ns,
            "reason": str(reason),
            "expr": str(expr),
        }:
            return Transition(
                id=id_,
                kind=TransitionKind(kind),
                rule_id=rule_id,
                labels=labels,
                annotations=annotations,
                value=float(value),
                starts_unix_ns=starts_unix_ns,
                ends_unix_ns=ends_unix_ns,
                reason=reason,
                expr=expr,
            )
    raise IntegrityError("format.corrupt", "a notification in the outbox lacks members")


def webhook_payload(transition: Transition, *, receiver: str, external_url: str) -> dict[str, object]:
    """The POST body for one transition: a group of one alert, as Alertmanager sends it.

    A program written for Alertmanager's webhook reads it unchanged.
    """
    resolved = transition.kind is TransitionKind.RESOLVED
    group_labels = {ALERT_NAME_LABEL: transition.labels[ALERT_NAME_LABEL]}
    return {
        "version": "4",
        "groupKey": f'{{}}:{{{ALERT_NAME_LABEL}="{transition.labels[ALERT_NAME_LABEL]}"}}',
        "truncatedAlerts": 0,
        "status": transition.kind.value,
        "receiver": receiver,
        "groupLabels": group_labels,
        "commonLabels": dict(transition.labels),
        "commonAnnotations": dict(transition.annotations),
        "externalURL": external_url,
        "alerts": [
            {
                "status": transition.kind.value,
                "labels": dict(transition.labels),
                "annotations": dict(transition.annotations),
                "startsAt": rfc3339(transition.starts_unix_ns),
                "endsAt": rfc3339(transition.ends_unix_ns) if resolved and transition.ends_unix_ns is not None else _NEVER,
                "generatorURL": f"{external_url}/alerts" if external_url else "",
                "fingerprint": transition.fingerprint,
            }
        ],
    }

"""Alert instances and notifications as rows of the control store. Called inside the caller's transaction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, delete, func, or_, select, update
from sqlalchemy.dialects.sqlite import insert

from pgherd.alerts.grouping import GroupState, Told
from pgherd.alerts.model import Instance, State
from pgherd.alerts.notification import Note, Notification, to_document
from pgherd.storage.control.schema import alert_instances, notification_groups, outbox

_GROUP_DIGITS = 16  # an idempotency key begins with the digest of its group
_UNDELIVERED = outbox.c.delivered_unix_ns.is_(None) & outbox.c.given_up_unix_ns.is_(None)


# --- instances ----------------------------------------------------------------------------------


def read_instances(connection: Connection) -> dict[str, dict[str, Instance]]:
    """All instances: rule id → fingerprint → instance."""
    found: dict[str, dict[str, Instance]] = {}
    for row in connection.execute(select(alert_instances)).mappings():
        detail = row["detail"]
        found.setdefault(row["rule_id"], {})[row["fingerprint"]] = Instance(
            labels=row["labels"],
            annotations=row["annotations"],
            value=row["value"] if row["value"] is not None else math.nan,  # SQLite keeps NaN as NULL
            state=State(row["state"]),
            active_unix_ns=row["active_unix_ns"],
            evaluated_unix_ns=row["last_evaluated_unix_ns"],
            fired_unix_ns=row["fired_unix_ns"],
            resolved_unix_ns=row["resolved_unix_ns"],
            held_ns=detail["held_ns"],
            absent_ns=detail["absent_ns"],
            episode_unix_ns=detail["episode_unix_ns"],
        )
    return found


def write_instances(
    connection: Connection, rule_id: str, before: Mapping[str, Instance], after: Mapping[str, Instance]
) -> None:
    """Make the stored instances of a rule those of `after`; `before` is what is stored now.

    Rows that differ only in what the next evaluation computes anew (value, stamp) aren't written: a
    thousand steady alerts cost nothing.
    """
    gone = before.keys() - after.keys()
    for fingerprint in gone:
        connection.execute(
            delete(alert_instances).where(alert_instances.c.rule_id == rule_id, alert_instances.c.fingerprint == fingerprint)
        )
    changed = [
        _instance_row(rule_id, fingerprint, instance)
        for fingerprint, instance in after.items()
        if fingerprint not in before or _must_survive(before[fingerprint]) != _must_survive(instance)
    ]
    if changed:
        statement = insert(alert_instances)
        connection.execute(
            statement.on_conflict_do_update(
                index_elements=["rule_id", "fingerprint"],
                set_={
                    column.name: statement.excluded[column.name] for column in alert_instances.columns if not column.primary_key
                },
            ),
            changed,
        )


def delete_rule(connection: Connection, rule_id: str) -> None:
    """Forget all instances of a rule."""
    connection.execute(delete(alert_instances).where(alert_instances.c.rule_id == rule_id))


def _must_survive(instance: Instance) -> tuple[object, ...]:
    return (
        instance.state,
        instance.active_unix_ns,
        instance.held_ns,
        instance.absent_ns,
        instance.fired_unix_ns,
        instance.resolved_unix_ns,
        instance.episode_unix_ns,
    )


def _instance_row(rule_id: str, fingerprint: str, instance: Instance) -> dict[str, object]:
    absent_ns = instance.absent_ns
    return {
        "rule_id": rule_id,
        "fingerprint": fingerprint,
        "labels": dict(instance.labels),
        "annotations": dict(instance.annotations),
        "state": instance.state.value,
        "active_unix_ns": instance.active_unix_ns,
        "fired_unix_ns": instance.fired_unix_ns,
        "resolved_unix_ns": instance.resolved_unix_ns,
        "keep_firing_since_unix_ns": None if absent_ns is None else instance.evaluated_unix_ns - absent_ns,
        "last_evaluated_unix_ns": instance.evaluated_unix_ns,
        "value": instance.value,
        "detail": {"held_ns": instance.held_ns, "absent_ns": absent_ns, "episode_unix_ns": instance.episode_unix_ns},
    }


# --- groups -------------------------------------------------------------------------------------


def read_groups(connection: Connection) -> dict[str, tuple[str, GroupState]]:
    """What receivers know: group digest → receiver, state. Raises IntegrityError format.corrupt."""
    found: dict[str, tuple[str, GroupState]] = {}
    for row in connection.execute(select(notification_groups)).mappings():
        told = {key: Told(Note.from_document(one["note"]), bool(one["silenced"])) for key, one in row["told"].items()}
        found[row["digest"]] = (row["receiver"], GroupState(told, row["notified_unix_ns"]))
    return found


def write_group(connection: Connection, digest: str, receiver: str, state: GroupState | None) -> None:
    """Remember, or forget, what a group's receiver knows."""
    if state is None:
        connection.execute(delete(notification_groups).where(notification_groups.c.digest == digest))
        return
    told = {key: {"note": one.note.to_document(), "silenced": one.silenced} for key, one in state.told.items()}
    statement = insert(notification_groups).values(
        digest=digest, receiver=receiver, told=told, notified_unix_ns=state.notified_unix_ns
    )
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["digest"],
            set_={"told": statement.excluded.told, "notified_unix_ns": statement.excluded.notified_unix_ns},
        )
    )


# --- outbox -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Letter:
    """One notification for one receiver."""

    id: int
    payload: Mapping[str, object]
    attempts: int


def post(connection: Connection, receiver: str, messages: Sequence[Notification], now_unix_ns: int, pending_max: int) -> int:
    """Put messages for one receiver into the outbox; returns how many old letters were given up.

    Overflow rule: no receiver has more than `pending_max` undelivered letters; the oldest give way, because
    what happened last is nearest to what is true. They stay visible as given up until pruned.
    """
    if not messages:
        return 0
    letters = [
        {
            "idempotency_key": message.id,
            "receiver": receiver,
            "payload": to_document(message),
            "created_unix_ns": now_unix_ns,
            "next_attempt_unix_ns": now_unix_ns,
        }
        for message in messages
    ]
    connection.execute(insert(outbox).on_conflict_do_nothing(index_elements=["idempotency_key", "receiver"]), letters)
    excess = pending(connection, receiver) - pending_max
    if excess <= 0:
        return 0
    oldest = select(outbox.c.id).where(outbox.c.receiver == receiver, _UNDELIVERED).order_by(outbox.c.id).limit(excess)
    connection.execute(
        update(outbox)
        .where(outbox.c.id.in_(oldest.scalar_subquery()))
        .values(given_up_unix_ns=now_unix_ns, last_error="the outbox overflowed")
    )
    return excess


def pending(connection: Connection, receiver: str) -> int:
    """How many letters still wait for `receiver`."""
    return connection.execute(select(func.count()).where(outbox.c.receiver == receiver, _UNDELIVERED)).scalar_one()


def due(connection: Connection, receiver: str, now_unix_ns: int, backoff_max_ns: int, limit: int) -> list[Letter]:
    """The letters to try now, oldest first: of each group only its oldest, so that none overtakes another.

    A next attempt further ahead than any backoff comes from a clock that was wrong, and is due.
    """
    heads = (
        select(func.min(outbox.c.id))
        .where(outbox.c.receiver == receiver, _UNDELIVERED)
        .group_by(func.substr(outbox.c.idempotency_key, 1, _GROUP_DIGITS))
    )
    next_attempt = outbox.c.next_attempt_unix_ns
    rows = connection.execute(
        select(outbox.c.id, outbox.c.payload, outbox.c.attempts)
        .where(
            outbox.c.id.in_(heads.scalar_subquery()),
            or_(next_attempt <= now_unix_ns, next_attempt > now_unix_ns + backoff_max_ns),
        )
        .order_by(outbox.c.id)
        .limit(limit)
    )
    return [Letter(row.id, row.payload, row.attempts) for row in rows]


def mark_delivered(connection: Connection, letter_id: int, now_unix_ns: int) -> None:
    """The receiver has it."""
    connection.execute(
        update(outbox)
        .where(outbox.c.id == letter_id)
        .values(delivered_unix_ns=now_unix_ns, attempts=outbox.c.attempts + 1, last_error=None)
    )


def mark_failed(connection: Connection, letter_id: int, next_attempt_unix_ns: int, problem: str) -> None:
    """It stays, to be tried again."""
    connection.execute(
        update(outbox)
        .where(outbox.c.id == letter_id)
        .values(attempts=outbox.c.attempts + 1, next_attempt_unix_ns=next_attempt_unix_ns, last_error=problem[:500])
    )


def give_up_strangers(connection: Connection, receivers: Sequence[str], now_unix_ns: int) -> int:
    """Give up letters to receivers that are no longer configured; returns how many."""
    return connection.execute(
        update(outbox)
        .where(outbox.c.receiver.not_in(receivers), _UNDELIVERED)
        .values(given_up_unix_ns=now_unix_ns, last_error="the receiver is no longer configured")
    ).rowcount


def prune(connection: Connection, older_than_unix_ns: int) -> int:
    """Delete what was delivered or given up before then; returns how many."""
    return connection.execute(
        delete(outbox).where(
            or_(outbox.c.delivered_unix_ns < older_than_unix_ns, outbox.c.given_up_unix_ns < older_than_unix_ns)
        )
    ).rowcount

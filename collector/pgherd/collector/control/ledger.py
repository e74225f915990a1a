"""The durable ledger of commands: what was asked, what happened, who asked. Synchronous; call it in a thread.

Each method is one transaction, committed when it returns: an id that was handed out and an event that was
acknowledged survive kill -9 and a power cut. What events mean is decided in lifecycle.py, which requests
become commands in admission.py; here they are only made durable.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, select, update
from sqlalchemy.dialects.sqlite import insert as upsert

from pgherd.collector.control.admission import OpenCommand, Reconciled, Request, admit, offerable, reconcile
from pgherd.collector.control.backupfacts import keep_backup_facts
from pgherd.collector.control.lifecycle import (
    OPEN_STATES,
    DeadlinePassed,
    Forgotten,
    Input,
    Life,
    Offered,
    Reported,
    State,
    fold,
    step,
)
from pgherd.proto.clock import Clock
from pgherd.proto.commands import Event, Offer, Verb, policy_name, verb_from_json, verb_name, verb_to_json
from pgherd.proto.errors import ConfigError, DeniedError, PeerError, PreconditionError
from pgherd.storage.control.schema import agents, audit, command_events, commands, nodes
from pgherd.storage.control.store import ControlStore

ACCEPT_WITHIN_DEFAULT_S = 60.0
ACCEPT_WITHIN_MAX_S = 86400.0
# An hourly backup and its verification leave some 5 KiB a node: without an end a big herd fills the disk within a year.
COMMANDS_KEPT_NS = 90 * 86400 * 10**9
AUDIT_KEPT_NS = 400 * 86400 * 10**9  # a year, and time to look into it
_SEQUENCE_MAX = 2**31 - 1
# What one command may leave behind, whoever reports it: honest agents send four events, the longest some kilobytes.
_EVENTS_MAX = 32
_BODY_BYTES_MAX = 256 * 1024
# A member by which the result of a verb is told from another's.
_RESULT_MEMBER = {
    "ping": "agent_unix_ns",
    "backup.run": "system_identifier",
    "backup.verify": "read_bytes",
    "restore": "tables_compared",
    "diagnostics": "findings",
}


@dataclass(frozen=True, slots=True)
class Submitted:
    """A command in the ledger. `created` is False when the idempotency key named an earlier one."""

    command_id: str
    agent_id: str
    created: bool


@dataclass(frozen=True, slots=True)
class Recorded:
    """What recording an event did. `known` is False for a command that this ledger never issued."""

    state: State | None
    changed: bool
    known: bool = True


class Ledger:
    """Commands and their events over the control store. Thread-safe."""

    def __init__(self, store: ControlStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    # ---- issuing --------------------------------------------------------------------------------

    def submit(
        self,
        node: str,
        verb: Verb,
        *,
        actor: str,
        via: str,
        idempotency_key: str | None = None,
        accept_within_s: float = ACCEPT_WITHIN_DEFAULT_S,
        epoch: int = 0,
    ) -> Submitted:
        """Queue a command for `node` (alias, cluster/alias or UUID); durable before the id is returned.

        Raises PreconditionError node.not_found | command.conflict, ConfigError usage.invalid.
        """
        if not 0 < accept_within_s <= ACCEPT_WITHIN_MAX_S:
            raise ConfigError("usage.invalid", f"accept_within must be above 0 and at most {ACCEPT_WITHIN_MAX_S:g} s")
        now_unix_ns = self._clock.wall_unix_ns()
        with self._store.begin() as connection:
            target = resolve_node(connection, node)
            request = Request(target.id, verb)
            earlier = _by_key(connection, idempotency_key)
            known_id = admit(request, earlier, _open_on_node(connection, target.id))
            if known_id is not None:
                return Submitted(known_id, target.agent_id, created=False)
            accept_within_ms = max(1, round(accept_within_s * 1000))
            offer = Offer(str(uuid.uuid4()), target.id, verb, now_unix_ns, accept_within_ms, actor, epoch)
            _insert(connection, now_unix_ns, offer, target.agent_id, actor=actor, via=via, idempotency_key=idempotency_key)
        return Submitted(offer.command_id, target.agent_id, created=True)

    # ---- offering -------------------------------------------------------------------------------

    def take_offers(self, agent_id: str, *, besides: Iterable[str] = (), limit: int = 16) -> list[Offer]:
        """Note as offered and return what this agent may be told now, without the ids in `besides`.

        The note is durable before the offer can be on the wire; an offer that is then lost is made
        again at the next connect, and the agent knows its commands by id.
        """
        now_unix_ns = self._clock.wall_unix_ns()
        left_out = set(besides)
        with self._store.read() as connection:  # the common case, nothing to offer, takes no write lock
            if not set(offerable(_open_commands(connection, agent_id))) - left_out:
                return []
        with self._store.begin() as connection:
            ready = [one for one in offerable(_open_commands(connection, agent_id)) if one not in left_out]
            offers: list[Offer] = []
            for row in _rows(connection, ready[: limit * 2]):
                remaining_ns = row.accept_deadline_unix_ns - now_unix_ns
                if remaining_ns <= 0 or len(offers) == limit:
                    continue  # expire_due names the former in a moment
                _apply(connection, row, [Offered(now_unix_ns)])
                offers.append(_offer(row, remaining_ns))
        return offers

    def reconcile(self, agent_id: str, unfinished: Mapping[str, int]) -> Reconciled:
        """Compare with an agent's hello and record what it has forgotten; idempotent.

        Raises DeniedError identity.mismatch when the agent lists another agent's command.
        """
        now_unix_ns = self._clock.wall_unix_ns()
        with self._store.begin() as connection:
            listed = {row.id: row.agent_id for row in _rows(connection, list(unfinished))}
            foreign = sorted(one for one, owner in listed.items() if owner != agent_id)
            if foreign:
                raise _foreign(agent_id, foreign[0])
            found = reconcile(_open_commands(connection, agent_id), unfinished, frozenset(listed))
            for row in _rows(connection, found.forgotten):
                _apply(connection, row, [Forgotten(now_unix_ns)])
                write_audit(connection, now_unix_ns, f"agent:{agent_id}", "grpc", "command.forgotten", row.id, {})
        return found

    # ---- what happened --------------------------------------------------------------------------

    def record(self, agent_id: str, event: Event) -> Recorded:
        """Keep an event of `agent_id`; idempotent by (command, sequence). Acknowledge when it returns.

        A command that the agent issued to itself enters the ledger with its `accepted`. An event of any
        other command that this ledger doesn't know (it was restored from an older copy) is kept in the
        audit. Raises DeniedError identity.mismatch for another
        agent's command (audited), PeerError peer.protocol for a sequence out of range.
        """
        _check_bounds(event)
        now_unix_ns = self._clock.wall_unix_ns()
        actor = f"agent:{agent_id}"
        with self._store.begin() as connection:
            row = _row(connection, event.command_id) or _take_in(connection, now_unix_ns, agent_id, event)
            if row is None:
                if event.kind != "progress":
                    _keep_unknown(connection, now_unix_ns, agent_id, event)
                return Recorded(None, changed=False, known=False)
            if row.agent_id == agent_id:
                before = State(row.state)
                _check_result(row, event)
                if not _append(connection, event, now_unix_ns):
                    return Recorded(before, changed=False)
                life = _apply(connection, row, [])
                if life.outcome is not None and life.outcome.sequence == event.sequence:
                    keep_backup_facts(connection, row.node_id, row.verb, row.arguments, event, now_unix_ns)
                    detail = {"state": life.state.value, "late": life.late}
                    write_audit(connection, now_unix_ns, actor, "grpc", "command.finished", row.id, detail)
                return Recorded(life.state, changed=True)
            write_audit(connection, now_unix_ns, actor, "grpc", "command.foreign_event", row.id, {"kind": event.kind})
        raise _foreign(agent_id, event.command_id)

    def expire_due(self, *, limit: int = 256) -> list[str]:
        """Call expired what nobody accepted in time; returns the ids."""
        now_unix_ns = self._clock.wall_unix_ns()
        due = (
            select(commands)
            .where(commands.c.state.in_([State.QUEUED.value, State.OFFERED.value]))
            .where(commands.c.accept_deadline_unix_ns <= now_unix_ns)
            .limit(limit)
        )
        with self._store.read() as connection:
            if connection.execute(due.limit(1)).first() is None:
                return []
        with self._store.begin() as connection:
            rows = connection.execute(due).all()
            for row in rows:
                _apply(connection, row, [DeadlinePassed(now_unix_ns)])
                write_audit(connection, now_unix_ns, "collector", "clock", "command.expired", row.id, {"was": row.state})
        return [row.id for row in rows]

    def prune(self, *, limit: int = 1000) -> int:
        """Forget ended commands of which nothing was heard for long, and old rows of the audit; returns how many rows.

        At most `limit` of each: the write lock is everybody's. Backups' facts and open commands stay.
        """
        now_unix_ns = self._clock.wall_unix_ns()
        commands_before_unix_ns, audit_before_unix_ns = now_unix_ns - COMMANDS_KEPT_NS, now_unix_ns - AUDIT_KEPT_NS
        recent = select(command_events.c.command_id).where(
            command_events.c.command_id == commands.c.id, command_events.c.received_unix_ns >= commands_before_unix_ns
        )
        old = (
            select(commands.c.id)
            .where(commands.c.issued_unix_ns < commands_before_unix_ns)
            .where(commands.c.state.not_in([state.value for state in OPEN_STATES]))
            .where(~recent.exists())
            .order_by(commands.c.seq)
            .limit(limit)
        )
        oldest = select(audit.c.id).where(audit.c.unix_ns < audit_before_unix_ns).order_by(audit.c.id).limit(limit)
        with self._store.begin() as connection:
            ids = connection.execute(old).scalars().all()
            connection.execute(delete(command_events).where(command_events.c.command_id.in_(ids)))
            connection.execute(delete(commands).where(commands.c.id.in_(ids)))
            rows = connection.execute(delete(audit).where(audit.c.id.in_(oldest.scalar_subquery()))).rowcount
        return len(ids) + rows

    def next_deadline_unix_ns(self) -> int | None:
        """The earliest deadline that still runs."""
        with self._store.read() as connection:
            waiting = commands.c.state.in_([State.QUEUED.value, State.OFFERED.value])
            return connection.execute(select(func.min(commands.c.accept_deadline_unix_ns)).where(waiting)).scalar()

    def note(self, actor: str, via: str, action: str, subject: str, detail: Mapping[str, Any]) -> None:
        """Add a row to the audit."""
        with self._store.begin() as connection:
            write_audit(connection, self._clock.wall_unix_ns(), actor, via, action, subject, detail)


# ---- rows ---------------------------------------------------------------------------------------


def write_audit(
    connection: Connection, unix_ns: int, actor: str, via: str, action: str, subject: str, detail: Mapping[str, Any]
) -> None:
    """One row of the audit inside the caller's transaction. `action` is a constant dotted name."""
    connection.execute(
        insert(audit).values(unix_ns=unix_ns, actor=actor, via=via, action=action, subject=subject, detail=dict(detail))
    )


def resolve_node(connection: Connection, name: str) -> Row[Any]:
    """The node of that UUID, alias or cluster/alias; those of revoked agents only when no other matches.

    Raises PreconditionError node.not_found, ConfigError usage.invalid for an ambiguous alias.
    """
    cluster, _, alias = name.rpartition("/")
    wanted = (nodes.c.id == name) | ((nodes.c.alias == alias) & ((nodes.c.cluster == cluster) if cluster else True))
    query = select(nodes, agents.c.status.label("agent_status")).join(agents, agents.c.id == nodes.c.agent_id).where(wanted)
    rows = connection.execute(query.limit(16)).all()
    found = [row for row in rows if row.agent_status == "active"] or list(rows)
    if not found:
        raise PreconditionError("node.not_found", f"no node is called {name[:80]!r}", hint="see `pgherd nodes ls`")
    if len(found) > 1:
        choices = ", ".join(f"{row.cluster}/{row.alias} ({row.id})" for row in found[:4])
        raise ConfigError("usage.invalid", f"{name[:80]!r} names {len(found)} nodes", hint=f"take one of {choices}")
    return found[0]


def _insert(
    connection: Connection,
    now_unix_ns: int,
    offer: Offer,
    agent_id: str,
    *,
    actor: str,
    via: str,
    idempotency_key: str | None = None,
) -> None:
    """A new command, queued, and who issued it."""
    connection.execute(
        insert(commands).values(
            id=offer.command_id,
            seq=select(func.coalesce(func.max(commands.c.seq), 0) + 1).scalar_subquery(),
            node_id=offer.node_id,
            agent_id=agent_id,
            verb=verb_name(offer.verb),
            arguments=verb_to_json(offer.verb),
            actor=actor,
            via=via,
            idempotency_key=idempotency_key,
            epoch=offer.epoch,
            issued_unix_ns=offer.issued_unix_ns,
            accept_deadline_unix_ns=offer.issued_unix_ns + offer.accept_within_ms * 1_000_000,
            state=State.QUEUED.value,
        )
    )
    detail = {"node": offer.node_id, "verb": policy_name(offer.verb)}
    write_audit(connection, now_unix_ns, actor, via, "command.issued", offer.command_id, detail)


def _by_key(connection: Connection, key: str | None) -> tuple[str, Request] | None:
    if key is None:
        return None
    row = connection.execute(select(commands).where(commands.c.idempotency_key == key)).first()
    return None if row is None else (row.id, Request(row.node_id, verb_from_json(row.verb, row.arguments)))


def _open_on_node(connection: Connection, node_id: str) -> int:
    query = select(func.count()).select_from(commands).where(commands.c.node_id == node_id)
    return connection.execute(query.where(commands.c.state.in_([state.value for state in OPEN_STATES]))).scalar_one()


def _open_commands(connection: Connection, agent_id: str) -> list[OpenCommand]:
    query = select(commands).where(commands.c.agent_id == agent_id)
    rows = connection.execute(query.where(commands.c.state.in_([state.value for state in OPEN_STATES])))
    return [
        OpenCommand(row.id, row.seq, row.node_id, verb_from_json(row.verb, row.arguments), State(row.state)) for row in rows
    ]


def _rows(connection: Connection, ids: Sequence[str]) -> list[Row[Any]]:
    if not ids:
        return []
    return list(connection.execute(select(commands).where(commands.c.id.in_(ids)).order_by(commands.c.seq)).all())


def _row(connection: Connection, command_id: str) -> Row[Any] | None:
    return next(iter(_rows(connection, [command_id])), None)


def _offer(row: Row[Any], remaining_ns: int) -> Offer:
    """The offer with the time that is left; a wall clock that stepped back doesn't lengthen it."""
    whole_ns = row.accept_deadline_unix_ns - row.issued_unix_ns
    return Offer(
        command_id=row.id,
        node_id=row.node_id,
        verb=verb_from_json(row.verb, row.arguments),
        issued_unix_ns=row.issued_unix_ns,
        accept_within_ms=max(1, min(remaining_ns, whole_ns) // 1_000_000),
        actor=row.actor,
        epoch=row.epoch,
    )


def life_of(connection: Connection, row: Row[Any]) -> Life:
    """Fold a command's row and its events anew."""
    events = connection.execute(select(command_events).where(command_events.c.command_id == row.id))
    noted = Life(
        offered_unix_ns=row.offered_unix_ns, expired_unix_ns=row.expired_unix_ns, forgotten_unix_ns=row.forgotten_unix_ns
    )
    return fold([Reported(Event(e.command_id, e.sequence, e.unix_ns, e.kind, e.body)) for e in events], noted)


def _append(connection: Connection, event: Event, now_unix_ns: int) -> bool:
    """Keep the event unless it is known; of progress only the newest is kept, which bounds the table."""
    mine = command_events.c.command_id == event.command_id
    if event.kind == "progress":
        older = delete(command_events).where(mine, command_events.c.kind == "progress")
        newest = connection.execute(
            select(func.max(command_events.c.sequence)).where(mine, command_events.c.kind == "progress")
        ).scalar()
        if newest is not None and newest >= event.sequence:
            return False
        connection.execute(older)
    elif connection.execute(select(func.count()).select_from(command_events).where(mine)).scalar_one() >= _EVENTS_MAX:
        known = select(command_events.c.sequence).where(mine, command_events.c.sequence == event.sequence)
        if connection.execute(known).first() is None:
            raise PeerError("peer.protocol", "more events than a command can have", command_id=event.command_id)
    added = connection.execute(
        upsert(command_events)
        .values(
            command_id=event.command_id,
            sequence=event.sequence,
            kind=event.kind,
            unix_ns=event.unix_ns,
            received_unix_ns=now_unix_ns,
            body=dict(event.body),
        )
        .on_conflict_do_nothing()
    )
    return bool(added.rowcount)


def _apply(connection: Connection, row: Row[Any], inputs: Sequence[Input]) -> Life:
    """Refold the command, take `inputs` on top, and write what follows into its row."""
    life = life_of(connection, row)
    for given in inputs:
        life = step(life, given)
    connection.execute(
        update(commands)
        .where(commands.c.id == row.id)
        .values(
            state=life.state.value,
            offered_unix_ns=life.offered_unix_ns,
            accepted_unix_ns=life.accepted.unix_ns if life.accepted else None,
            expired_unix_ns=life.expired_unix_ns,
            forgotten_unix_ns=life.forgotten_unix_ns,
            finished_unix_ns=life.finished_unix_ns,
            last_sequence=life.last_sequence,
            progress=dict(life.progress.body) if life.progress else None,
            result=_plain(life.result()),
            error=_plain(life.error()),
        )
    )
    return life


def _plain(members: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if members is None else dict(members)


def _check_bounds(event: Event) -> None:
    if not 1 <= event.sequence <= _SEQUENCE_MAX:
        raise PeerError("peer.protocol", f"event sequence {event.sequence} is out of range")
    body_bytes = len(json.dumps(dict(event.body)))
    if body_bytes > _BODY_BYTES_MAX:
        raise PeerError("peer.protocol", f"an event of {body_bytes} bytes; at most {_BODY_BYTES_MAX}")


def _check_result(row: Row[Any], event: Event) -> None:
    if event.kind == "succeeded" and _RESULT_MEMBER[row.verb] not in event.body:
        raise PeerError("peer.protocol", f"the result isn't one of {row.verb}", command_id=event.command_id)


def _foreign(agent_id: str, command_id: str) -> DeniedError:
    return DeniedError("identity.mismatch", "the command belongs to another agent", agent_id=agent_id, command_id=command_id)


def _take_in(connection: Connection, now_unix_ns: int, agent_id: str, event: Event) -> Row[Any] | None:
    """The new row of a command that the agent issued to itself, if the event says so and the node is its own."""
    members = event.body.get("issued_here")
    if event.kind != "accepted" or members is None:
        return None
    offer = Offer.from_json(members)
    owned = select(nodes.c.id).where(nodes.c.id == offer.node_id, nodes.c.agent_id == agent_id)
    if offer.command_id != event.command_id or connection.execute(owned).first() is None:
        return None
    _insert(connection, now_unix_ns, offer, agent_id, actor=f"agent:{agent_id}", via="schedule")
    return _row(connection, offer.command_id)


def _keep_unknown(connection: Connection, now_unix_ns: int, agent_id: str, event: Event) -> None:
    detail = {"kind": event.kind, "sequence": event.sequence, "unix_ns": event.unix_ns, "body": dict(event.body)}
    write_audit(connection, now_unix_ns, f"agent:{agent_id}", "grpc", "command.unknown_event", event.command_id, detail)

"""Identities in the control store: their certificates, their standing, their end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import Connection, delete, func, insert, select, update

from pgherd.collector.identity.audit import write_audit
from pgherd.collector.identity.ca import Issued
from pgherd.collector.identity.peer import PeerKind, Standing
from pgherd.proto.errors import PreconditionError
from pgherd.storage.control.schema import agents, certificates
from pgherd.storage.control.store import ControlStore

_SERIALS_PER_QUERY = 500  # SQLite's own limit of variables is 32 766; a long IN list isn't faster


class StoredStandings:
    """`StandingSource` on the control store."""

    def __init__(self, store: ControlStore) -> None:
        self._store = store

    def standings(self, serials: Sequence[str]) -> Mapping[str, Standing]:
        found: dict[str, Standing] = {}
        with self._store.read() as connection:
            for start in range(0, len(serials), _SERIALS_PER_QUERY):
                rows = connection.execute(
                    select(certificates.c.serial, certificates.c.revoked_unix_ns, agents.c.status)
                    .join(agents, agents.c.id == certificates.c.agent_id)
                    .where(certificates.c.serial.in_(serials[start : start + _SERIALS_PER_QUERY]))
                )
                for serial, revoked_unix_ns, status in rows:
                    found[serial] = Standing.REVOKED if revoked_unix_ns is not None else Standing(status)
        return found


def add_identity(
    connection: Connection,
    *,
    subject_id: str,
    kind: PeerKind,
    name: str,
    labels: Mapping[str, str],
    facts: Mapping[str, object],
    now_unix_ns: int,
) -> None:
    """A new active agent or client."""
    connection.execute(
        insert(agents).values(
            id=subject_id,
            kind=kind.value,
            name=name,
            status=Standing.ACTIVE.value,
            labels=dict(labels),
            facts=dict(facts),
            joined_unix_ns=now_unix_ns,
        )
    )


def add_certificate(connection: Connection, subject_id: str, issued: Issued, now_unix_ns: int) -> None:
    """Make a certificate's serial known."""
    connection.execute(
        insert(certificates).values(
            serial=issued.serial,
            agent_id=subject_id,
            not_before_unix_ns=issued.not_before_unix_ns,
            not_after_unix_ns=issued.not_after_unix_ns,
            issued_unix_ns=now_unix_ns,
            public_key_sha256=issued.public_key_sha256,
        )
    )


def replace_certificate(connection: Connection, old_serial: str, issued: Issued, now_unix_ns: int) -> str | None:
    """Note that `issued` follows `old_serial`; returns the serial of an earlier follower, which is revoked.

    A certificate that is renewed twice lost its first follower on the way (the agent died before it could
    store it), or somebody has a copy of the key. Either way only one line goes on, and it shows.
    """
    earlier: str | None = connection.execute(
        select(certificates.c.replaced_by).where(certificates.c.serial == old_serial)
    ).scalar_one()
    while earlier is not None:
        following = connection.execute(
            select(certificates.c.serial, certificates.c.replaced_by).where(certificates.c.serial == earlier)
        ).one_or_none()
        if following is None:
            break
        connection.execute(
            update(certificates)
            .where(certificates.c.serial == following.serial, certificates.c.revoked_unix_ns.is_(None))
            .values(revoked_unix_ns=now_unix_ns)
        )
        if following.replaced_by is None:
            break
        earlier = following.replaced_by
    connection.execute(update(certificates).where(certificates.c.serial == old_serial).values(replaced_by=issued.serial))
    return earlier


def forget_certificates(connection: Connection, subject_id: str, before_unix_ns: int) -> None:
    """Drop rows of certificates that can't even be renewed any more, so that the table stays bounded."""
    connection.execute(
        delete(certificates).where(certificates.c.agent_id == subject_id, certificates.c.not_after_unix_ns < before_unix_ns)
    )


def list_clients(connection: Connection, *, limit: int = 1000) -> list[dict[str, object]]:
    """The newest foreign OTLP clients; `not_after_unix_ns` is when the last certificate that still holds ends, if any."""
    holds = (certificates.c.agent_id == agents.c.id) & certificates.c.revoked_unix_ns.is_(None)
    rows = connection.execute(
        select(
            agents.c.id,
            agents.c.name,
            agents.c.status,
            agents.c.joined_unix_ns.label("issued_unix_ns"),
            agents.c.revoked_unix_ns,
            func.max(certificates.c.not_after_unix_ns).label("not_after_unix_ns"),
        )
        .join(certificates, holds, isouter=True)
        .where(agents.c.kind == PeerKind.CLIENT.value)
        .group_by(agents.c.id)
        .order_by(agents.c.joined_unix_ns.desc(), agents.c.id)
        .limit(limit)
    )
    return [dict(row) for row in rows.mappings()]


def revoke_agent(store: ControlStore, agent_id: str, *, now_unix_ns: int, actor: str, via: str, reason: str = "") -> int:
    """End an agent's (or client's) identity for good; returns how many certificates were revoked now.

    Tell the gate afterwards (`PeerGate.cut`); without that it finds out within its recheck time. Revoking
    twice is no error. Raises PreconditionError agent.not_found.
    """
    with store.begin() as connection:
        if connection.execute(select(agents.c.id).where(agents.c.id == agent_id)).one_or_none() is None:
            raise PreconditionError("agent.not_found", f"no agent has the id {agent_id}", hint="see `pgherd agents ls`")
        connection.execute(
            update(agents)
            .where(agents.c.id == agent_id, agents.c.revoked_unix_ns.is_(None))
            .values(status=Standing.REVOKED.value, revoked_unix_ns=now_unix_ns)
        )
        revoked = connection.execute(
            update(certificates)
            .where(certificates.c.agent_id == agent_id, certificates.c.revoked_unix_ns.is_(None))
            .values(revoked_unix_ns=now_unix_ns)
        ).rowcount
        write_audit(
            connection,
            unix_ns=now_unix_ns,
            actor=actor,
            via=via,
            action="agent.revoked",
            subject=agent_id,
            certificates=revoked,
            reason=reason[:200],
        )
    return revoked

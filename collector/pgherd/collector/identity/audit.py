"""The audit trail's one writer: who did what to which identity, token or command, in the same transaction as the deed."""

from __future__ import annotations

from sqlalchemy import Connection, insert

from pgherd.storage.control.schema import audit


def write_audit(
    connection: Connection,
    *,
    unix_ns: int,
    actor: str,
    via: str,
    action: str,
    subject: str,
    **detail: str | int | float | bool | None,
) -> None:
    """Append a row. `action` is a constant dotted name, `subject` an id; no secrets in `detail`."""
    connection.execute(
        insert(audit).values(unix_ns=unix_ns, actor=actor[:255], via=via, action=action, subject=subject[:255], detail=detail)
    )

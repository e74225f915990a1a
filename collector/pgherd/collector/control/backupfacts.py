"""What the outcome of a command proves about a backup, kept in the control store beside the command itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, select, update
from sqlalchemy.dialects.sqlite import insert as upsert

from pgherd.proto.commands import GRADES, Event
from pgherd.storage.control.schema import backups


def keep_backup_facts(
    connection: Connection, node_id: str, verb: str, arguments: Mapping[str, Any], event: Event, now_unix_ns: int
) -> None:
    """What an outcome proves about a backup.

    A grade only rises with a success: an older, lower proof takes nothing away. Found damage takes all
    of it away, with the reason among the warnings.
    """
    body = event.body
    if verb == "backup.run" and event.kind == "succeeded":
        members = ("system_identifier", "started_unix_ns", "finished_unix_ns", "stored_bytes", "databases", "complete")
        facts = {name: body[name] for name in members}
        facts |= {"warnings": body["warnings"], "grade": body["grade"], "graded_unix_ns": now_unix_ns}
        row = upsert(backups).values(node_id=node_id, name=body["name"], **facts)
        connection.execute(row.on_conflict_do_nothing())
    if verb not in ("backup.verify", "restore"):
        return
    context = body.get("context", {})
    name = body.get("backup") or (context.get("backup") if isinstance(context, Mapping) else "") or arguments.get("backup")
    mine = (backups.c.node_id == node_id) & (backups.c.name == name)
    known = connection.execute(select(backups).where(mine)).first()
    if known is None:
        return  # taken before this collector knew the node; the command's own result still tells
    proven: dict[str, Any] = {}
    if event.kind == "succeeded":
        if GRADES.index(body["grade"]) > GRADES.index(known.grade):
            proven |= {"grade": body["grade"], "graded_unix_ns": now_unix_ns}
        if verb == "restore":
            proven["restore_duration_s"] = body["duration_s"]
    elif body.get("code") in ("backup.corrupt", "backup.content_differs"):
        warnings = [*known.warnings, f"{body['code']}: {body['message']}"]
        proven = {"grade": GRADES[0], "graded_unix_ns": now_unix_ns, "warnings": warnings}
    if proven:
        connection.execute(update(backups).where(mine).values(**proven))

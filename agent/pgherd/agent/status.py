"""status.json: how the agent is, for people and scripts on its host, also while the collector is away.

Replaced whole every few seconds without fsync: it is news, not memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from pgherd.agent.node import NodeStatus
from pgherd.agent.telemetry.ship import ShipStatus
from pgherd.proto.clock import Clock
from pgherd.proto.errors import PgherdError, PreconditionError
from pgherd.runtime.durable import read_json, storage_error
from pgherd.runtime.queue.spool import SpoolStatus

FORMAT = "pgherd.status"
VERSION = 1


class StatusFile:
    """The writing side."""

    INTERVAL_S: ClassVar[float] = 2.0

    def __init__(self, path: Path, clock: Clock) -> None:
        self._path = path
        self._clock = clock

    def write(
        self,
        *,
        agent_id: str | None,
        connected: bool | None,
        skew_ns: int | None,
        nodes: Sequence[NodeStatus],
        next_backup_unix_ns: Mapping[str, int],
        spool: SpoolStatus,
        ship: ShipStatus | None,
        commands_running: int,
        commands_disabled: PgherdError | None,
    ) -> None:
        """Replace the file. Raises TransientError disk.*."""
        counts = spool.counts
        document: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "written_unix_ns": self._clock.wall_unix_ns(),
            "agent_id": agent_id,
            "connected": connected,
            "skew_ns": skew_ns,
            "nodes": [asdict(node) for node in nodes],
            "next_backup_unix_ns": dict(next_backup_unix_ns),
            "spool": {
                **asdict(counts),
                "sampled_points": counts.sampled_points,
                "dropped_points": counts.refused_points + counts.evicted_points + counts.lost_points + counts.poisoned_points,
                "waiting_points": counts.spooled_points
                - counts.acked_points
                - counts.evicted_points
                - counts.lost_points
                - counts.poisoned_points,
                "size_bytes": spool.size_bytes,
                "pending_batches": spool.pending_batches,
                "oldest_unix_ns": spool.oldest_unix_ns,
            },
            "shipping": asdict(ship) if ship else None,
            "commands_running": commands_running,
            "commands_disabled": commands_disabled.as_dict() if commands_disabled else None,
        }
        temporary = self._path.with_name(".tmp-status.json")
        try:
            temporary.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            temporary.replace(self._path)
        except OSError as error:
            raise storage_error(error, self._path, "writing") from error


def read_status(path: Path) -> dict[str, Any]:
    """The newest status. Raises PreconditionError agent.not_found when the agent never ran here, IntegrityError format.*."""
    try:
        return read_json(path, format_name=FORMAT, newest_version=VERSION)
    except FileNotFoundError as error:
        raise PreconditionError(
            "agent.not_found", f"no agent has run with the state directory {path.parent}", hint="start it: `pgherd-agent run`"
        ) from error

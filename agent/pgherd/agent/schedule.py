"""Scheduled backups: by the agent's own clock and memory, whether a collector is there or not.

Never broken (of `due_unix_ns`, which is pure):
- a node is due at once when it never had a scheduled backup, or when its last one lies in the future
  (the clock was set back);
- runs that were missed while the agent was away are made up for by one;
- after a failure the next try comes sooner, but never at once.

A standby isn't backed up by schedule: its primary has the same content, and long snapshots conflict with replay.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from pgherd.agent.command.executor import Executor
from pgherd.agent.node import NodeStatus
from pgherd.proto.clock import Clock
from pgherd.proto.commands import BackupRun
from pgherd.proto.errors import IntegrityError, PgherdError
from pgherd.runtime.durable import publish_json, read_json
from pgherd.runtime.logging import get_logger

_FORMAT: Final = "pgherd.schedule"
_VERSION: Final = 1
_TURN_S: Final = 1.0
_RETRY_SHARE: Final = 6  # a failed backup is tried again after a sixth of the interval …
_RETRY_S_MIN: Final = 60.0  # … but not sooner than this

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class LastRun:
    """The last scheduled backup of a node: when it was started, and whether it succeeded."""

    started_unix_ns: int
    succeeded: bool


def due_unix_ns(last: LastRun | None, interval_s: float, now_unix_ns: int) -> int:
    """When the next scheduled backup is due; not later than now means now. Pure."""
    if last is None or last.started_unix_ns > now_unix_ns:
        return now_unix_ns
    pause_s = interval_s if last.succeeded else min(interval_s, max(_RETRY_S_MIN, interval_s / _RETRY_SHARE))
    return last.started_unix_ns + int(pause_s * 1e9)


class BackupSchedule:
    """Starts backups when they are due. What was started is on disk before it runs: a crash doesn't repeat it at once."""

    def __init__(
        self,
        path: Path,
        interval_s: float,
        nodes: Mapping[str, Callable[[], NodeStatus]],
        executor: Executor,
        clock: Clock,
    ) -> None:
        """`path` keeps the last runs (schedule.json, format v1); `nodes` maps node UUIDs to their status."""
        self._path = path
        self._interval_s = interval_s
        self._nodes = nodes
        self._executor = executor
        self._clock = clock
        self._last = _read(path)
        self._running: dict[str, asyncio.Task[None]] = {}

    def next_unix_ns(self, node_id: str) -> int:
        """When the node is due next, for status.json."""
        return due_unix_ns(self._last.get(node_id), self._interval_s, self._clock.wall_unix_ns())

    async def run(self) -> None:
        """Until cancelled. A node's backup never overlaps its own predecessor."""
        while True:
            for node_id, status in self._nodes.items():
                node = status()
                if node.observed_unix_ns and node.role != "standby" and node_id not in self._running and self._due(node_id):
                    task = asyncio.create_task(self._back_up(node_id, node.alias), name=f"schedule-{node.alias}")
                    self._running[node_id] = task
                    task.add_done_callback(lambda _, node_id=node_id: self._running.pop(node_id, None))  # type: ignore[misc]
            await asyncio.sleep(_TURN_S)

    def _due(self, node_id: str) -> bool:
        return self.next_unix_ns(node_id) <= self._clock.wall_unix_ns()

    async def _back_up(self, node_id: str, alias: str) -> None:
        run = LastRun(self._clock.wall_unix_ns(), succeeded=False)
        self._last[node_id] = run
        try:
            await asyncio.to_thread(self._keep)
            command_id = await self._executor.issue(node_id, BackupRun(), by="schedule")
            outcome = await self._executor.wait(command_id)
        except PgherdError as error:
            _log.error("schedule.backup_not_started", node=alias, code=error.code, error=error.message)
            return
        if outcome is None:
            return  # the agent stops; the command is in the journal
        error_of = outcome.error()
        if error_of is not None:
            _log.error("schedule.backup_failed", node=alias, code=error_of.code, error=error_of.message)
            return
        self._last[node_id] = replace(run, succeeded=True)
        try:
            await asyncio.to_thread(self._keep)
        except PgherdError as error:  # at worst the next one comes sooner
            _log.warning("schedule.not_kept", code=error.code)

    def _keep(self) -> None:
        runs = {
            node_id: {"started_unix_ns": last.started_unix_ns, "succeeded": last.succeeded}
            for node_id, last in self._last.items()
        }
        publish_json(self._path, {"format": _FORMAT, "version": _VERSION, "runs": runs})


def _read(path: Path) -> dict[str, LastRun]:
    """Raises IntegrityError format.newer; a damaged file only means that backups come sooner than needed."""
    try:
        document = read_json(path, format_name=_FORMAT, newest_version=_VERSION)
        runs = document["runs"]
        assert isinstance(runs, dict)
        return {node_id: LastRun(int(run["started_unix_ns"]), bool(run["succeeded"])) for node_id, run in runs.items()}
    except FileNotFoundError:
        return {}
    except IntegrityError as error:
        if error.code == "format.newer":
            raise
    except (KeyError, TypeError, ValueError, AssertionError):
        pass
    _log.warning("schedule.unreadable", path=str(path))
    return {}

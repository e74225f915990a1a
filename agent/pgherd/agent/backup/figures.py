"""Backups and drills as samples: what the verbs recorded (outcomes.py), every minute, whatever the server does.

Never broken: a time is absent until there was one; a failure is stated until its verb has succeeded again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Final

from pgherd.agent.backup.outcomes import Outcomes, outcome_directory, read_outcomes
from pgherd.agent.config import BackupConfig
from pgherd.agent.node import NodeStatus
from pgherd.agent.telemetry.emit import Emitter
from pgherd.proto.clock import Clock
from pgherd.proto.samples import Metric, MetricKind, Sample
from pgherd.runtime.logging import get_logger

_SOURCE: Final = "backups"
_INTERVAL_S: Final = 60.0
_LOOK_S: Final = 1.0  # a backup that has just ended is told at once
_FIRST_AFTER_S: Final = 1.0
_GAUGE: Final = MetricKind.GAUGE
ENABLED: Final = Metric("pgherd_backup_enabled", _GAUGE, "Whether this agent backs the node up by schedule (a standby: no)")
INTERVAL: Final = Metric("pgherd_backup_interval_seconds", _GAUGE, "Time between scheduled backups", "s")
SUCCESS: Final = Metric(
    "pgherd_backup_last_success_timestamp_seconds", _GAUGE, "Time of the snapshot that the last published backup holds", "s"
)
COMPLETE: Final = Metric("pgherd_backup_last_complete", _GAUGE, "Whether the last published backup holds everything")
DURATION: Final = Metric(
    "pgherd_backup_last_duration_seconds", _GAUGE, "Duration of the last backup, reading back included", "s"
)
SIZE: Final = Metric("pgherd_backup_last_size_bytes", _GAUGE, "Stored size of the last backup", "By")
VERIFIED: Final = Metric(
    "pgherd_backup_last_verified_timestamp_seconds", _GAUGE, "When a backup was last read back whole and found good", "s"
)
RESTORED: Final = Metric(
    "pgherd_backup_last_restored_timestamp_seconds", _GAUGE, "When a backup was last proven by restoring it", "s"
)
RESTORE_DURATION: Final = Metric(
    "pgherd_backup_restore_duration_seconds", _GAUGE, "Duration of the last restore that proved a backup", "s"
)
FAILURE: Final = Metric(
    "pgherd_backup_last_failure_timestamp_seconds", _GAUGE, "When the verb last failed; absent once it succeeded again", "s"
)
_READ_BACK: Final = ("read back", "checked", "content-equal")
_RESTORED: Final = ("checked", "content-equal")

_log = get_logger(__name__)


def outcome_samples(outcomes: Outcomes) -> list[Sample]:
    """What recorded outcomes say. Pure."""
    samples: list[Sample] = []
    taken = outcomes.succeeded.get("run")
    if taken is not None:
        samples += [
            Sample(SUCCESS, {"kind": "logical"}, taken.data_unix_ns / 1e9),
            Sample(COMPLETE, {}, 1.0 if taken.complete else 0.0),
            Sample(DURATION, {}, taken.duration_s),
            Sample(SIZE, {}, float(taken.stored_bytes)),
        ]
    verified = [one.finished_unix_ns for one in outcomes.succeeded.values() if one.grade in _READ_BACK]
    if verified:
        samples.append(Sample(VERIFIED, {}, max(verified) / 1e9))
    restored = outcomes.succeeded.get("restore")
    if restored is not None and restored.grade in _RESTORED:
        samples.append(Sample(RESTORED, {}, restored.finished_unix_ns / 1e9))
        samples.append(Sample(RESTORE_DURATION, {}, restored.duration_s))
    for verb, failed_unix_ns in outcomes.failed_unix_ns.items():
        success = outcomes.succeeded.get(verb)
        if success is None or success.finished_unix_ns < failed_unix_ns:
            samples.append(Sample(FAILURE, {"verb": verb}, failed_unix_ns / 1e9))
    return samples


class BackupFigures:
    """One node's backups. `run` it as a task beside the node's sampler, whose emitter it shares."""

    def __init__(
        self,
        settings: BackupConfig,
        state_directory: Path,
        *,
        emitter: Emitter,
        status: Callable[[], NodeStatus],
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._directory = outcome_directory(state_directory, status().node_id)
        self._emitter = emitter
        self._status = status
        self._clock = clock
        self._standby = False  # as last known: a server that is down keeps its role in this

    async def run(self) -> None:
        """Every minute and after each verb's end, until cancelled."""
        await asyncio.sleep(_FIRST_AFTER_S)  # so that the role is known
        while True:
            stated = self._mark()  # before looking: what comes while we look is seen the next time
            try:
                await self.state()
            except Exception:  # noqa: BLE001 - the loop's guard: one unreadable minute isn't the end of all
                _log.exception("backup.figures_failed", node=self._status().alias)
            for _ in range(int(_INTERVAL_S / _LOOK_S)):
                await asyncio.sleep(_LOOK_S)
                if self._mark() != stated:
                    break

    def _mark(self) -> int:
        """Changes with every recorded outcome: its file is published by a rename into the directory."""
        try:
            return self._directory.stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    async def state(self) -> None:
        """One batch with what is known now."""
        role = self._status().role
        if role != "unknown":
            self._standby = role == "standby"
        enabled = self._settings.enabled and not self._standby
        outcomes = await asyncio.to_thread(read_outcomes, self._directory)
        samples = [
            Sample(ENABLED, {}, 1.0 if enabled else 0.0),
            *([Sample(INTERVAL, {}, self._settings.interval)] if enabled else []),
            *outcome_samples(outcomes),
        ]
        await self._emitter.emit({_SOURCE: samples}, self._clock.wall_unix_ns())

"""Carrying out a retention plan (storage/retention.py decides, purely)."""

from __future__ import annotations

import contextlib

from pgherd.agent.backup.repository import NodeRepository
from pgherd.proto.errors import PreconditionError
from pgherd.runtime.logging import get_logger
from pgherd.storage.retention import Decision, plan

_log = get_logger(__name__)


def retain(repository: NodeRepository, keep: int) -> tuple[Decision, ...]:
    """Delete what the plan gives up; every decision with its reason. Hold `repository.writing()`."""
    decisions = plan(repository.retention_items(), keep)
    for decision in decisions:
        if not decision.keep:
            # A reader who came after the plan was made keeps it until the next run.
            with contextlib.suppress(PreconditionError), repository.reading(decision.name):
                repository.delete(decision.name)
                _log.info("backup.deleted", backup=decision.name, reason=decision.reason)
    return decisions

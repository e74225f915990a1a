"""Small things that several tests of the spool share."""

from __future__ import annotations

from pathlib import Path

from pgherd.agent.config import SpoolConfig
from pgherd.runtime.clock import SystemClock
from pgherd.runtime.queue.spool import Batch, Spool


def open_spool(directory: Path, *, size_max: int = 1 << 20, segment_max: int = 4096) -> Spool:
    return Spool.open(directory, SpoolConfig(size_max=size_max, segment_max=segment_max), SystemClock())


def drain(spool: Spool) -> list[Batch]:
    """Take everything that waits, acknowledging it."""
    taken = []
    while (batch := spool.head()) is not None:
        taken.append(batch)
        spool.release(batch, "acked")
    return taken


def is_balanced(spool: Spool) -> bool:
    """Whether every sampled point is somewhere."""
    counts = spool.status.counts
    return counts.sampled_points == counts.acked_points + counts.dropped_points + counts.pending_points

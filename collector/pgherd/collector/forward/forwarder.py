"""The queue of each destination and the loop that empties it.

`tap` appends what a commit is about to store, in the writer's thread, and never fails it: what a queue can't hold is
dropped there, the oldest first, and counted. The loops send in order, several records at once when many wait; a request
that is refused is sent again record by record, and the one that it is about set aside.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pgherd.collector.config import ForwardConfig
from pgherd.collector.forward.destination import Answer, Destination, DestinationConfig, destination_of
from pgherd.collector.forward.record import records
from pgherd.proto.clock import Clock
from pgherd.proto.errors import ConfigError
from pgherd.runtime.durable import private_directory
from pgherd.runtime.logging import get_logger
from pgherd.runtime.queue.spool import Batch, Spool
from pgherd.storage.series.batch import Rows

_NAME_RE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_SEGMENTS = 16  # of a full queue: so much of it is dropped at once

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Pace:
    """How much goes at once, and how patient a loop is."""

    records_max: int = 32
    bytes_max: int = 1024 * 1024
    backoff_min_s: float = 0.5
    backoff_max_s: float = 60.0
    idle_poll_s: float = 30.0


@dataclass(frozen=True, slots=True)
class ForwardStatus:
    """How one destination stands; points are counted since its queue was made."""

    name: str
    sent_points: int
    dropped_points: int  # too many, too old, or unreadable
    failed_points: int  # refused by the receiver
    queue_bytes: int
    lag_s: float  # age of the oldest that waits


@dataclass(slots=True)
class _Line:
    """One destination."""

    name: str
    queue: Spool
    destination: Destination
    age_max_s: float
    news: asyncio.Event = field(default_factory=asyncio.Event)
    failures_in_row: int = 0
    suspect_until: int = 0  # sequences up to this one go alone
    rejected_points: int = 0  # inside requests that were taken


class Forwarder:
    """All destinations. Open before the store whose tap it is, close after it."""

    def __init__(self, lines: Sequence[_Line], clock: Clock, pace: Pace, jitter: Callable[[], float] = random.random) -> None:
        self._lines, self._clock, self._pace, self._jitter = lines, clock, pace, jitter
        self._loop: asyncio.AbstractEventLoop | None = None

    @classmethod
    def open(cls, directory: Path, config: ForwardConfig, clock: Clock, pace: Pace | None = None) -> Forwarder:
        """Open every queue. Raises ConfigError config.*, and as `Spool.open`."""
        lines: list[_Line] = []
        forwarder = cls(lines, clock, pace or Pace())
        configured: list[DestinationConfig] = [*config.remote_write, *config.otlp]
        try:
            for one in configured:
                if _NAME_RE.fullmatch(one.name) is None or any(line.name == one.name for line in lines):
                    raise ConfigError("config.invalid", f"forward: {one.name!r} isn't a name, or is taken", key="forward")
                destination = destination_of(one, clock)
                bounds = _Bounds(one.queue_size, max(one.queue_size // _SEGMENTS, 64 * 1024))
                queue = Spool.open(private_directory(directory) / one.name, bounds, clock)
                lines.append(_Line(one.name, queue, destination, one.queue_age))
        except BaseException:
            forwarder.close()
            raise
        return forwarder

    @property
    def is_used(self) -> bool:
        return bool(self._lines)

    def tap(self, rows: Rows) -> None:
        """Keep what is about to be committed, for every destination. See pgherd.storage.series.batch.Tap."""
        for record, points in records(rows):
            for line in self._lines:
                line.queue.append(record, points)
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        for line in self._lines:
            line.news.set()

    def status(self) -> list[ForwardStatus]:
        """Every destination."""
        now_unix_ns = self._clock.wall_unix_ns()
        found = []
        for line in self._lines:
            status = line.queue.status
            counts, oldest_unix_ns = status.counts, status.oldest_unix_ns
            found.append(
                ForwardStatus(
                    line.name,
                    counts.acked_points - line.rejected_points,
                    counts.evicted_points + counts.refused_points + counts.lost_points,
                    counts.poisoned_points + line.rejected_points,
                    status.size_bytes,
                    max(0.0, (now_unix_ns - oldest_unix_ns) / 1e9) if oldest_unix_ns else 0.0,
                )
            )
        return found

    async def run(self) -> None:
        """Send until cancelled. Never raises for a receiver's sake."""
        self._loop = asyncio.get_running_loop()
        try:
            async with asyncio.TaskGroup() as tasks:
                for line in self._lines:
                    tasks.create_task(self._empty(line), name=f"forward-{line.name}")
                await asyncio.Event().wait()
        finally:
            self._loop = None
            for line in self._lines:
                await line.destination.close()

    def close(self) -> None:
        """Close the queues; what waits stays on disk."""
        for line in self._lines:
            line.queue.close()

    async def _empty(self, line: _Line) -> None:
        while True:
            line.news.clear()
            pause_s = await self.send_next(line)
            if pause_s is None:
                try:
                    await asyncio.wait_for(line.news.wait(), self._pace.idle_poll_s)
                except TimeoutError:
                    continue
            elif pause_s:
                await asyncio.sleep(pause_s)

    async def send_next(self, line: _Line) -> float | None:
        """Send the oldest records once; returns seconds to wait before the next, None when nothing waits."""
        batches = await asyncio.to_thread(line.queue.heads, self._pace.records_max, self._pace.bytes_max)
        if not batches:
            return None
        oldest_unix_ns = self._clock.wall_unix_ns() - int(line.age_max_s * 1e9)
        expired = tuple(itertools.takewhile(lambda batch: batch.appended_unix_ns < oldest_unix_ns, batches))
        if expired:
            await asyncio.to_thread(line.queue.release_all, expired, "expired")
            return 0.0
        if batches[0].sequence <= line.suspect_until:
            batches = batches[:1]
        answer = await line.destination.send(b"".join(batch.payload for batch in batches))
        return await self._settle(line, batches, answer)

    async def _settle(self, line: _Line, batches: Sequence[Batch], answer: Answer) -> float:
        match answer.verdict:
            case "sent":
                await asyncio.to_thread(line.queue.release_all, batches, "acked")
                if answer.rejected_points:
                    log.warning("forward.partly_rejected", destination=line.name, points=answer.rejected_points, why=answer.why)
                line.rejected_points += answer.rejected_points
                line.failures_in_row = 0
                return 0.0
            case "refused" if len(batches) > 1:
                line.suspect_until = batches[-1].sequence
                return 0.0
            case "refused":
                log.error("forward.refused", destination=line.name, points=batches[0].points, why=answer.why)
                await asyncio.to_thread(line.queue.release_all, batches, "poisoned")
                line.failures_in_row = 0
                return 0.0
            case "retry":
                line.failures_in_row += 1
                if line.failures_in_row in (1, 10, 100) or line.failures_in_row % 1000 == 0:
                    log.warning("forward.delayed", destination=line.name, why=answer.why, failures=line.failures_in_row)
                return answer.retry_after_s if answer.retry_after_s is not None else self._backoff_s(line)

    def _backoff_s(self, line: _Line) -> float:
        full = min(self._pace.backoff_max_s, self._pace.backoff_min_s * float(2 ** min(line.failures_in_row - 1, 16)))
        return full * (0.5 + 0.5 * self._jitter())


@dataclass(frozen=True, slots=True)
class _Bounds:
    size_max: int
    segment_max: int

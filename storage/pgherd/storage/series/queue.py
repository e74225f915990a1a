"""The bounded queue before the writer.

Overflow rule: the batch that doesn't fit is refused (ingest.overloaded) and its sender keeps it; nothing
queued is dropped. One batch is always let in when the queue is empty, whatever its size.
"""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future

from pgherd.proto.errors import TransientError
from pgherd.storage.series.batch import Batch, Receipt
from pgherd.storage.series.database import unavailable

Waiting = tuple[Batch, "Future[Receipt]"]


class CommitQueue:
    """Many threads put, the writer takes everything that waits."""

    def __init__(self, *, points_max: int, bytes_max: int) -> None:
        self._points_max, self._bytes_max = points_max, bytes_max
        self._waiting: deque[Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.points = 0
        self.size_bytes = 0

    def put(self, batch: Batch) -> Future[Receipt]:
        """Queue a batch. Raises TransientError ingest.overloaded | store.unavailable (closed)."""
        size = batch.size_bytes
        with self._changed:
            if self._closed:
                raise unavailable("the series store is shutting down")
            if self._waiting and (self.points + batch.points > self._points_max or self.size_bytes + size > self._bytes_max):
                raise TransientError(
                    "ingest.overloaded", "the series writer is behind", queued_points=self.points, queued_bytes=self.size_bytes
                )
            future: Future[Receipt] = Future()
            self._waiting.append((batch, future))
            self.points += batch.points
            self.size_bytes += size
            self._changed.notify()
            return future

    def take(self, *, points_max: int, timeout_s: float, linger_s: float = 0.0, linger_points: int = 0) -> list[Waiting]:
        """Everything that waits, up to `points_max` points but at least one batch; [] after the timeout or when closed.

        When few points wait it lingers for more: until `linger_points` wait, or `linger_s` are over.
        """
        taken: list[Waiting] = []
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed, timeout_s)
            if self._waiting and self.points < linger_points and linger_s > 0:
                self._changed.wait_for(lambda: self.points >= linger_points or self._closed, linger_s)
            points = 0
            while self._waiting and (not taken or points + self._waiting[0][0].points <= points_max):
                batch, future = self._waiting.popleft()
                points += batch.points
                self.size_bytes -= batch.size_bytes
                taken.append((batch, future))
            self.points -= points
        return taken

    def close(self) -> None:
        """Refuse what comes from now on; what waits is still handed out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def is_drained(self) -> bool:
        """Closed and empty."""
        with self._changed:
            return self._closed and not self._waiting

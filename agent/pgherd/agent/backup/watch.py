"""What is watched while a backup or a restore goes on: promise 1 says that it never causes the outage.

Two things can become harmful while we are busy in one long statement: the snapshot that holds back vacuum
and the locks that a waiting DDL statement (and everybody behind it) queues for; and the file system that
PostgreSQL may share with us. A thread looks at them; what it finds ends the work through the deadline.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg

from pgherd.agent.backup.deadline import Deadline
from pgherd.postgres.connection import Target, connect
from pgherd.proto.errors import PgherdError, PreconditionError, TransientError

XMIN_AGE_MAX = 100_000_000  # half of autovacuum_freeze_max_age: our snapshot never forces a freeze
_INTERVAL_S = 1.0
_JOIN_TIMEOUT_S = 30.0

# Waiters whose blocker is us and not somebody before us in the queue. waitstart exists since 14 only, so
# how long they wait is measured here.
_SERVER_SQL = """
SELECT (SELECT age(backend_xmin) FROM pg_stat_activity WHERE pid = %(pid)s),
       coalesce((SELECT array_agg(DISTINCT w.pid) FROM pg_locks w
                 WHERE NOT w.granted AND w.locktype = 'relation' AND %(pid)s = ANY (pg_blocking_pids(w.pid))), '{}')
"""


@contextlib.contextmanager
def watching(deadline: Deadline, look: Callable[[], None], interval_s: float = _INTERVAL_S) -> Iterator[None]:
    """Call `look` at once and then every `interval_s` in a thread; a PgherdError of it ends the deadline."""
    look()
    done = threading.Event()

    def loop() -> None:
        while not done.wait(interval_s):
            try:
                look()
            except PgherdError as error:
                deadline.end(error)
                return

    thread = threading.Thread(target=loop, name="pgherd-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(_JOIN_TIMEOUT_S)


def require_free(path: Path, free_min_bytes: int, expected_bytes: int = 0) -> None:
    """Raises TransientError disk.full when the file system of `path` has, or would have, less than that left."""
    while not path.exists():  # it will be made there
        path = path.parent
    free_bytes = shutil.disk_usage(path).free
    if free_bytes - expected_bytes < free_min_bytes:
        need = f" and about {expected_bytes} are needed" if expected_bytes else ""
        raise TransientError(
            "disk.full",
            f"{free_bytes} bytes are free at {path}{need}; {free_min_bytes} stay free for others (backup.free_min)",
            hint=f"free space on the file system of {path}, or keep fewer backups",
            free_bytes=free_bytes,
        )


class SnapshotWatch:
    """Looks at the backend that holds a dump's snapshot and locks, through a connection of its own."""

    def __init__(
        self,
        target: Target,
        dbname: str,
        pid: int,
        give_way_after_s: float,
        deadline: Deadline,
        xmin_age_max: int = XMIN_AGE_MAX,
    ) -> None:
        self._target, self._dbname, self._pid = target, dbname, pid
        self._xmin_age_max = xmin_age_max
        self._give_way_after_s = give_way_after_s
        self._deadline = deadline
        self._stack = contextlib.ExitStack()
        self._connection: psycopg.Connection[Any] | None = None
        self._waiting_since_mono_s: dict[int, float] = {}

    def __enter__(self) -> SnapshotWatch:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def look(self) -> None:
        """Raises PreconditionError postgres.failed (snapshot too old) | TransientError backup.gave_way."""
        try:
            if self._connection is None:
                self._connection = self._stack.enter_context(connect(self._target, self._dbname))
                self._stack.enter_context(self._deadline.over_connection(self._connection))
            xmin_age, waiters = self._connection.execute(_SERVER_SQL, {"pid": self._pid}).fetchall()[0]
        except (PgherdError, psycopg.Error):  # no slot for a look now: the deadline still bounds us
            self._connection = None
            self._stack.close()
            return
        require_young(xmin_age, self._xmin_age_max)
        now_mono_s = time.monotonic()
        self._waiting_since_mono_s = {pid: self._waiting_since_mono_s.get(pid, now_mono_s) for pid in waiters}
        longest_s = now_mono_s - min(self._waiting_since_mono_s.values(), default=now_mono_s)
        if longest_s >= self._give_way_after_s and waiters:
            raise TransientError(
                "backup.gave_way",
                f"a session waited {longest_s:.1f} s in database {self._dbname} for a table that the backup reads",
                hint="it is tried again later; back up while no migration runs, or state a longer backup.give_way_after",
                sessions=len(waiters),
            )


def require_young(xmin_age: int | None, xmin_age_max: int) -> None:
    """Raises PreconditionError postgres.failed when a snapshot of that age must end."""
    if xmin_age is not None and xmin_age > xmin_age_max:
        raise PreconditionError(
            "postgres.failed",
            f"the backup's snapshot is {xmin_age} transactions old and holds back vacuum",
            hint="back up at a quieter time or from a standby; nothing was published",
            xmin_age=xmin_age,
        )

"""Cuts off readers that take too long: one thread for all of them, since a timer each costs every query a thread's start."""

from __future__ import annotations

import threading

import duckdb

from pgherd.proto.clock import Clock


class OverdueReaders:
    """Interrupts each watched cursor `timeout_s` after it was watched. Safe from any thread.

    All have the same timeout, so a reader that comes while the thread sleeps is never due before it wakes: coming and going
    wakes nobody.
    """

    def __init__(self, timeout_s: float, clock: Clock) -> None:
        self._timeout_s = timeout_s
        self._clock = clock
        self._changed = threading.Condition()
        self._due_mono_s: dict[duckdb.DuckDBPyConnection, float] = {}
        self._closed = False
        self._thread: threading.Thread | None = None

    def watch(self, cursor: duckdb.DuckDBPyConnection) -> None:
        """Interrupt the cursor unless it is released in time."""
        with self._changed:
            self._due_mono_s[cursor] = self._clock.mono_s() + self._timeout_s
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="series-overdue", daemon=True)
                self._thread.start()

    def release(self, cursor: duckdb.DuckDBPyConnection) -> None:
        """The cursor is done; after this it is never interrupted."""
        with self._changed:
            self._due_mono_s.pop(cursor, None)

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        with self._changed:
            while not self._closed:
                now_mono_s = self._clock.mono_s()
                for cursor in [cursor for cursor, due in self._due_mono_s.items() if due <= now_mono_s]:
                    del self._due_mono_s[cursor]
                    cursor.interrupt()
                next_mono_s = min(self._due_mono_s.values(), default=now_mono_s + self._timeout_s)
                self._changed.wait(max(0.0, next_mono_s - now_mono_s))

"""One end over many blocking steps: whatever is being waited for is broken when the time is up, or when a
watcher finds that going on would harm somebody."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from psycopg import Connection

from pgherd.proto.errors import PgherdError, TransientError
from pgherd.runtime.process import Child


class Deadline:
    """Started on entry; when the time is up or `end` is called, registered children are ended and connections cut.

    The block then leaves with the cause as its error.
    """

    def __init__(self, timeout_s: float, what: str) -> None:
        self._timeout_s = timeout_s
        self._what = what
        self._breakers: list[Callable[[], object]] = []
        self._lock = threading.Lock()
        self._cause: PgherdError | None = None
        self._timer = threading.Timer(timeout_s, self._expire)
        self._timer.daemon = True

    def __enter__(self) -> Deadline:
        self._timer.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._timer.cancel()
        if self._cause is not None and isinstance(error, PgherdError | OSError | ValueError):
            raise self._cause from error

    @property
    def expired(self) -> bool:
        """Whether everything inside is being broken: what fails now fails because of that."""
        return self._cause is not None

    def _expire(self) -> None:
        self.end(
            TransientError(
                "child.timeout", f"{self._what} didn't finish within {self._timeout_s:g} s", timeout_s=self._timeout_s
            )
        )

    def end(self, cause: PgherdError) -> None:
        """Break what is being waited for, because of `cause`. From any thread; the first cause counts."""
        with self._lock:
            if self._cause is not None:
                return
            self._cause = cause
            breakers = list(self._breakers)
        for breaker in breakers:
            breaker()

    @contextlib.contextmanager
    def breaking(self, breaker: Callable[[], object]) -> Iterator[None]:
        """While inside, `breaker` is called when the time is up (at once when it is up already)."""
        with self._lock:
            self._breakers.append(breaker)
            late = self._cause is not None
        if late:
            breaker()
        try:
            yield
        finally:
            with self._lock:
                self._breakers.remove(breaker)

    def over_child(self, child: Child) -> contextlib.AbstractContextManager[None]:
        return self.breaking(child.end)

    def over_connection(self, connection: Connection[Any]) -> contextlib.AbstractContextManager[None]:
        """A hung server answers no cancel request: the socket itself is shut down."""

        def cut() -> None:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as link:
                link.shutdown(socket.SHUT_RDWR)

        return self.breaking(cut)

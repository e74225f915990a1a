"""One deadline over many blocking steps: a timer that breaks whatever is being waited for."""

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
    """Started on entry; when the time is up, registered children are ended and connections cut."""

    def __init__(self, timeout_s: float, what: str) -> None:
        self._timeout_s = timeout_s
        self._what = what
        self._breakers: list[Callable[[], object]] = []
        self._lock = threading.Lock()
        self._expired = False
        self._timer = threading.Timer(timeout_s, self._expire)
        self._timer.daemon = True

    def __enter__(self) -> Deadline:
        self._timer.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._timer.cancel()
        if self._expired and isinstance(error, PgherdError | OSError | ValueError):
            raise TransientError(
                "child.timeout", f"{self._what} didn't finish within {self._timeout_s:g} s", timeout_s=self._timeout_s
            ) from error

    @property
    def expired(self) -> bool:
        return self._expired

    def _expire(self) -> None:
        with self._lock:
            self._expired = True
            breakers = list(self._breakers)
        for breaker in breakers:
            breaker()

    @contextlib.contextmanager
    def breaking(self, breaker: Callable[[], object]) -> Iterator[None]:
        """While inside, `breaker` is called when the time is up (at once when it is up already)."""
        with self._lock:
            self._breakers.append(breaker)
            late = self._expired
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

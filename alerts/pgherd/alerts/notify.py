"""Receivers: where one notification goes. Each tries once; retrying is the outbox's work."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, Protocol, TypeVar

from pgherd.alerts.notification import Notification, rfc3339
from pgherd.proto.errors import TransientError
from pgherd.runtime.logging import get_logger

_log = get_logger(__name__)

_P = ParamSpec("_P")
_T = TypeVar("_T")

# A delivery consists of several steps, each with the receiver's timeout; the whole takes no longer than so many of them.
_STEPS = 4


class DeliveryError(TransientError):
    """A receiver refused or couldn't be reached: code notify.failed.

    `receiver_ill`: it will refuse the others too (down, overloaded), so that trying them now is pointless.
    `retry_after_s`: it said when to come back.
    """

    def __init__(
        self, receiver: str, problem: str, *, receiver_ill: bool, status: int | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(
            "notify.failed",
            f"receiver {receiver}: {problem}",
            hint="it is retried; look at the receiver and its url",
            receiver=receiver,
            status=status,
        )
        self.receiver_ill = receiver_ill
        self.retry_after_s = retry_after_s


class Receiver(Protocol):
    """One destination."""

    @property
    def name(self) -> str:
        """As configured; the key of its lines in the outbox."""
        ...

    async def deliver(self, message: Notification) -> None:
        """Hand over; returning means that the receiver has it. Raises DeliveryError."""
        ...

    async def close(self) -> None:
        """Release connections."""
        ...


class OwnThread:
    """Where a receiver may block: one thread of its own, so that a slow one keeps only itself waiting.

    The event loop's threads evaluate rules and answer the API; a few servers that drip their answers would take them all.
    A thread can't be stopped: what outlasts the deadline goes on behind it, and the next attempt waits for the thread
    within its own deadline, so that attempts don't pile up.
    """

    def __init__(self, name: str, timeout_s: float) -> None:
        """`timeout_s` is that of one step."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"notify-{name}")
        self._deadline_s = _STEPS * timeout_s

    async def run(self, work: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """What `work` returns. Raises what it raises, and TimeoutError after the deadline."""
        async with asyncio.timeout(self._deadline_s):
            return await asyncio.wrap_future(self._pool.submit(work, *args, **kwargs))

    def close(self) -> None:
        """Take no more work; what runs isn't waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class LogReceiver:
    """Writes a line to the collector's own log."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def deliver(self, message: Notification) -> None:
        for note in message.notes:
            firing = note.ends_unix_ns is None
            write = _log.warning if firing else _log.info
            write(
                "alert.firing" if firing else "alert.resolved",
                labels=dict(note.labels),
                summary=note.annotations.get("summary", ""),
                value=note.value,
                since=rfc3339(note.starts_unix_ns),
                reason=note.reason or None,
                id=message.id,
            )

    async def close(self) -> None:
        return None

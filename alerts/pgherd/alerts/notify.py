"""Receivers: where one notification goes. Each tries once; retrying is the outbox's work."""

from __future__ import annotations

from typing import Protocol

from pgherd.alerts.notification import Notification, rfc3339
from pgherd.proto.errors import TransientError
from pgherd.runtime.logging import get_logger

_log = get_logger(__name__)


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

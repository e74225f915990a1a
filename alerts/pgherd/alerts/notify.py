"""Receivers: where one notification goes. Each tries once; retrying is the outbox's work."""

from __future__ import annotations

import asyncio
from typing import Protocol

import httpx

from pgherd.alerts.notification import Notification, rfc3339, webhook_payload
from pgherd.proto.errors import TransientError
from pgherd.runtime.logging import get_logger

_log = get_logger(__name__)

# Answers that speak of the receiver's health, not of this request.
_RECEIVER_IS_ILL = frozenset((408, 425, 429))


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


class WebhookReceiver:
    """POSTs Alertmanager's webhook payload.

    The header Idempotency-Key is the notification's id: at-least-once delivery may repeat a POST (its answer was
    lost, or we were killed before noting it), and a receiver that remembers keys sees each fact once.
    The URL may be a secret: it appears in no log and no error.
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        timeout_s: float,
        external_url: str = "",
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.name = name
        self._url = url
        self._timeout_s = timeout_s
        self._external_url = external_url
        # trust_env: a proxy from the environment is how many sites reach the outside; redirects would
        # hand the payload to somewhere nobody configured.
        self._client = httpx.AsyncClient(timeout=timeout_s, follow_redirects=False, transport=transport)

    async def deliver(self, message: Notification) -> None:
        payload = webhook_payload(message, receiver=self.name, external_url=self._external_url)
        headers = {"Idempotency-Key": message.id, "User-Agent": "pgherd"}
        try:
            # httpx bounds each read; a receiver that drips its headers is bounded by the whole.
            async with (
                asyncio.timeout(self._timeout_s),
                self._client.stream("POST", self._url, json=payload, headers=headers) as response,
            ):
                status = response.status_code  # the body is nobody's business, and may be endless
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
            raise DeliveryError(self.name, type(error).__name__, receiver_ill=True) from None
        if not 200 <= status < 300:
            ill = status >= 500 or status in _RECEIVER_IS_ILL
            raise DeliveryError(self.name, f"answered HTTP {status}", receiver_ill=ill, status=status)

    async def close(self) -> None:
        await self._client.aclose()


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

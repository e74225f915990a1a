"""Receivers that take a POST: Alertmanager's webhook, Slack, Discord.

The header Idempotency-Key is the notification's id: at-least-once delivery may repeat a POST (its answer was
lost, or we were killed before noting it), and a receiver that remembers keys sees each fact once.
The URL may be a secret: it appears in no log and no error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx

from pgherd.alerts.messages import discord_payload, slack_payload
from pgherd.alerts.notification import Notification, webhook_payload
from pgherd.alerts.notify import DeliveryError

# Answers that speak of the receiver's health, not of this request.
_RECEIVER_IS_ILL = frozenset((408, 425, 429))

# Makes the JSON body of a notification.
Payload = Callable[[Notification], dict[str, Any]]


class HttpReceiver:
    """POSTs what `payload` makes of a notification."""

    def __init__(
        self, name: str, url: str, payload: Payload, *, timeout_s: float, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        self.name = name
        self._url = url
        self._payload = payload
        self._timeout_s = timeout_s
        # trust_env: a proxy from the environment is how many sites reach the outside; redirects would
        # hand the payload to somewhere nobody configured.
        self._client = httpx.AsyncClient(timeout=timeout_s, follow_redirects=False, transport=transport)

    async def deliver(self, message: Notification) -> None:
        headers = {"Idempotency-Key": message.id, "User-Agent": "pgherd"}
        try:
            # httpx bounds each read; a receiver that drips its headers is bounded by the whole.
            async with (
                asyncio.timeout(self._timeout_s),
                self._client.stream("POST", self._url, json=self._payload(message), headers=headers) as response,
            ):
                status = response.status_code  # the body is nobody's business, and may be endless
                retry_after_s = _seconds(response.headers.get("Retry-After"))
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
            raise DeliveryError(self.name, type(error).__name__, receiver_ill=True) from None
        if not 200 <= status < 300:
            ill = status >= 500 or status in _RECEIVER_IS_ILL
            raise DeliveryError(
                self.name,
                f"answered HTTP {status}",
                receiver_ill=ill,
                status=status,
                retry_after_s=retry_after_s if ill else None,
            )

    async def close(self) -> None:
        await self._client.aclose()


def webhook_receiver(name: str, url: str, *, timeout_s: float, external_url: str = "") -> HttpReceiver:
    """Alertmanager's webhook payload, version 4."""
    return HttpReceiver(
        name, url, lambda message: webhook_payload(message, receiver=name, external_url=external_url), timeout_s=timeout_s
    )


def slack_receiver(name: str, url: str, *, timeout_s: float, external_url: str = "") -> HttpReceiver:
    """A Slack incoming webhook, or anything that understands its payload (Mattermost, Rocket.Chat)."""
    return HttpReceiver(name, url, lambda message: slack_payload(message, external_url), timeout_s=timeout_s)


def discord_receiver(name: str, url: str, *, timeout_s: float, external_url: str = "") -> HttpReceiver:
    """A Discord webhook."""
    return HttpReceiver(name, url, lambda message: discord_payload(message, external_url), timeout_s=timeout_s)


def _seconds(text: str | None) -> float | None:
    """Retry-After in seconds; a date is as good as none, since the sender's clock isn't ours."""
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:
        return None

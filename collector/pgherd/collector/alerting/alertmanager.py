"""Push alerts to an Alertmanager, as Prometheus does: what is open again and again, what ended for a while.

No outbox: the state itself is repeated, at once when something changes and every minute otherwise. An alert stays alive there for four times as long
(`endsAt`), so that a collector which is killed and started again loses nothing; if it stays away longer, Alertmanager ends the alert.
Grouping, routes and repeats are Alertmanager's. What pgherd's own silences mute isn't pushed, unless it was pushed before: it would end there.
Source: Alertmanager's OpenAPI, POST /api/v2/alerts; Prometheus rules/alerting.go (resend, resolved retention).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from pgherd.alerts.model import Instance, State
from pgherd.alerts.notification import rfc3339
from pgherd.alerts.notify import DeliveryError
from pgherd.collector.alerting.evaluation import first_evaluation
from pgherd.collector.alerting.group import GroupStatus
from pgherd.collector.alerting.silencing import Silencer
from pgherd.collector.answers import UNPACKED, read_at_most
from pgherd.proto.clock import Clock
from pgherd.runtime.logging import get_logger

_log = get_logger(__name__)

RESEND_S = 60.0
_ALIVE_RESENDS = 4
_BATCH = 64
_RETRY_S = 5.0
_ANSWER_BYTES_MAX = 64 * 1024 * 1024  # all its alerts: some fifty thousand


@dataclass(slots=True)
class PushCounters:
    """Since this process began."""

    delivered: int = 0  # alerts
    failed: int = 0  # rounds


class AlertmanagerPush:
    """One Alertmanager. `url` is its base, credentials in it go into the Authorization header; it is never shown."""

    def __init__(
        self,
        name: str,
        url: str,
        *,
        status: Callable[[], Sequence[GroupStatus]],
        silencer: Silencer,
        clock: Clock,
        timeout_s: float,
        external_url: str = "",
        resend_s: float = RESEND_S,
    ) -> None:
        self.name = name
        self._url = f"{url.rstrip('/')}/api/v2/alerts"
        self._status = status
        self._silencer = silencer
        self._clock = clock
        self._external_url = external_url
        self._resend_s = resend_s
        self._client = httpx.AsyncClient(timeout=timeout_s, follow_redirects=False)
        self._timeout_s = timeout_s
        self._news = asyncio.Event()
        self._pushed: set[str] | None = None  # fingerprints that it knows; None: to be asked
        self.counters = PushCounters()

    def wake(self) -> None:
        """Something changed. Call on the event loop."""
        self._news.set()

    async def run(self) -> None:
        """Push until cancelled. Call after Evaluator.restore."""
        try:
            await first_evaluation(self._status, self._clock)
            while True:
                self._news.clear()
                try:
                    await self.push()
                except DeliveryError as error:
                    self.counters.failed += 1
                    _log.warning("notify.alertmanager.failed", receiver=self.name, error=error.message, code=error.code)
                    await asyncio.sleep(_RETRY_S)
                    continue
                try:
                    async with asyncio.timeout(self._resend_s):
                        await self._news.wait()
                except TimeoutError:
                    continue
        finally:
            await self._client.aclose()

    async def push(self) -> int:
        """Send everything once; returns how many alerts. Raises DeliveryError."""
        pushed = await self._known() if self._pushed is None else self._pushed
        alerts = await asyncio.to_thread(self._alerts, pushed)
        for start in range(0, len(alerts), _BATCH):
            batch = alerts[start : start + _BATCH]
            await self._request("POST", [document for _fingerprint, document in batch])
            self.counters.delivered += len(batch)
        self._pushed = {fingerprint for fingerprint, _document in alerts}
        return len(alerts)

    async def _known(self) -> set[str]:
        """What a former process of ours has pushed there; fingerprints are computed alike."""
        answer = await self._request("GET")
        try:
            return {str(alert["fingerprint"]) for alert in json.loads(answer)}
        except (ValueError, TypeError, KeyError, RecursionError) as error:  # a proxy's login page, say
            raise DeliveryError(self.name, "what answers isn't an Alertmanager", receiver_ill=True) from error

    async def _request(self, method: str, body: Any = None) -> bytes:
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._client.stream(method, self._url, json=body, headers=UNPACKED) as response,
            ):
                answer = await read_at_most(response, _ANSWER_BYTES_MAX)
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
            raise DeliveryError(self.name, type(error).__name__, receiver_ill=True) from None
        if not response.is_success:
            raise DeliveryError(
                self.name, f"answered HTTP {response.status_code}", receiver_ill=True, status=response.status_code
            )
        return answer

    def _alerts(self, pushed: set[str]) -> list[tuple[str, dict[str, Any]]]:
        """What is open or ended lately, by fingerprint."""
        now = self._clock.wall_unix_ns()
        found = []
        for status in (status for group in self._status() for status in group.alerting):
            for fingerprint, instance in status.instances.items():
                if instance.episode_unix_ns is None:
                    continue
                is_open = instance.state is not State.RESOLVED
                if is_open and fingerprint not in pushed and self._silencer.silenced_by(fingerprint, instance.labels, now):
                    continue
                found.append((fingerprint, self._document(instance, now)))
        return found

    def _document(self, instance: Instance, now_unix_ns: int) -> dict[str, Any]:
        ends_unix_ns = now_unix_ns + int(_ALIVE_RESENDS * self._resend_s * 1e9)
        if instance.state is State.RESOLVED and instance.resolved_unix_ns is not None:
            ends_unix_ns = instance.resolved_unix_ns
        return {
            "labels": dict(instance.labels),
            "annotations": dict(instance.annotations),
            "startsAt": rfc3339(instance.episode_unix_ns or 0),
            "endsAt": rfc3339(ends_unix_ns),
            "generatorURL": f"{self._external_url}/alerts" if self._external_url else "",
        }

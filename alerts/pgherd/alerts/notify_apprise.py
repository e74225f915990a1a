"""Everything else: apprise's services, by its URLs (tgram://…, msteams://…, pover://…).

apprise says only whether it worked; patience and repetition are the outbox's. Its URLs hold secrets and its log holds URLs,
so that log is off.
"""

from __future__ import annotations

import logging

from pgherd.alerts.messages import plain_text
from pgherd.alerts.notification import Notification
from pgherd.alerts.notify import DeliveryError, OwnThread
from pgherd.proto.errors import ConfigError


class AppriseReceiver:
    """One apprise URL."""

    def __init__(self, name: str, url: str, *, timeout_s: float, external_url: str = "") -> None:
        """Raises ConfigError config.invalid for a URL that apprise doesn't know."""
        import apprise  # 20 MiB that only who uses it pays

        logging.getLogger("apprise").disabled = True
        self.name = name
        self._external_url = external_url
        self._thread = OwnThread(name, timeout_s)
        self._failure, self._success = apprise.NotifyType.FAILURE, apprise.NotifyType.SUCCESS
        self._apprise = apprise.Apprise()
        if not self._apprise.add(url):
            raise ConfigError(
                "config.invalid",
                f"receiver {name}: apprise doesn't know that URL",
                hint="apprise's documentation lists the forms; the URL isn't shown because it may hold secrets",
                key="alerts.receivers",
            )

    async def deliver(self, message: Notification) -> None:
        body = plain_text(message, self._external_url)
        kind = self._failure if message.status == "firing" else self._success
        try:
            done = await self._thread.run(self._apprise.notify, body=body, title=message.title, notify_type=kind)
        # Eighty services' worth of code: whatever one of them raises, the letter stays and is tried again.
        except Exception as error:  # noqa: BLE001
            raise DeliveryError(self.name, f"apprise failed: {type(error).__name__}", receiver_ill=True) from None
        if not done:
            raise DeliveryError(self.name, "apprise couldn't deliver", receiver_ill=True)

    async def close(self) -> None:
        self._thread.close()

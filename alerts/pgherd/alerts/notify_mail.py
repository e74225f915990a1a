"""Mail: one message per notification over SMTP, on a thread of its own, every step with a timeout and the whole too.

The Message-ID comes from the notification's id, so that a message that had to be sent twice is one to whoever compares them;
all messages of a group refer to it, so that mail programs show them together. Neither password nor server's words get into logs.
Source: RFC 5321, RFC 5322, RFC 3834 (Auto-Submitted); Python's smtplib.
"""

from __future__ import annotations

import smtplib
import ssl
from dataclasses import dataclass, field
from email.message import EmailMessage
from email.utils import formatdate
from typing import Literal

from pgherd.alerts.messages import plain_text
from pgherd.alerts.notification import Notification
from pgherd.alerts.notify import DeliveryError, OwnThread
from pgherd.runtime.logging import get_logger

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class MailSettings:
    """Which server, as whom, from and to which addresses."""

    host: str
    port: int
    sender: str
    recipients: tuple[str, ...]
    security: Literal["starttls", "tls", "none"] = "starttls"
    user: str = ""
    password: str = field(default="", repr=False)
    ca_file: str | None = None  # besides the system's authorities


class MailReceiver:
    """See the module."""

    def __init__(self, name: str, settings: MailSettings, *, timeout_s: float, external_url: str = "") -> None:
        self.name = name
        self._settings = settings
        self._timeout_s = timeout_s
        self._external_url = external_url
        self._thread = OwnThread(name, timeout_s)

    async def deliver(self, message: Notification) -> None:
        mail = mail_of(message, self._settings, self._external_url)
        try:
            await self._thread.run(self._send, mail)
        except smtplib.SMTPResponseException as error:  # the server's word on one step
            refused = error.smtp_code >= 500 and isinstance(error, smtplib.SMTPDataError | smtplib.SMTPSenderRefused)
            raise DeliveryError(
                self.name, f"the mail server answered {error.smtp_code}", receiver_ill=not refused, status=error.smtp_code
            ) from None
        except (smtplib.SMTPException, OSError, ValueError) as error:  # an address or a host that can't be encoded, too
            ill = not isinstance(error, smtplib.SMTPRecipientsRefused)
            raise DeliveryError(self.name, type(error).__name__, receiver_ill=ill) from None

    async def close(self) -> None:
        self._thread.close()

    def _send(self, mail: EmailMessage) -> None:
        settings = self._settings
        with self._connected() as server:
            if settings.security == "starttls":
                server.starttls(context=self._tls())
            if settings.user:
                server.login(settings.user, settings.password)
            refused = server.send_message(mail, settings.sender, list(settings.recipients))
        if refused:
            # Somebody has it: to send it again would page them twice for the sake of an address that doesn't exist.
            _log.warning("notify.mail.recipients_refused", receiver=self.name, refused=len(refused))

    def _connected(self) -> smtplib.SMTP:
        settings = self._settings
        if settings.security == "tls":
            return smtplib.SMTP_SSL(settings.host, settings.port, timeout=self._timeout_s, context=self._tls())
        return smtplib.SMTP(settings.host, settings.port, timeout=self._timeout_s)

    def _tls(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        if self._settings.ca_file:
            context.load_verify_locations(self._settings.ca_file)
        return context


def mail_of(message: Notification, settings: MailSettings, external_url: str = "") -> EmailMessage:
    """The mail for one notification."""
    mail = EmailMessage()
    domain = settings.sender.rpartition("@")[2] or "pgherd.invalid"
    mail["Subject"] = " ".join(message.title.split())[:200]
    mail["From"] = settings.sender
    mail["To"] = ", ".join(settings.recipients)
    mail["Date"] = formatdate(max(_last_ns(message), 0) / 1e9, usegmt=True)
    mail["Message-ID"] = f"<{message.id}@{domain}>"
    mail["References"] = f"<{message.id.partition('.')[0]}@{domain}>"
    mail["Auto-Submitted"] = "auto-generated"
    mail.set_content(plain_text(message, external_url))
    return mail


def _last_ns(message: Notification) -> int:
    return max(max(note.starts_unix_ns, note.ends_unix_ns or 0) for note in message.notes)

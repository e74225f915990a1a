"""Notifications in words: plain text, and the payloads of Slack and Discord. Pure.

Source: Slack documentation, "Incoming webhooks", "Formatting message text", "Attachments"; Discord documentation,
"Execute Webhook", "Embed limits". Names that would mention somebody (@channel, @everyone) are defused.
"""

from __future__ import annotations

from collections.abc import Sequence

from pgherd.alerts.model import ALERT_NAME_LABEL
from pgherd.alerts.notification import Note, Notification, rfc3339

_RED, _GREEN = 0xD0021B, 0x2EB67D
_SHOWN_MAX = 20  # alerts written out; a phone shows no more
_SLACK_TEXT_MAX = 3000
_DISCORD_TITLE_MAX, _DISCORD_TEXT_MAX = 256, 4096
_WHERE_LABELS = ("node", "instance", "agent", "cluster")


def plain_text(message: Notification, external_url: str = "") -> str:
    """A few lines for each alert: what, where, since when, and what its author wrote."""
    lines: list[str] = []
    for status, word in (("firing", "Firing"), ("resolved", "Resolved")):
        notes = [note for note in message.notes if note.status == status]
        if notes:
            lines += ["", f"{word}:"] if lines else [f"{word}:"]
            lines += [line for note in notes[:_SHOWN_MAX] for line in _note_lines(note)]
            lines += _more(notes)
    if message.truncated:
        lines.append(f"… and {message.truncated} that this message has no room for")
    if external_url:
        lines += ["", f"{external_url}/alerts"]
    return "\n".join(lines) + "\n"


def slack_payload(message: Notification, external_url: str = "") -> dict[str, object]:
    """The body for a Slack incoming webhook: one attachment, red while something fires."""
    firing = message.status == "firing"
    title = _slack_escaped(message.title)
    attachment: dict[str, object] = {
        "color": f"#{_RED if firing else _GREEN:06x}",
        "fallback": title,
        "title": title,
        "text": _cut(_slack_escaped(plain_text(message)), _SLACK_TEXT_MAX),
        "mrkdwn_in": [],  # label values aren't markup
    }
    if external_url:
        attachment["title_link"] = f"{external_url}/alerts"
    return {"text": title, "attachments": [attachment]}


def discord_payload(message: Notification, external_url: str = "") -> dict[str, object]:
    """The body for a Discord webhook: one embed; nobody is mentioned."""
    firing = message.status == "firing"
    embed: dict[str, object] = {
        "title": _cut(message.title, _DISCORD_TITLE_MAX),
        "description": _cut(plain_text(message), _DISCORD_TEXT_MAX),
        "color": _RED if firing else _GREEN,
    }
    if external_url:
        embed["url"] = f"{external_url}/alerts"
    return {"embeds": [embed], "allowed_mentions": {"parse": []}}


def _note_lines(note: Note) -> list[str]:
    labels = note.labels
    where = next((labels[name] for name in _WHERE_LABELS if labels.get(name)), "")
    severity = f" ({labels['severity']})" if labels.get("severity") else ""
    head = f"- {labels.get(ALERT_NAME_LABEL, 'alert')}{severity} {where}".rstrip()
    lines = [f"{head}: {note.annotations['summary']}" if note.annotations.get("summary") else head]
    if note.annotations.get("description") and note.ends_unix_ns is None:
        lines.append(f"  {note.annotations['description']}")
    if note.annotations.get("runbook_url") and note.ends_unix_ns is None:
        lines.append(f"  {note.annotations['runbook_url']}")
    until = "" if note.ends_unix_ns is None else f", until {rfc3339(note.ends_unix_ns)[:19]}Z ({note.reason or 'over'})"
    lines.append(f"  since {rfc3339(note.starts_unix_ns)[:19]}Z{until}")
    return lines


def _more(notes: Sequence[Note]) -> list[str]:
    return [f"… and {len(notes) - _SHOWN_MAX} more"] if len(notes) > _SHOWN_MAX else []


def _slack_escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _cut(text: str, chars: int) -> str:
    return text if len(text) <= chars else text[: chars - 1] + "…"

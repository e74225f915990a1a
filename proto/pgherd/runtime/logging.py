"""Logging: constant dotted event names, facts as fields, secrets and literals removed, one place.

`get_logger(__name__).info("backup.finished", backup=name, stored_bytes=n)`. JSON lines unless stderr is
a terminal. Logs go to stderr; stdout belongs to results. Pure code doesn't log.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any, TextIO, cast

import structlog
from structlog.typing import FilteringBoundLogger, Processor

_SECRET_KEY_RE = re.compile(r"pass(word|wd|phrase)?$|secret|token(?!_id)|private|authorization|credential", re.IGNORECASE)
_SECRET_TEXT_RES = (
    (re.compile(r"(password\s+)'(?:[^']|'')*'", re.IGNORECASE), r"\1'***'"),  # ALTER ROLE … PASSWORD '…'
    (
        re.compile(r"((?:password|passwd)\s*[=:]|(?:secret|token)\s*=)(\s*)('[^']*'|\"[^\"]*\"|[^\s,;'\"]+)", re.IGNORECASE),
        r"\1\2***",
    ),
    (re.compile(r"(postgres(?:ql)?://[^:/@\s]+):[^@\s]+@"), r"\1:***@"),
    (re.compile(r"pgherd1_[a-z2-7]+_[a-z2-7]+_[0-9a-f]+@"), "pgherd1_***@"),
    (re.compile(r"\bpgherd_([a-z2-7]+)_[a-z2-7]{40,}"), r"pgherd_\1_***"),
    (re.compile(r"(Authorization:\s*\w+\s+)\S+", re.IGNORECASE), r"\1***"),
    (re.compile(r"(Bearer\s+)[A-Za-z0-9._~+/=-]{16,}"), r"\1***"),
)


def redact(text: str) -> str:
    """`text` without passwords, tokens and credentials in URLs."""
    for pattern, replacement in _SECRET_TEXT_RES:
        text = pattern.sub(replacement, text)
    return text


def _redact_event(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key, value in event.items():
        if _SECRET_KEY_RE.search(key) and value:
            event[key] = "***"
        elif isinstance(value, str):
            event[key] = redact(value)
    return event


class _LossyStderr:
    """stderr as it is now, losing lines instead of failing: a full disk below the log must not stop the agent."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # ValueError: closed
            return sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()


def configure(*, level: str = "info", json: bool | None = None) -> None:
    """Set up logging for this process; call once from its composition root.

    `json=None` chooses JSON unless stderr is a terminal.
    """
    stderr = cast(TextIO, _LossyStderr())
    as_json = json if json is not None else not sys.stderr.isatty()
    processors: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _redact_event,
        structlog.processors.JSONRenderer(sort_keys=False) if as_json else structlog.dev.ConsoleRenderer(),
    ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(file=stderr),
        cache_logger_on_first_use=False,  # a later `configure` (a verb's, after its group's) must count
    )
    logging.basicConfig(level=logging.WARNING, stream=stderr, format="%(levelname)s %(name)s %(message)s", force=True)


def get_logger(name: str) -> FilteringBoundLogger:
    """The logger of a module; `name` is `__name__`."""
    logger: FilteringBoundLogger = structlog.get_logger(module=name)
    return logger

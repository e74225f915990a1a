"""pgherd's exceptions: raise deep, render once.

    PgherdError                 code, message, context, hint, retryable
     ├─ ConfigError             edit a file or a flag
     ├─ PreconditionError       the state of the world forbids it
     ├─ DeniedError             a policy or a missing right says no
     ├─ PeerError               the other side broke the contract
     ├─ TransientError          wait and retry
     ├─ IntegrityError          data is damaged or foreign: stop
     └─ InvariantError          our bug: stop

The class says who acts, the code (see codes.py) says what happened, the hint what to do next.
Messages are lower case without a full stop and never contain a secret or a query literal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pgherd.proto.codes import REGISTRY, CodeInfo, Kind

ContextValue = str | int | float | bool | None


class PgherdError(Exception):
    """Root of all errors that pgherd raises on purpose.

    `context` holds facts with the unit in the key (`timeout_s`, `free_bytes`); `hint` is one sentence
    for the operator at 3 a.m.: the next command to run or the line to change.
    """

    kind: ClassVar[Kind]

    def __init__(self, code: str, message: str, *, hint: str = "", **context: ContextValue) -> None:
        info = REGISTRY.get(code)
        if info is None:
            raise ValueError(f"unregistered error code: {code}")
        if info.kind is not self.kind:
            raise ValueError(f"{code} is registered as {info.kind}, raised as {self.kind}")
        super().__init__(message)
        self.info: CodeInfo = info
        self.message = message
        self.hint = hint
        self.context: dict[str, ContextValue] = dict(context)

    @property
    def code(self) -> str:
        """The stable `area.fact` code."""
        return self.info.code

    @property
    def retryable(self) -> bool:
        """Whether the same call may succeed later without anybody acting."""
        return self.info.kind is Kind.TRANSIENT

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]"

    def as_dict(self) -> dict[str, object]:
        """The one JSON shape of an error: CLI `--json`, problem+json members, command results."""
        return {
            "code": self.code,
            "message": self.message,
            "hint": self.hint,
            "retryable": self.retryable,
            "context": dict(self.context),
        }


class ConfigError(PgherdError):
    kind = Kind.CONFIG


class PreconditionError(PgherdError):
    kind = Kind.PRECONDITION


class DeniedError(PgherdError):
    kind = Kind.DENIED


class PeerError(PgherdError):
    kind = Kind.PEER


class TransientError(PgherdError):
    kind = Kind.TRANSIENT


class IntegrityError(PgherdError):
    kind = Kind.INTEGRITY


class InvariantError(PgherdError):
    kind = Kind.INVARIANT


_CLASS_OF_KIND: dict[Kind, type[PgherdError]] = {
    cls.kind: cls
    for cls in (ConfigError, PreconditionError, DeniedError, PeerError, TransientError, IntegrityError, InvariantError)
}


def from_dict(data: Mapping[str, object]) -> PgherdError:
    """Rebuild an error that crossed a process or the wire as `as_dict()`.

    An unknown code (a newer peer) becomes `peer.protocol` with the original code in its context.
    """
    code = str(data.get("code", ""))
    message = str(data.get("message", ""))
    hint = str(data.get("hint", ""))
    raw_context = data.get("context")
    context: dict[str, ContextValue] = {}
    if isinstance(raw_context, Mapping):
        for key, value in raw_context.items():
            if key in ("code", "message", "hint"):
                continue
            context[str(key)] = value if isinstance(value, str | int | float | bool) or value is None else str(value)
    info = REGISTRY.get(code)
    if info is None:
        return PeerError("peer.protocol", message, hint=hint, original_code=code)
    return _CLASS_OF_KIND[info.kind](code, message, hint=hint, **context)

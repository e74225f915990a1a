"""Parameters of the Prometheus HTTP API, read the way its clients send them.

They come in the URL, in a form, or in both (then the form's come first). The form is read here and not by the web
framework, because that would need one more dependency, and bounded, because anybody may send it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import parse_qsl

from fastapi import Request
from starlette.requests import ClientDisconnect

from pgherd.promql.durations import parse_duration_ms, parse_time_ms
from pgherd.promql.parse import parse_selector
from pgherd.proto.errors import ConfigError
from pgherd.proto.selectors import Matcher

BODY_BYTES_MAX = 1024 * 1024
_FIELDS_MAX = 1000
_BODY_TIMEOUT_S = 10.0
_INTEGER = re.compile(r"[+-]?\d{1,18}", re.ASCII)
_FORM = "application/x-www-form-urlencoded"


@dataclass(frozen=True, slots=True)
class Parameters:
    """The parameters of one request; every reader raises `usage.invalid` naming the parameter."""

    values: Mapping[str, Sequence[str]]

    def text(self, name: str) -> str:
        """The first value, "" when there is none."""
        return next(iter(self.values.get(name, ())), "")

    def time_ms(self, name: str, default_ms: int | None = None) -> int:
        """A time in milliseconds; required when there is no default."""
        text = self.text(name)
        if not text and default_ms is not None:
            return default_ms
        return parse_time_ms(text, name)

    def duration_ms(self, name: str, default_ms: int | None = None) -> int:
        """A duration in milliseconds; required when there is no default."""
        text = self.text(name)
        if not text and default_ms is not None:
            return default_ms
        return parse_duration_ms(text, name)

    def limit(self, name: str = "limit") -> int | None:
        """A number of results, None (also for 0) when there is no limit."""
        text = self.text(name)
        if not text:
            return None
        if not _INTEGER.fullmatch(text):
            raise ConfigError("usage.invalid", f"invalid parameter {name!r}: {text[:64]!r} is not an integer")
        number = int(text)
        if number < 0:
            raise ConfigError("usage.invalid", f"invalid parameter {name!r}: {name} must be non-negative")
        return number or None

    def matchers(self) -> list[tuple[Matcher, ...]]:
        """The selectors of `match[]`, any of which may match. Raises `promql.parse` too."""
        return [parse_selector(text) for text in self.values.get("match[]", ())]

    def range_ms(self, earliest_ms: int, latest_ms: int) -> tuple[int, int]:
        """`start` and `end` of a browsing request, each open-ended when left out."""
        start_ms, end_ms = self.time_ms("start", earliest_ms), self.time_ms("end", latest_ms)
        if end_ms < start_ms:
            raise ConfigError("usage.invalid", 'invalid parameter "end": end timestamp must not be before start timestamp')
        return max(start_ms, earliest_ms), min(end_ms, latest_ms)


async def read_parameters(request: Request) -> Parameters:
    """The parameters of a GET or a form POST."""
    values: dict[str, list[str]] = {}
    sources = [request.scope.get("query_string", b"")]
    if request.method == "POST" and request.headers.get("content-type", "").partition(";")[0].strip().lower() == _FORM:
        sources.insert(0, await _body(request))
    for source in sources:
        try:
            pairs = parse_qsl(source.decode("latin-1"), keep_blank_values=True, errors="replace", max_num_fields=_FIELDS_MAX)
        except ValueError as error:
            raise ConfigError("usage.invalid", f"the request's parameters can't be read: {error}") from None
        for name, value in pairs:
            values.setdefault(name, []).append(value)
    return Parameters(values)


async def _body(request: Request) -> bytes:
    received = bytearray()
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            async for chunk in request.stream():
                received += chunk
                if len(received) > BODY_BYTES_MAX:
                    raise ConfigError("usage.invalid", f"the request's form is larger than {BODY_BYTES_MAX} bytes")
    except (TimeoutError, ClientDisconnect):
        raise ConfigError("usage.invalid", "the request's form didn't arrive in time") from None
    return bytes(received)


_ESCAPED_CODE_POINT = re.compile(r"_(_|[0-9A-Fa-f]{1,6}_)")


def decode_label_name(text: str) -> str:
    """The label name of a path segment; names outside [a-zA-Z0-9_] come as `U__` with `_2e_` for a dot, `__` for `_`.

    Anything that isn't a complete escape stands for itself, as in Prometheus. Source: Prometheus documentation,
    "Escaping schemes". Raises `usage.invalid` for an empty name.
    """
    if not text:
        raise ConfigError("usage.invalid", "invalid label name: it is empty")
    if not text.startswith("U__"):
        return text
    escaped = text.removeprefix("U__")
    pieces: list[str] = []
    position = 0
    while position < len(escaped):
        if escaped[position] != "_":
            pieces.append(escaped[position])
            position += 1
            continue
        found = _ESCAPED_CODE_POINT.match(escaped, position)
        point = ord("_") if found and found.group(1) == "_" else int(found.group(1)[:-1], 16) if found else -1
        if found is None or point > 0x10FFFF or 0xD800 <= point <= 0xDFFF:
            return text
        pieces.append(chr(point))
        position = found.end()
    return "".join(pieces)

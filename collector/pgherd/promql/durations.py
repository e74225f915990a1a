"""Durations and times as the Prometheus HTTP API spells them.

Source: Prometheus documentation, "Querying basics" (time durations) and "HTTP API" (format overview).
"""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime

from pgherd.proto.errors import ConfigError

_UNIT_MS = {"y": 31_536_000_000, "w": 604_800_000, "d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1}
_DURATION = re.compile(r"(?:(\d+)y)?(?:(\d+)w)?(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?(?:(\d+)ms)?", re.ASCII)
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(?:\.\d+)?(?:[Zz]|[+-]\d\d:\d\d)", re.ASCII)
_FRACTION = re.compile(r"\.(\d+)")
# Milliseconds up to here are exact in a float and far from the edges of int64.
MAGNITUDE_MAX_MS = 2**53
_CHARACTERS_MAX = 128


def parse_duration_ms(text: str, parameter: str) -> int:
    """Milliseconds of "1h30m", "15s" or a number of seconds; raises `usage.invalid` naming the parameter."""
    if _NUMBER.fullmatch(text):
        return _milliseconds(float(text), text, parameter)
    found = _DURATION.fullmatch(text) if 0 < len(text) <= _CHARACTERS_MAX else None
    if found is None:
        raise ConfigError("usage.invalid", f"invalid parameter {parameter!r}: cannot parse {text[:64]!r} to a valid duration")
    total = sum(int(count) * unit for count, unit in zip(found.groups(), _UNIT_MS.values(), strict=True) if count)
    return _milliseconds(total / 1000, text, parameter)


def parse_time_ms(text: str, parameter: str) -> int:
    """Milliseconds since the epoch of a unix time in seconds or an RFC 3339 time; raises `usage.invalid`."""
    if _NUMBER.fullmatch(text):
        return _milliseconds(float(text), text, parameter)
    if _RFC3339.fullmatch(text):
        # Python 3.11 reads at most six fractional digits; the answer has three.
        trimmed = _FRACTION.sub(lambda fraction: "." + fraction.group(1)[:6].ljust(6, "0"), text.upper())
        try:
            moment = datetime.fromisoformat(trimmed)
            return math.floor((moment - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds() * 1000 + 0.5)
        except (ValueError, OverflowError):
            pass
    raise ConfigError("usage.invalid", f"invalid parameter {parameter!r}: cannot parse {text[:64]!r} to a valid timestamp")


def _milliseconds(seconds: float, text: str, parameter: str) -> int:
    if not abs(seconds) * 1000 <= MAGNITUDE_MAX_MS:
        raise ConfigError("usage.invalid", f"invalid parameter {parameter!r}: {text[:64]!r} is out of range")
    return round(seconds * 1000)

"""OTLP names in Prometheus' spelling. Pure.

Source: OpenTelemetry specification, "Prometheus and OpenMetrics Compatibility" (metric metadata, attributes,
resource attributes), in the spelling that Prometheus calls UnderscoreEscapingWithSuffixes.
"""

from __future__ import annotations

import re
from functools import lru_cache

METRIC_NAME_RE = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
LABEL_NAME_RE = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_NAME_BREAK_RE = re.compile(r"[^a-zA-Z0-9:]+")
_LABEL_BREAK_RE = re.compile(r"[^a-zA-Z0-9_]")

# The labels that say where a sample is from: set from the resource only.
RESERVED_LABELS = frozenset({"job", "instance", "cluster", "node"})

_UNITS = {
    "d": "days", "h": "hours", "min": "minutes", "s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds",
    "By": "bytes", "KiBy": "kibibytes", "MiBy": "mebibytes", "GiBy": "gibibytes", "TiBy": "tibibytes",
    "KBy": "kilobytes", "MBy": "megabytes", "GBy": "gigabytes", "TBy": "terabytes",
    "m": "meters", "V": "volts", "A": "amperes", "J": "joules", "W": "watts", "g": "grams", "Cel": "celsius", "Hz": "hertz",
    "1": "", "%": "percent",
}  # fmt: skip
_PER_UNITS = {"s": "second", "m": "minute", "h": "hour", "d": "day", "w": "week", "mo": "month", "y": "year"}


@lru_cache(maxsize=4096)
def metric_name(name: str, unit: str, *, is_counter: bool, is_gauge: bool) -> str:
    """`http.server.duration`, `ms` → `http_server_duration_milliseconds`; counters end in `_total`.

    "" when nothing of the name is left.
    """
    words = [word for word in _NAME_BREAK_RE.split(name) if word]
    main, _, per = unit.partition("/")
    main_word, per_word = _unit_word(main, _UNITS), _unit_word(per, _PER_UNITS)
    if main_word and main_word not in words:
        words.append(main_word)
    if per_word and per_word not in words:
        words = [*(word for word in words if word != "per"), "per", per_word]
    if is_counter:
        words = [*(word for word in words if word != "total"), "total"]
    if is_gauge and unit == "1":
        words = [*(word for word in words if word != "ratio"), "ratio"]
    joined = "_".join(words)
    return f"_{joined}" if joined[:1].isdigit() else joined


def _unit_word(unit: str, table: dict[str, str]) -> str:
    unit = unit.strip()
    if "{" in unit or "}" in unit:  # an annotation such as {request}
        return ""
    return table.get(unit, "_".join(part for part in _NAME_BREAK_RE.split(unit) if part))


@lru_cache(maxsize=16384)
def label_name(key: str) -> str:
    """An attribute's key as a label name; never reserved, never starting with an underscore. "" if impossible."""
    name = _LABEL_BREAK_RE.sub("_", key)
    if not name.strip("_"):
        return ""
    if name[0].isdigit():
        return f"key_{name}"
    return f"key{name}" if name[0] == "_" else name

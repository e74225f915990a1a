"""Go's fmt: how values are shown by %v and printf.

Source: Go documentation, package fmt, and strconv.FormatFloat's shortest form.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

_VERB_RE = re.compile(r"%(?P<flags>[-+ 0#]*)(?P<width>\d*)(?P<precision>\.\d*)?(?P<verb>.)", re.DOTALL)
_WIDTH_MAX = 1_000_000  # Go's own bound
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class GoTime:
    """A time.Time in UTC, to the millisecond."""

    def __init__(self, unix_ms: int) -> None:
        self.unix_ms = unix_ms
        self.utc = _EPOCH + timedelta(milliseconds=unix_ms)

    def __str__(self) -> str:
        fraction = f".{self.unix_ms % 1000:03d}".rstrip("0") if self.unix_ms % 1000 else ""
        return f"{self.utc:%Y-%m-%d %H:%M:%S}{fraction} +0000 UTC"


class GoDuration:
    """A time.Duration."""

    def __init__(self, ns: int) -> None:
        self.ns = ns

    def __str__(self) -> str:
        if self.ns == 0:
            return "0s"
        sign, rest = ("-", -self.ns) if self.ns < 0 else ("", self.ns)
        for unit, size in (("ns", 1), ("µs", 1_000), ("ms", 1_000_000)):
            if rest < size * 1000:
                return f"{sign}{_decimal(rest, size)}{unit}"
        seconds, minutes = rest % 60_000_000_000, rest // 60_000_000_000
        text = f"{_decimal(seconds, 1_000_000_000)}s"
        if minutes:
            text = f"{minutes % 60}m{text}"
        if minutes >= 60:
            text = f"{minutes // 60}h{text}"
        return sign + text


def _decimal(count: int, size: int) -> str:
    whole, part = divmod(count, size)
    digits = f"{part:0{len(str(size)) - 1}d}".rstrip("0") if part else ""
    return f"{whole}.{digits}" if digits else str(whole)


def go_float(value: float, precision: int | None = None) -> str:
    """A float as Go's %v (shortest digits that read back equal, an exponent from 1e+06 on) or %.<precision>g."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    if precision is not None:
        return f"{value:.{precision}g}"
    if value == 0:
        return "-0" if math.copysign(1.0, value) < 0 else "0"
    shortest = next(text for places in range(18) if float(text := f"{value:.{places}e}") == value)
    digits, _e, exponent = shortest.partition("e")
    if -4 <= int(exponent) < 6:
        return f"{value:.{max(0, len(digits.lstrip('-').replace('.', '')) - 1 - int(exponent))}f}"
    return f"{digits}e{exponent}"


def text_of(value: object) -> str:
    """What `{{ value }}` shows."""
    match value:
        case bool():
            return "true" if value else "false"
        case float():
            return go_float(value)
        case None:
            return "<nil>"
        case str() | int() | GoTime() | GoDuration():
            return str(value)
        case Mapping():
            return "map[" + " ".join(f"{key}:{text_of(value[key])}" for key in sorted(value)) + "]"
        case Sequence():
            return "[" + " ".join(text_of(one) for one in value) + "]"
    return str(value)


def quoted(text: str) -> str:
    """%q."""
    escapes = {"\n": "\\n", "\t": "\\t", "\r": "\\r", '"': '\\"', "\\": "\\\\"}
    return '"' + "".join(escapes.get(sign, sign) for sign in text) + '"'


def sprint(*values: object) -> str:
    """A space between two operands of which neither is text."""
    text = ""
    for position, value in enumerate(values):
        gap = position and not isinstance(value, str) and not isinstance(values[position - 1], str)
        text += (" " if gap else "") + text_of(value)
    return text


def sprintf(form: str, *arguments: object) -> str:
    """What doesn't fit shows as in Go: `%!d(float64=1.5)`, `%!s(MISSING)`, `%!(EXTRA int=1)`."""
    left = list(arguments)

    def one(match: re.Match[str]) -> str:
        if match["verb"] == "%":
            return "%"
        return _formatted(match, left.pop(0)) if left else f"%!{match['verb']}(MISSING)"

    text = _VERB_RE.sub(one, form)
    if left:
        text += "%!(EXTRA " + ", ".join(f"{_type_name(value)}={text_of(value)}" for value in left) + ")"
    return text


def _type_name(value: object) -> str:
    match value:
        case bool():
            return "bool"
        case int():
            return "int"
        case float():
            return "float64"
        case str():
            return "string"
        case None:
            return "<nil>"
    return "map[string]string" if isinstance(value, Mapping) else type(value).__name__


def _formatted(match: re.Match[str], value: object) -> str:
    flags, width = match["flags"], int(match["width"] or 0)
    if width > _WIDTH_MAX or int((match["precision"] or ".0")[1:] or 0) > _WIDTH_MAX:
        return "%!(BADWIDTH)"
    text = _verb(match["verb"], flags, match["precision"], value)
    if text is None:
        return f"%!{match['verb']}({_type_name(value)}={text_of(value)})"
    if "-" in flags:
        return text.ljust(width)
    is_number = isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)
    return text.zfill(width) if "0" in flags and is_number else text.rjust(width)


def _verb(verb: str, flags: str, precision: str | None, value: object) -> str | None:
    """The value as `verb` shows it, without its width; None when it doesn't fit."""
    places = None if precision is None else int(precision[1:] or 0)
    if verb == "v" and not (isinstance(value, float) and places is not None):
        return _signed(text_of(value), flags, value)
    if verb in "sqxX" and isinstance(value, str):
        text = value if places is None else value[:places]
        return {"s": text, "q": quoted(text), "x": text.encode().hex(), "X": text.encode().hex().upper()}[verb]
    if verb == "s" and isinstance(value, GoTime | GoDuration | Mapping | Sequence):
        return text_of(value)
    if isinstance(value, bool):
        return text_of(value) if verb == "t" else None
    if verb in "feEgGFv" and isinstance(value, float):
        return _signed(_float(verb, places, value), flags, value)
    if verb in "dxXobcqU" and isinstance(value, int):
        shown = {"d": "d", "x": "x", "X": "X", "o": "o", "b": "b"}
        if verb in shown:
            return _signed(f"{value:{shown[verb]}}", flags, value)
        return {"c": chr(value), "q": f"'{chr(value)}'", "U": f"U+{value:04X}"}[verb]
    return None


def _float(verb: str, places: int | None, value: float) -> str:
    if not math.isfinite(value):
        return go_float(value)
    if verb in "gGv":
        text = go_float(value) if places is None else f"{value:.{places}g}"
        return text.upper() if verb == "G" else text
    return f"{value:.{6 if places is None else places}{verb.replace('F', 'f')}}"


def _signed(text: str, flags: str, value: object) -> str:
    if not isinstance(value, int | float) or isinstance(value, bool) or text.startswith(("-", "+")):
        return text
    return f"+{text}" if "+" in flags else f" {text}" if " " in flags else text

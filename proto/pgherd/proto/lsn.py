"""LSN and timeline as values with order and arithmetic.

Source: PostgreSQL docs "pg_lsn Type", "WAL Internals"; segment names as `XLogFileName` builds them
(timeline, high 32 bits and segment number within them, eight hexadecimal digits each).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_LSN_RE = re.compile(r"([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})")
_SEGMENT_RE = re.compile(r"[0-9A-F]{24}")
_MAX = (1 << 64) - 1


@dataclass(frozen=True, slots=True, order=True)
class Lsn:
    """A byte position in the write-ahead log; `Lsn - Lsn` is a distance in bytes.

    Positions of different timelines don't compare: compare the timelines first.
    """

    value: int

    def __post_init__(self) -> None:
        if not 0 <= self.value <= _MAX:
            raise ValueError(f"LSN out of range: {self.value}")

    @classmethod
    def parse(cls, text: str) -> Lsn:
        """Parse PostgreSQL's `XXXXXXXX/XXXXXXXX`. Raises ValueError."""
        match = _LSN_RE.fullmatch(text)
        if match is None:
            raise ValueError(f"not an LSN: {text!r}")
        return cls((int(match[1], 16) << 32) | int(match[2], 16))

    def __str__(self) -> str:
        return f"{self.value >> 32:X}/{self.value & 0xFFFFFFFF:X}"

    def __add__(self, distance_bytes: int) -> Lsn:
        return Lsn(self.value + distance_bytes)

    def __sub__(self, other: Lsn) -> int:
        return self.value - other.value


@dataclass(frozen=True, slots=True, order=True)
class Timeline:
    """A timeline id, 1 .. 2^32-1; grows at each promotion."""

    value: int

    def __post_init__(self) -> None:
        if not 1 <= self.value <= 0xFFFFFFFF:
            raise ValueError(f"timeline out of range: {self.value}")

    def __str__(self) -> str:
        return f"{self.value:08X}"


def segment_name(timeline: Timeline, lsn: Lsn, segment_bytes: int) -> str:
    """Name of the WAL file that holds the byte at `lsn`."""
    number = lsn.value // segment_bytes
    per_id = 0x100000000 // segment_bytes
    return f"{timeline}{number // per_id:08X}{number % per_id:08X}"


def segment_start(name: str, segment_bytes: int) -> tuple[Timeline, Lsn]:
    """Timeline and first byte position of a WAL file name. Raises ValueError."""
    if _SEGMENT_RE.fullmatch(name) is None:
        raise ValueError(f"not a WAL segment name: {name!r}")
    per_id = 0x100000000 // segment_bytes
    high, low = int(name[8:16], 16), int(name[16:], 16)
    if low >= per_id:
        raise ValueError(f"segment number beyond its id in {name!r}")
    return Timeline(int(name[:8], 16)), Lsn((high * per_id + low) * segment_bytes)

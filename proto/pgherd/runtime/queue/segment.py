"""The spool's on-disk format, version 1: segments of records. Bytes in, values out; no file is opened here.

A segment is a 64-byte header followed by records; numbers are little-endian.

    header  "PGHSPOOL" | u16 version | u16 0 | 16-byte incarnation | u64 first sequence
            | u64 points spooled before this segment | i64 created (unix ns) | 8 bytes 0 | u32 CRC-32 of the 60 before
    record  u32 CRC-32 of all that follows | u32 payload length | u64 sequence | i64 appended (unix ns)
            | u32 points | u8 codec (0 = as is, 1 = zstd) | payload

Never broken: what `scan` returns was written completely; a cut at any byte yields the records before it.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

FORMAT_VERSION: Final = 1
MAGIC: Final = b"PGHSPOOL"
HEADER_BYTES: Final = 64

_HEADER = struct.Struct("<8sHH16sQQq8x")
_RECORD = struct.Struct("<IIQqIB")
RECORD_OVERHEAD_BYTES: Final = _RECORD.size


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """What a segment says about itself."""

    incarnation: str
    first_sequence: int
    points_before: int
    created_unix_ns: int
    version: int = FORMAT_VERSION


@dataclass(frozen=True, slots=True)
class RecordRef:
    """One record's place and facts within its segment."""

    offset: int
    size: int  # of the whole record
    sequence: int
    points: int
    appended_unix_ns: int
    codec: int


class Tail(StrEnum):
    """How a segment ends."""

    CLEAN = "clean"
    TORN = "torn"  # the last record is incomplete: the writer died while appending
    CORRUPT = "corrupt"  # a complete record fails its checksum: damaged afterwards


def encode_header(header: SegmentHeader) -> bytes:
    body = _HEADER.pack(
        MAGIC,
        FORMAT_VERSION,
        0,
        uuid.UUID(header.incarnation).bytes,
        header.first_sequence,
        header.points_before,
        header.created_unix_ns,
    )
    return body + struct.pack("<I", zlib.crc32(body))


def decode_header(data: bytes) -> SegmentHeader | None:
    """The header, or None when these bytes are none. The version is read even from a newer format."""
    if len(data) < HEADER_BYTES or not data.startswith(MAGIC):
        return None
    version = int.from_bytes(data[8:10], "little")
    if version > FORMAT_VERSION:  # a newer layout may differ in everything but magic and version
        return SegmentHeader(str(uuid.UUID(int=0)), 0, 0, 0, version)
    body, crc = data[: HEADER_BYTES - 4], data[HEADER_BYTES - 4 : HEADER_BYTES]
    if zlib.crc32(body) != int.from_bytes(crc, "little"):
        return None
    _, version, _, incarnation, first_sequence, points_before, created = _HEADER.unpack(body)
    return SegmentHeader(str(uuid.UUID(bytes=incarnation)), first_sequence, points_before, created, version)


def encode_record(payload: bytes, *, sequence: int, points: int, appended_unix_ns: int, codec: int) -> bytes:
    rest = _RECORD.pack(0, len(payload), sequence, appended_unix_ns, points, codec)[4:] + payload
    return struct.pack("<I", zlib.crc32(rest)) + rest


def payload_of(record: bytes) -> bytes:
    """The payload of a whole record that `scan` has returned."""
    return record[_RECORD.size :]


def is_intact(record: bytes) -> bool:
    """Whether a whole record still has its checksum."""
    return len(record) >= _RECORD.size and zlib.crc32(record[4:]) == int.from_bytes(record[:4], "little")


def scan(data: bytes) -> tuple[list[RecordRef], int, Tail]:
    """The readable records of a segment's bytes, where they end, and how the segment ends."""
    view, position = memoryview(data), HEADER_BYTES
    found: list[RecordRef] = []
    while position < len(data):
        if len(data) - position < _RECORD.size:
            return found, position, Tail.TORN
        crc, length, sequence, appended, points, codec = _RECORD.unpack_from(data, position)
        size = _RECORD.size + length
        if size > len(data) - position:
            return found, position, Tail.TORN
        if zlib.crc32(view[position + 4 : position + size]) != crc:
            return found, position, Tail.CORRUPT
        found.append(RecordRef(position, size, sequence, points, appended, codec))
        position += size
    return found, position, Tail.CLEAN

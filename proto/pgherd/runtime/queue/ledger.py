"""The spool's bookkeeping: what became of every sampled point, kept over kill -9.

Two 128-byte slots are written in turn, in place: a kill in the middle of a write leaves the other slot,
and a full disk can't refuse the write. The identity that tests and the demo show:

    sampled = spooled + refused        spooled = acked + evicted + poisoned + lost + pending
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Final

from pgherd.runtime.durable import publish

FORMAT_VERSION: Final = 1
_MAGIC: Final = b"PGHLEDG"
_SLOT_BYTES: Final = 128


@dataclass(frozen=True, slots=True)
class Counts:
    """Cumulative since the spool was made.

    Everything up to `released_sequence` is done with; no sequence up to `last_sequence` may be used again.
    """

    released_sequence: int = 0
    last_sequence: int = 0
    spooled_points: int = 0
    refused_points: int = 0  # offered, but there was no room to append them
    acked_points: int = 0
    evicted_points: int = 0  # dropped as the oldest
    poisoned_points: int = 0  # refused by the collector for ever
    lost_points: int = 0  # unreadable
    acked_batches: int = 0
    corrupt_segments: int = 0

    @property
    def sampled_points(self) -> int:
        return self.spooled_points + self.refused_points

    @property
    def dropped_points(self) -> int:
        return self.refused_points + self.evicted_points + self.poisoned_points + self.lost_points

    @property
    def pending_points(self) -> int:
        return self.sampled_points - self.acked_points - self.dropped_points


_SLOT = struct.Struct(f"<7sBQ{len(fields(Counts))}Q")


class Ledger:
    """The file behind `Counts`. Raises OSError only when opening."""

    def __init__(self, path: Path) -> None:
        if not path.exists() or path.stat().st_size != 2 * _SLOT_BYTES:
            publish(path, bytes(2 * _SLOT_BYTES))
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.newest_version = 0
        self.found = False
        self.counts = Counts()
        self._generation = 0
        for slot in (0, 1):
            self._take(os.pread(self._fd, _SLOT_BYTES, slot * _SLOT_BYTES))

    def _take(self, data: bytes) -> None:
        if len(data) < _SLOT.size + 4 or not data.startswith(_MAGIC):
            return
        self.newest_version = max(self.newest_version, data[len(_MAGIC)])
        if zlib.crc32(data[: _SLOT.size]) != int.from_bytes(data[_SLOT.size : _SLOT.size + 4], "little"):
            return
        _, _, generation, *values = _SLOT.unpack_from(data)
        if generation > self._generation:
            self._generation, self.counts, self.found = generation, Counts(*values), True

    def write(self, counts: Counts, *, sync: bool = False) -> None:
        """Make `counts` survive this process, and with `sync` a power cut. Raises OSError."""
        self.counts = counts
        self._generation += 1
        body = _SLOT.pack(_MAGIC, FORMAT_VERSION, self._generation, *astuple(counts))
        os.pwrite(self._fd, body + struct.pack("<I", zlib.crc32(body)), (self._generation % 2) * _SLOT_BYTES)
        if sync:
            os.fdatasync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def reconciled(counts: Counts, *, spooled_points: int, pending_points: int) -> Counts:
    """The ledger after a restart: what was spooled and is neither done with nor readable is lost."""
    spooled = max(counts.spooled_points, spooled_points)
    done = counts.acked_points + counts.evicted_points + counts.poisoned_points + counts.lost_points
    missing = max(0, spooled - done - pending_points)
    return replace(counts, spooled_points=spooled, lost_points=counts.lost_points + missing)

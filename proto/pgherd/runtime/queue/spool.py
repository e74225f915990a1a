"""The bounded queue on disk between who makes batches and who ships them.

Rules:
- `append` returns after the batch is on disk (fdatasync); a kill -9 at any byte leaves a readable prefix;
- sequences grow by one and are never used twice within an incarnation, over restarts and damage;
- over `size_max` the oldest segment goes, counted; a full disk costs first the oldest segment, then the
  new batch, counted, and never raises into who appends;
- a damaged segment is set aside with its readable prefix kept, counted; a newer format is refused by name.

Synchronous and safe to call from several threads; event loops call it through `asyncio.to_thread`. One shipper.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal, Protocol

import zstandard

from pgherd.proto.clock import Clock
from pgherd.proto.errors import TransientError
from pgherd.runtime.durable import (
    exclusive_lock,
    fsync_directory,
    newer_format,
    private_directory,
    publish,
    publish_json,
    read_json,
    storage_error,
    sweep_temporaries,
)
from pgherd.runtime.logging import get_logger
from pgherd.runtime.queue import ledger as ledger_format
from pgherd.runtime.queue.ledger import Counts, Ledger, reconciled
from pgherd.runtime.queue.segment import (
    FORMAT_VERSION,
    HEADER_BYTES,
    RECORD_OVERHEAD_BYTES,
    RecordRef,
    SegmentHeader,
    Tail,
    decode_header,
    encode_header,
    encode_record,
    is_intact,
    payload_of,
    scan,
)

_FORMAT_NAME: Final = "pgherd-spool"
_SET_ASIDE_MAX: Final = 8  # files kept for a look; they don't count into size_max, they are at most segments
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PAYLOAD_BYTES_MAX: Final = 64 * 1024 * 1024

_log = get_logger(__name__)

Outcome = Literal["acked", "poisoned", "expired"]


class Bounds(Protocol):
    """How big a queue may get. The newest segment alone may be larger, if one batch is."""

    @property
    def size_max(self) -> int: ...

    @property
    def segment_max(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Batch:
    """One spooled request on its way out. `payload` is what was appended."""

    incarnation: str
    sequence: int
    points: int
    appended_unix_ns: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class SpoolStatus:
    """What others may know without waiting for the disk; of the last finished operation."""

    counts: Counts = field(default_factory=Counts)
    size_bytes: int = 0
    pending_batches: int = 0
    oldest_unix_ns: int = 0  # when the oldest waiting batch was appended; 0 when none waits


@dataclass(slots=True)
class _Segment:
    """A segment's facts; its records are only listed while it is the oldest (memory)."""

    path: Path
    header: SegmentHeader
    size: int = HEADER_BYTES
    pending_batches: int = 0
    pending_points: int = 0
    last_sequence: int = 0
    oldest_unix_ns: int = 0
    records: deque[RecordRef] | None = None  # waiting ones, oldest first

    def add(self, record: RecordRef) -> None:
        if not self.pending_batches:
            self.oldest_unix_ns = record.appended_unix_ns
        self.pending_batches += 1
        self.pending_points += record.points
        self.last_sequence = record.sequence
        if self.records is not None:
            self.records.append(record)

    def pop(self) -> RecordRef:
        assert self.records, "only the oldest segment's records are listed"
        record = self.records.popleft()
        self.pending_batches -= 1
        self.pending_points -= record.points
        self.oldest_unix_ns = self.records[0].appended_unix_ns if self.records else 0
        return record


class Spool:
    """See the module's rules. Open with `Spool.open`, end with `close`."""

    def __init__(self, directory: Path, config: Bounds, clock: Clock) -> None:
        self._directory = directory
        self._config = config
        self._clock = clock
        self._stack = contextlib.ExitStack()
        self._mutex = threading.Lock()
        self._segments: deque[_Segment] = deque()
        self._active_fd: int | None = None
        self._compressor = zstandard.ZstdCompressor(level=1)
        self._decompressor = zstandard.ZstdDecompressor()
        self._in_flight: tuple[Batch, ...] = ()
        self._ledger = Ledger(directory / "ledger")
        self.status = SpoolStatus()
        self.incarnation = ""
        self._next_sequence = 1

    @classmethod
    def open(cls, directory: Path, config: Bounds, clock: Clock) -> Spool:
        """Open or create the spool; takes its lock until `close`.

        Raises PreconditionError state.locked, IntegrityError format.newer, TransientError disk.io | disk.full.
        """
        private_directory(directory)
        with contextlib.ExitStack() as stack:
            stack.enter_context(exclusive_lock(directory / "lock", "the spool"))
            try:
                spool = cls(directory, config, clock)
                stack.callback(spool._ledger.close)
                spool._recover()
            except OSError as error:
                raise storage_error(error, directory, "opening the spool") from error
            spool._stack = stack.pop_all()
            return spool

    # ---- the three verbs

    def append(self, payload: bytes, points: int) -> bool:
        """Keep a batch durably; False when there was no room and it was dropped (counted). Never raises OSError."""
        with self._operation():
            packed = self._compressor.compress(payload)
            size = len(packed) + RECORD_OVERHEAD_BYTES
            if size + HEADER_BYTES > self._config.size_max or len(payload) > _PAYLOAD_BYTES_MAX:
                return self._refuse(points, "the batch is larger than the spool")
            while self._size() + size + HEADER_BYTES > self._config.size_max and self._evict_oldest():
                pass
            try:
                self._write(packed, size, points)
            except OSError as error:
                self._give_up_active()
                if error.errno not in _FULL or not self._evict_oldest():
                    return self._refuse(points, error.strerror)
            else:
                return True
            try:  # once more, in the room that the oldest segment left
                self._write(packed, size, points)
            except OSError as error:
                self._give_up_active()
                return self._refuse(points, error.strerror)
            return True

    def head(self) -> Batch | None:
        """The oldest batch that isn't released yet; stays until `release`."""
        return next(iter(self.heads(1, _PAYLOAD_BYTES_MAX)), None)

    def heads(self, batches_max: int, bytes_max: int) -> tuple[Batch, ...]:
        """The oldest batches that aren't released yet, in order; they stay until `release`.

        At least one if any waits, then as many as follow it without a gap in their sequences, in the same segment, within
        both bounds (of payloads).
        """
        with self._operation():
            found: list[Batch] = []
            size = 0
            while (record := self._record(len(found))) is not None and len(found) < batches_max:
                if found and record.sequence != found[-1].sequence + 1:
                    break
                segment = self._segments[0]
                try:
                    payload = self._read(segment, record)
                except (OSError, ValueError, zstandard.ZstdError) as error:
                    if found:  # its turn comes
                        break
                    self._lose(segment, str(error))
                    continue
                size += len(payload)
                if found and size > bytes_max:
                    break
                found.append(
                    Batch(segment.header.incarnation, record.sequence, record.points, record.appended_unix_ns, payload)
                )
            self._in_flight = tuple(found)
            return self._in_flight

    def release(self, batch: Batch, outcome: Outcome) -> None:
        """The other side has it ("acked"), or refuses it for ever ("poisoned": set aside), or it is too old to be of use.

        A batch that was evicted while it was on its way and arrived after all counts as acked.
        """
        self.release_all((batch,), outcome)

    def release_all(self, batches: Sequence[Batch], outcome: Outcome) -> None:
        """`release` for the oldest of those that `heads` gave, in their order."""
        with self._operation():
            if tuple(batches) != self._in_flight[: len(batches)]:
                return
            self._in_flight = self._in_flight[len(batches) :]
            for batch in batches:
                self._release(batch, outcome)
            self._note(self._counts)
            self._drop_finished()

    def _release(self, batch: Batch, outcome: Outcome) -> None:
        counts = self._counts
        record = self._first()
        here = record is not None and record.sequence == batch.sequence
        if not here and outcome != "acked":
            return
        match outcome:
            case "acked":
                counts = replace(
                    counts, acked_points=counts.acked_points + batch.points, acked_batches=counts.acked_batches + 1
                )
            case "poisoned":
                counts = replace(counts, poisoned_points=counts.poisoned_points + batch.points)
                self._set_aside(f"refused-{batch.sequence}.otlp", batch.payload)
            case "expired":
                counts = replace(counts, evicted_points=counts.evicted_points + batch.points)
        if here:
            self._segments[0].pop()
            self._ledger.counts = replace(counts, released_sequence=batch.sequence)
        else:
            self._ledger.counts = replace(counts, evicted_points=counts.evicted_points - batch.points)

    def close(self) -> None:
        """Close files and give the lock back. What waits stays on disk."""
        with self._mutex:
            self._close_active()
            self._stack.close()

    @contextlib.contextmanager
    def _operation(self) -> Iterator[None]:
        with self._mutex:
            try:
                yield
            finally:
                self.status = SpoolStatus(
                    counts=self._counts,
                    size_bytes=self._size(),
                    pending_batches=sum(segment.pending_batches for segment in self._segments),
                    oldest_unix_ns=next((s.oldest_unix_ns for s in self._segments if s.pending_batches), 0),
                )

    @property
    def _counts(self) -> Counts:
        return self._ledger.counts

    def _size(self) -> int:
        return sum(segment.size for segment in self._segments)

    # ---- recovery

    def _recover(self) -> None:
        sweep_temporaries(self._directory)
        self.incarnation = self._identity()
        if self._ledger.newest_version > ledger_format.FORMAT_VERSION:
            raise newer_format(self._directory / "ledger", self._ledger.newest_version, ledger_format.FORMAT_VERSION)
        paths = sorted(self._directory.glob("*.segment"))
        for path in paths:  # refuse before anything is touched
            _refuse_newer(path)
        if not paths and not self._ledger.found:
            self.incarnation = self._renew_identity()  # nothing left tells which sequences were used
        with self._operation():
            counts, spooled = self._counts, 0
            highest = max(counts.released_sequence, counts.last_sequence)
            cuts: list[tuple[Path, int]] = []
            for path in paths:
                loaded = self._load(path, counts.released_sequence)
                if loaded.cut_at is not None:
                    cuts.append((path, loaded.cut_at))
                highest = max(highest, loaded.highest_sequence)
                spooled = max(spooled, loaded.spooled_points)
                counts = replace(counts, corrupt_segments=counts.corrupt_segments + loaded.corrupt)
                if loaded.segment is not None:
                    self._segments.append(loaded.segment)
            self._next_sequence = highest + 1
            pending = sum(segment.pending_points for segment in self._segments)
            counts = replace(counts, last_sequence=highest)
            self._note(reconciled(counts, spooled_points=spooled, pending_points=pending), sync=True)
            for path, end in cuts:  # only now: the ledger remembers which sequences the damage may have held
                os.truncate(path, end)
            self._drop_finished()

    def _identity(self) -> str:
        path = self._directory / "spool.json"
        try:
            return str(read_json(path, format_name=_FORMAT_NAME, newest_version=FORMAT_VERSION)["incarnation"])
        except FileNotFoundError:
            return self._renew_identity()

    def _renew_identity(self) -> str:
        incarnation = str(uuid.uuid4())
        document = {"format": _FORMAT_NAME, "version": FORMAT_VERSION, "incarnation": incarnation}
        publish_json(self._directory / "spool.json", document)
        return incarnation

    def _load(self, path: Path, released: int) -> _Loaded:
        data = path.read_bytes()
        header = decode_header(data)
        first = int(path.stem) if path.stem.isdigit() else 0
        if header is None:
            if len(data) < HEADER_BYTES:  # the writer died while creating it: nothing was in it
                path.unlink()
                return _Loaded(None, first - 1)
            self._set_aside(f"{path.name}.corrupt", data)
            _log.error("spool.segment_corrupt", path=str(path), readable_records=0)
            path.unlink()
            return _Loaded(None, first + len(data) // RECORD_OVERHEAD_BYTES, corrupt=1)
        found, end, tail = scan(data)
        segment = _Segment(path, header, end)
        for record in found:
            if record.sequence > released:
                segment.add(record)
        highest = found[-1].sequence if found else header.first_sequence - 1
        if tail is not Tail.CLEAN:
            highest += 1 + (len(data) - end) // RECORD_OVERHEAD_BYTES  # more can't have been in the unreadable rest
            if tail is Tail.CORRUPT:
                self._set_aside(f"{path.name}.corrupt", data)
                _log.error("spool.segment_corrupt", path=str(path), readable_records=len(found))
        spooled = header.points_before + sum(record.points for record in found)
        return _Loaded(segment, highest, spooled, int(tail is Tail.CORRUPT), None if tail is Tail.CLEAN else end)

    # ---- writing

    def _write(self, packed: bytes, size: int, points: int) -> None:
        if self._active_fd is None or self._segments[-1].size + size > max(self._config.segment_max, HEADER_BYTES + size):
            self._rotate()
        assert self._active_fd is not None
        segment, now = self._segments[-1], self._clock.wall_unix_ns()
        record = RecordRef(segment.size, size, self._next_sequence, points, now, 1)
        _write_all(
            self._active_fd,
            encode_record(packed, sequence=record.sequence, points=points, appended_unix_ns=now, codec=record.codec),
        )
        os.fdatasync(self._active_fd)
        segment.add(record)
        segment.size += size
        self._next_sequence += 1
        counts = self._counts
        self._note(replace(counts, spooled_points=counts.spooled_points + points, last_sequence=record.sequence))

    def _rotate(self) -> None:
        self._close_active()
        first = self._next_sequence
        if self._segments and self._segments[-1].header.first_sequence == first:
            self._segments.pop()  # nothing was written into it; its file is made anew
        header = SegmentHeader(self.incarnation, first, self._counts.spooled_points, self._clock.wall_unix_ns())
        path = self._directory / f"{first:020d}.segment"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            _write_all(fd, encode_header(header))
            os.fdatasync(fd)
            fsync_directory(self._directory)
        except OSError:
            os.close(fd)
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        self._active_fd = fd
        self._segments.append(_Segment(path, header, last_sequence=first - 1))
        self._drop_finished()

    def _give_up_active(self) -> None:
        """After a failed write: cut the segment back to its last whole record; the next append starts another."""
        if self._active_fd is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._active_fd, self._segments[-1].size)
            self._close_active()

    def _close_active(self) -> None:
        if self._active_fd is not None:
            os.close(self._active_fd)
            self._active_fd = None

    # ---- dropping

    def _evict_oldest(self) -> bool:
        """Drop the oldest segment, the active one if it is the only one; False when there is none."""
        if not self._segments:
            return False
        if len(self._segments) == 1:
            self._close_active()
        segment, counts = self._segments[0], self._counts
        released = max(counts.released_sequence, segment.last_sequence)
        evicted = counts.evicted_points + segment.pending_points
        self._note(replace(counts, evicted_points=evicted, released_sequence=released), sync=True)
        self._segments.popleft()
        with contextlib.suppress(FileNotFoundError):
            segment.path.unlink()
        if segment.pending_points:
            _log.warning("spool.evicted", points=segment.pending_points, size_bytes=segment.size)
        return True

    def _drop_finished(self) -> None:
        """Remove segments that hold nothing waiting, except the newest: it tells the next sequence."""
        if len(self._segments) > 1 and not self._segments[0].pending_batches:
            self._note(self._counts, sync=True)
        while len(self._segments) > 1 and not self._segments[0].pending_batches:
            with contextlib.suppress(OSError):
                self._segments[0].path.unlink()
            self._segments.popleft()

    def _refuse(self, points: int, why: str | None) -> bool:
        counts = self._counts
        self._note(replace(counts, refused_points=counts.refused_points + points))
        _log.error("spool.refused", points=points, why=why, hint="free space below the state_directory")
        return False

    def _lose(self, segment: _Segment, why: str) -> None:
        record, counts = segment.pop(), self._counts
        self._note(replace(counts, lost_points=counts.lost_points + record.points, released_sequence=record.sequence))
        _log.error("spool.record_unreadable", path=str(segment.path), sequence=record.sequence, why=why)

    def _note(self, counts: Counts, *, sync: bool = False) -> None:
        try:
            self._ledger.write(counts, sync=sync)
        except OSError as error:  # kept in memory; after a kill the segments tell most of it again
            _log.error("spool.ledger_unwritable", why=error.strerror)

    # ---- reading

    def _first(self) -> RecordRef | None:
        return self._record(0)

    def _record(self, place: int) -> RecordRef | None:
        """The record that has so many waiting ones before it in the oldest segment."""
        while True:
            self._drop_finished()
            if not self._segments or not self._segments[0].pending_batches:
                return None
            segment = self._segments[0]
            if segment.records is None:
                self._list_records(segment)
            if segment.records:
                return segment.records[place] if place < len(segment.records) else None

    def _list_records(self, segment: _Segment) -> None:
        """Read the oldest segment's index; what can't be read any more is lost, counted."""
        released, counts = self._counts.released_sequence, self._counts
        try:
            found, _, _ = scan(segment.path.read_bytes()[: segment.size])
        except OSError:
            found = []
        segment.records = deque(record for record in found if record.sequence > released)
        readable = sum(record.points for record in segment.records)
        if readable != segment.pending_points:
            lost = counts.lost_points + segment.pending_points - readable
            self._note(replace(counts, lost_points=lost, corrupt_segments=counts.corrupt_segments + 1))
            _log.error("spool.segment_corrupt", path=str(segment.path), readable_records=len(segment.records))
        segment.pending_batches, segment.pending_points = len(segment.records), readable

    def _read(self, segment: _Segment, record: RecordRef) -> bytes:
        with segment.path.open("rb") as file:
            file.seek(record.offset)
            data = file.read(record.size)
        if not is_intact(data):
            raise ValueError("the record's checksum doesn't match")
        payload = payload_of(data)
        return payload if record.codec == 0 else self._decompressor.decompress(payload, max_output_size=_PAYLOAD_BYTES_MAX)

    def _set_aside(self, name: str, content: bytes) -> None:
        """Keep bytes for a look, at most `_SET_ASIDE_MAX` files; giving up is no loss."""
        directory = self._directory / "set-aside"
        with contextlib.suppress(OSError, TransientError):
            directory.mkdir(mode=0o700, exist_ok=True)
            publish(directory / name, content)
            for old in sorted(directory.iterdir(), key=lambda path: path.stat().st_mtime_ns)[:-_SET_ASIDE_MAX]:
                old.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What a segment on disk turned out to be; `highest_sequence` bounds every sequence it may ever have held."""

    segment: _Segment | None
    highest_sequence: int
    spooled_points: int = 0
    corrupt: int = 0
    cut_at: int | None = None  # what follows this byte is unreadable


def _refuse_newer(path: Path) -> None:
    with path.open("rb") as file:
        header = decode_header(file.read(HEADER_BYTES))
    if header is not None and header.version > FORMAT_VERSION:
        raise newer_format(path, header.version, FORMAT_VERSION)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]

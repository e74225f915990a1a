"""The agent's memory of its commands: one directory per command, one checksummed line per fact.

    commands/<uuid>/journal.jsonl     {"crc32": "…", "record": {…}} per line, the first with format and version
    commands/<uuid>/result.json       published by the child that executes the command

Durable (fsync) before anything follows from it: an event before it is sent, `starting` before a child is.
A torn last line was never acted upon and is cut off; a damaged line before it stops the agent's commands,
and nothing repairs it. Progress isn't written: its sequence numbers are reserved in blocks, so that an
event after a crash never takes the number of a progress report that was sent before it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pgherd.proto.clock import Clock
from pgherd.proto.commands import Event, Offer
from pgherd.proto.errors import ConfigError, IntegrityError, PeerError, PgherdError, TransientError
from pgherd.runtime.durable import exclusive_lock, fsync_directory, newer_format, private_directory, storage_error

FORMAT = "pgherd.command_journal"
VERSION = 1
PROGRESS_BLOCK = 100_000
UNFINISHED_MAX = 1024

_FILE = "journal.jsonl"
_REMOVED_PREFIX = ".tmp-"
_LINE_HEAD = b'{"crc32":"%08x","record":'
_LINE_HEAD_BYTES = len(_LINE_HEAD % 0)


@dataclass(frozen=True, slots=True)
class Retention:
    """How long finished and acknowledged commands are kept, to know them when they are offered again."""

    finished_max: int = 200
    age_max_s: float = 7 * 86400.0


@dataclass(slots=True)
class Entry:
    """One command as the journal knows it. Read it; only the journal changes it."""

    offer: Offer
    directory: Path
    events: list[Event] = field(default_factory=list)
    acknowledged: set[int] = field(default_factory=set)
    starting: bool = False
    child_pid: int | None = None
    reserved_upto: int = 0
    next_sequence: int = 1
    size_bytes: int = 0

    @property
    def outcome(self) -> Event | None:
        """The final event, if it has one."""
        return next((event for event in self.events if event.final), None)

    @property
    def settled(self) -> bool:
        """Whether the collector has everything."""
        return self.outcome is not None and all(event.sequence in self.acknowledged for event in self.events)

    @property
    def issued_here(self) -> bool:
        """Whether the agent issued it to itself."""
        return bool(self.events) and "issued_here" in self.events[0].body

    @property
    def result_file(self) -> Path:
        return self.directory / "result.json"


class Journal:
    """All commands of this agent. Thread-safe; methods that write block for an fsync: call them in a thread."""

    def __init__(self, directory: Path, clock: Clock, retention: Retention) -> None:
        self._directory = directory
        self._clock = clock
        self._retention = retention
        self._entries: dict[str, Entry] = {}
        self._lock = threading.RLock()
        self._held = contextlib.ExitStack()

    @classmethod
    def open(cls, directory: Path, clock: Clock, retention: Retention | None = None) -> Journal:
        """Read what is there and hold the directory until `close`.

        Raises PreconditionError state.locked while another agent holds it, IntegrityError format.newer
        for a journal that a newer agent wrote, format.corrupt for a damaged one, TransientError disk.*.
        """
        journal = cls(private_directory(directory), clock, retention or Retention())
        journal._held.enter_context(exclusive_lock(directory / ".lock", "the command journal"))
        try:
            for child in sorted(directory.iterdir()):
                if child.name.startswith(_REMOVED_PREFIX):
                    shutil.rmtree(child, ignore_errors=True)
                elif child.is_dir():
                    journal._load(child)
        except BaseException:
            journal.close()
            raise
        journal.prune()
        return journal

    def close(self) -> None:
        """Let go of the directory."""
        self._held.close()

    # ---- reading --------------------------------------------------------------------------------

    def entry(self, command_id: str) -> Entry | None:
        """The command, if it is known here."""
        with self._lock:
            return self._entries.get(command_id)

    def entries(self) -> list[Entry]:
        """All known commands, in order of issue."""
        with self._lock:
            return sorted(self._entries.values(), key=lambda entry: (entry.offer.issued_unix_ns, entry.offer.command_id))

    def unfinished(self) -> list[tuple[str, int]]:
        """(id, last durable sequence) of the commands that the collector may not know the end of."""
        with self._lock:
            return [(id_, entry.events[-1].sequence) for id_, entry in self._entries.items() if not entry.settled]

    def unacknowledged(self) -> list[tuple[Offer, Event]]:
        """Durable events to be sent until they are acknowledged, each command's in order."""
        with self._lock:
            return [
                (entry.offer, event)
                for entry in self._entries.values()
                for event in entry.events
                if event.sequence not in entry.acknowledged
            ]

    # ---- writing --------------------------------------------------------------------------------

    def begin(self, offer: Offer, kind: str, body: Mapping[str, Any] | None = None) -> Entry:
        """Take in a new command with its first event (accepted or rejected); both durable at once.

        Raises TransientError disk.* with nothing kept, store.unavailable when too many commands wait for
        the collector's acknowledgement already.
        """
        with self._lock:
            assert offer.command_id not in self._entries, "the caller looks first"
            if len(self.unfinished()) >= UNFINISHED_MAX:
                raise TransientError(
                    "store.unavailable", f"{UNFINISHED_MAX} commands wait for the collector to acknowledge them"
                )
            entry = Entry(offer, self._directory / offer.command_id)
            opened = {"type": "opened", "format": FORMAT, "version": VERSION, "offer": offer.to_json()}
            event = self._event(entry, kind, body or {})
            reserved = {"type": "reserved", "upto": event.sequence + PROGRESS_BLOCK}
            try:
                entry.directory.mkdir(mode=0o700)
                self._write(entry, [opened, _event_record(event), *([reserved] if not event.final else [])])
                fsync_directory(entry.directory)
                fsync_directory(self._directory)
            except (OSError, PgherdError) as error:
                shutil.rmtree(entry.directory, ignore_errors=True)
                if isinstance(error, OSError):
                    raise storage_error(error, entry.directory, "writing") from error
                raise
            self._take(entry, event)
            entry.reserved_upto = reserved["upto"] if not event.final else event.sequence  # type: ignore[assignment]
            self._entries[offer.command_id] = entry
            return entry

    def append(self, entry: Entry, kind: str, body: Mapping[str, Any]) -> Event:
        """Make the next event of a command durable. Raises TransientError disk.* with nothing kept."""
        with self._lock:
            event = self._event(entry, kind, body)
            self._write(entry, [_event_record(event)])
            self._take(entry, event)
            if event.final and entry.issued_here:
                self.prune()
            return event

    def note_starting(self, entry: Entry) -> None:
        """From now on a child may exist: durable before it does."""
        with self._lock:
            self._write(entry, [{"type": "starting"}])
            entry.starting = True

    def note_child(self, entry: Entry, pid: int) -> None:
        """Which process it is, so that a restarted agent can end it. Not needed to adopt it."""
        with self._lock:
            self._write(entry, [{"type": "child", "pid": pid}])
            entry.child_pid = pid

    def acknowledge(self, command_id: str, sequence: int) -> None:
        """The collector has this event. Not synced: a lost note only means that it is sent again."""
        with self._lock:
            entry = self._entries.get(command_id)
            if entry is None or sequence in entry.acknowledged or sequence not in [event.sequence for event in entry.events]:
                return
            entry.acknowledged.add(sequence)
            with contextlib.suppress(TransientError):  # a full disk must not end the session that brings this
                self._write(entry, [{"type": "acknowledged", "sequence": sequence}], sync=False)
        if entry.settled:
            self.prune()

    def progress_sequence(self, entry: Entry) -> int | None:
        """The number of a progress report; None when the block is used up and reports are left out."""
        with self._lock:
            if entry.next_sequence > entry.reserved_upto:
                return None
            entry.next_sequence += 1
            return entry.next_sequence - 1

    def prune(self) -> int:
        """Remove what is settled and old or too much; returns how many commands.

        Of the finished commands that the agent issued to itself only the newest are kept even when no
        collector has acknowledged them: the schedule goes on without a collector, for years.
        """
        with self._lock:
            settled = [entry for entry in self._entries.values() if entry.settled]
            own = [entry for entry in self._entries.values() if entry.outcome and entry.issued_here and not entry.settled]
            oldest_unix_ns = self._clock.wall_unix_ns() - round(self._retention.age_max_s * 1e9)
            gone = _beyond(settled, self._retention.finished_max, oldest_unix_ns)
            gone += _beyond(own, self._retention.finished_max, None)
            for entry in gone:
                aside = entry.directory.with_name(f"{_REMOVED_PREFIX}{entry.directory.name}")
                try:
                    entry.directory.rename(aside)  # whole or gone, also after a crash in rmtree
                except FileNotFoundError:
                    pass
                except OSError:
                    continue  # it stays known as long as it is there
                shutil.rmtree(aside, ignore_errors=True)
                del self._entries[entry.offer.command_id]
            return len(gone)

    # ---- lines ----------------------------------------------------------------------------------

    def _event(self, entry: Entry, kind: str, body: Mapping[str, Any]) -> Event:
        event = Event(entry.offer.command_id, entry.next_sequence, self._clock.wall_unix_ns(), kind, dict(body))
        event.to_wire(entry.offer.verb)  # what can't be said on the wire must not get into the journal
        return event

    def _take(self, entry: Entry, event: Event) -> None:
        entry.events.append(event)
        entry.next_sequence = event.sequence + 1

    def _write(self, entry: Entry, records: Sequence[Mapping[str, Any]], *, sync: bool = True) -> None:
        path = entry.directory / _FILE
        content = b"".join(_line(record) for record in records)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                os.lseek(fd, entry.size_bytes, os.SEEK_SET)
                view = memoryview(content)
                try:
                    while view:
                        view = view[os.write(fd, view) :]
                    if sync:
                        os.fsync(fd)
                except OSError:
                    with contextlib.suppress(OSError):
                        os.ftruncate(fd, entry.size_bytes)
                    raise
            finally:
                os.close(fd)
        except OSError as error:
            raise storage_error(error, path, "writing") from error
        entry.size_bytes += len(content)

    def _load(self, directory: Path) -> None:
        path = directory / _FILE
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            content = b""
        records, size_bytes = _records(path, content)
        if not records:  # died inside `begin`: nothing followed from it
            shutil.rmtree(directory, ignore_errors=True)
            return
        entry = _entry(path, directory, records)
        if not entry.events:
            shutil.rmtree(directory, ignore_errors=True)
            return
        entry.size_bytes = size_bytes
        if size_bytes != len(content):
            os.truncate(path, size_bytes)
        entry.next_sequence = max(entry.reserved_upto, entry.events[-1].sequence) + 1
        if entry.outcome is None:  # progress may go on after an adoption: a new block for it
            upto = entry.next_sequence + PROGRESS_BLOCK
            self._write(entry, [{"type": "reserved", "upto": upto}])
            entry.reserved_upto = upto
        self._entries[entry.offer.command_id] = entry


def _beyond(entries: Sequence[Entry], count_max: int, oldest_unix_ns: int | None) -> list[Entry]:
    """Those of `entries` that aren't among the newest `count_max`, or ended before `oldest_unix_ns`."""
    newest_first = sorted(entries, key=lambda entry: entry.events[-1].unix_ns, reverse=True)
    return [
        entry
        for index, entry in enumerate(newest_first)
        if index >= count_max or (oldest_unix_ns is not None and entry.events[-1].unix_ns < oldest_unix_ns)
    ]


def _event_record(event: Event) -> dict[str, Any]:
    return {
        "type": "event",
        "sequence": event.sequence,
        "unix_ns": event.unix_ns,
        "kind": event.kind,
        "body": dict(event.body),
    }


def _line(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode()
    return (_LINE_HEAD % zlib.crc32(text)) + text + b"}\n"


def _read_line(line: bytes) -> dict[str, Any] | None:
    text = line[_LINE_HEAD_BYTES:-1]
    if line != (_LINE_HEAD % zlib.crc32(text)) + text + b"}":
        return None
    record = json.loads(text)
    return record if isinstance(record, dict) else None


def _records(path: Path, content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The whole lines and their size; a bad last line was torn. Raises IntegrityError format.corrupt | format.newer."""
    records: list[dict[str, Any]] = []
    size_bytes = 0
    lines = content.split(b"\n")
    for index, line in enumerate(lines[:-1]):  # what follows the last newline is torn or empty
        record = _read_line(line)
        if record is None:
            if index == len(lines) - 2 and not lines[-1]:
                break
            raise _corrupt(path, f"line {index + 1} is damaged")
        if index == 0:
            _check_format(path, record)
        records.append(record)
        size_bytes += len(line) + 1
    return records, size_bytes


def _check_format(path: Path, record: Mapping[str, Any]) -> None:
    version = record.get("version")
    if record.get("format") != FORMAT or not isinstance(version, int):
        raise _corrupt(path, "its first line doesn't name the format")
    if version > VERSION:
        raise newer_format(path, version, VERSION)


def _entry(path: Path, directory: Path, records: Sequence[Mapping[str, Any]]) -> Entry:
    try:
        entry = Entry(Offer.from_json(records[0]["offer"]), directory)
        if entry.offer.command_id != directory.name:
            raise _corrupt(path, f"it belongs to the command {entry.offer.command_id}")
        for record in records[1:]:
            match record["type"]:
                case "event":
                    event = Event(entry.offer.command_id, record["sequence"], record["unix_ns"], record["kind"], record["body"])
                    entry.events.append(event)
                case "starting":
                    entry.starting = True
                case "child":
                    entry.child_pid = record["pid"]
                case "reserved":
                    entry.reserved_upto = record["upto"]
                case "acknowledged":
                    entry.acknowledged.add(record["sequence"])
                case unknown:
                    raise _corrupt(path, f"a record of unknown type {unknown!r}")
    except (KeyError, TypeError, ValueError, PeerError, ConfigError) as error:
        raise _corrupt(path, f"a record isn't complete ({error})") from error
    return entry


def _corrupt(path: Path, why: str) -> IntegrityError:
    return IntegrityError(
        "format.corrupt",
        f"{path}: {why}",
        hint=f"look at it, then move {path.parent} out of the way; the command may have run",
        path=str(path),
    )

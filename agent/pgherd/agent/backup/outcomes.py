"""What became of a node's last backup, verification and restore: small files that the verbs publish.

The resident can't open a repository (its libraries are too heavy for it), and what it saw itself wouldn't survive a
restart: so each verb leaves its last success and its last failure in a file of its own, replaced whole. Whoever ran
it, schedule, collector or a person at a shell, it counts.

Format pgherd.outcome v1 (docs/formats/state-v1.md): `outcomes/<node UUID>/<verb>.succeeded.json` and
`<verb>.failed.json`. While a verb runs it holds a lock on `<verb>.running`, and it removes that file whatever its end. One that
nobody holds was left by a process that couldn't (SIGKILL, out of memory, a reboot): a failure, as of the file's time, its start.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pgherd.proto.clock import Clock
from pgherd.proto.errors import DeniedError, IntegrityError, PgherdError
from pgherd.runtime.durable import exclusive_lock, private_directory, publish_json, read_json, storage_error
from pgherd.runtime.logging import get_logger

FORMAT: Final = "pgherd.outcome"
VERSION: Final = 1

OutcomeVerb = Literal["run", "verify", "restore"]
VERBS: Final[tuple[OutcomeVerb, ...]] = ("run", "verify", "restore")

_NOT_TRIED: Final = ("usage.invalid", "state.locked", "backup.not_found")  # says something of the question, not of backups

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Success:
    """A verb's last success. `data_unix_ns`: the snapshot's time (of a run); `stored_bytes` and `complete` too."""

    finished_unix_ns: int
    duration_s: float
    grade: str
    data_unix_ns: int = 0
    stored_bytes: int = 0
    complete: bool = True


@dataclass(frozen=True, slots=True)
class Outcomes:
    """All that is known of one node."""

    succeeded: Mapping[OutcomeVerb, Success]
    failed_unix_ns: Mapping[OutcomeVerb, int]


def outcome_directory(state_directory: Path, node_id: str) -> Path:
    return state_directory / "outcomes" / node_id


@contextlib.contextmanager
def recording(directory: Path, verb: OutcomeVerb, clock: Clock) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Inside, call the yielded function with the verb's result; a PgherdError is recorded as its failure.

    A record that can't be written is logged and costs nothing else.
    """
    started_mono_s = clock.mono_s()

    def succeeded(result: Mapping[str, Any]) -> None:
        document: dict[str, Any] = {"duration_s": clock.mono_s() - started_mono_s, "grade": result["grade"]}
        if verb == "run":
            document |= {
                "data_unix_ns": result["started_unix_ns"],
                "stored_bytes": result["stored_bytes"],
                "complete": result["complete"],
            }
        _publish(directory, f"{verb}.succeeded.json", {"finished_unix_ns": clock.wall_unix_ns(), **document})

    try:
        with _running(directory, verb):
            yield succeeded
    except PgherdError as error:
        if error.code not in _NOT_TRIED and not isinstance(error, DeniedError):
            _publish(directory, f"{verb}.failed.json", {"finished_unix_ns": clock.wall_unix_ns(), "code": error.code})
        raise


@contextlib.contextmanager
def _running(directory: Path, verb: OutcomeVerb) -> Iterator[None]:
    """Leave a trace inside, for an end that can't be recorded; one that an earlier process left becomes its failure."""
    with contextlib.ExitStack() as held:
        try:
            _begin(held, directory, verb)
        except PgherdError as error:  # another one runs, or there is no room: this one goes without
            _log.warning("backup.running_not_marked", verb=verb, code=error.code, why=error.message)
        yield


def _begin(held: contextlib.ExitStack, directory: Path, verb: OutcomeVerb) -> None:
    path = private_directory(directory) / f"{verb}.running"
    fd = held.enter_context(exclusive_lock(path, f"the mark of a running {verb}"))
    held.callback(path.unlink, missing_ok=True)  # before the lock goes
    left = os.fstat(fd)
    if left.st_size:
        _publish(directory, f"{verb}.failed.json", {"finished_unix_ns": left.st_mtime_ns, "code": "command.interrupted"})
    try:
        os.pwrite(fd, b"running\n", 0)  # a file without content is one that isn't locked yet
    except OSError as error:
        raise storage_error(error, path, "writing") from error


def _left_unix_ns(path: Path) -> int | None:
    """When a run began that ended without a word; None while it runs, or when there is none."""
    try:
        with open(path, "rb") as left:
            fcntl.flock(left, fcntl.LOCK_SH | fcntl.LOCK_NB)
            found = os.fstat(left.fileno())
    except (FileNotFoundError, BlockingIOError):
        return None
    except OSError as error:
        _log.warning("backup.outcome_unreadable", path=str(path), why=str(error))
        return None
    return found.st_mtime_ns if found.st_nlink and found.st_size else None


def _publish(directory: Path, name: str, body: Mapping[str, Any]) -> None:
    try:
        private_directory(directory)
        publish_json(directory / name, {"format": FORMAT, "version": VERSION, **body})
    except PgherdError as error:
        _log.warning("backup.outcome_not_recorded", file=name, code=error.code, why=error.message)


def read_outcomes(directory: Path) -> Outcomes:
    """What is recorded. A file that is damaged, newer or unreadable is as if it weren't there, and logged."""
    succeeded: dict[OutcomeVerb, Success] = {}
    failed: dict[OutcomeVerb, int] = {}
    for verb in VERBS:
        if (document := _document(directory / f"{verb}.succeeded.json")) is not None:
            with contextlib.suppress(KeyError, TypeError, ValueError):
                succeeded[verb] = Success(
                    finished_unix_ns=int(document["finished_unix_ns"]),
                    duration_s=float(document["duration_s"]),
                    grade=str(document["grade"]),
                    data_unix_ns=int(document.get("data_unix_ns", 0)),
                    stored_bytes=int(document.get("stored_bytes", 0)),
                    complete=bool(document.get("complete", True)),
                )
        if (document := _document(directory / f"{verb}.failed.json")) is not None:
            with contextlib.suppress(KeyError, TypeError, ValueError):
                failed[verb] = int(document["finished_unix_ns"])
        if (left_unix_ns := _left_unix_ns(directory / f"{verb}.running")) is not None:
            failed[verb] = max(left_unix_ns, failed.get(verb, 0))
    return Outcomes(succeeded, failed)


def _document(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path, format_name=FORMAT, newest_version=VERSION)
    except FileNotFoundError:
        return None
    except (IntegrityError, OSError) as error:
        _log.warning("backup.outcome_unreadable", path=str(path), why=str(error))
        return None

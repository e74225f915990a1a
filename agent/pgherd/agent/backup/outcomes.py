"""What became of a node's last backup, verification and restore: small files that the verbs publish.

The resident can't open a repository (its libraries are too heavy for it), and what it saw itself wouldn't survive a
restart: so each verb leaves its last success and its last failure in a file of its own, replaced whole. Whoever ran
it, schedule, collector or a person at a shell, it counts.

Format pgherd.outcome v1 (docs/formats/state-v1.md): `outcomes/<node UUID>/<verb>.succeeded.json` and
`<verb>.failed.json`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pgherd.proto.clock import Clock
from pgherd.proto.errors import DeniedError, IntegrityError, PgherdError
from pgherd.runtime.durable import private_directory, publish_json, read_json
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
        yield succeeded
    except PgherdError as error:
        if error.code not in _NOT_TRIED and not isinstance(error, DeniedError):
            _publish(directory, f"{verb}.failed.json", {"finished_unix_ns": clock.wall_unix_ns(), "code": error.code})
        raise


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
    return Outcomes(succeeded, failed)


def _document(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path, format_name=FORMAT, newest_version=VERSION)
    except FileNotFoundError:
        return None
    except (IntegrityError, OSError) as error:
        _log.warning("backup.outcome_unreadable", path=str(path), why=str(error))
        return None

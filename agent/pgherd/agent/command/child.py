"""A child process that outlives its agent: started apart, found again by its lock, judged by its result file.

The agent takes `child.lock` before the child exists and hands the descriptor over; the lock then lives
exactly as long as the child, however the agent ends, and without the child's help. Output goes to files,
because a pipe would kill the child together with its reader.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pgherd.proto.errors import ConfigError, PreconditionError
from pgherd.runtime.durable import is_locked, storage_error
from pgherd.runtime.logging import redact

_TAIL_BYTES = 64 * 1024
_STDERR_LINES = 20
_OUTPUT = "output.ndjson"
_STDERR = "stderr.txt"
_LOCK = "child.lock"


def child_alive(directory: Path) -> bool:
    """Whether the child of this command still runs (its own lock on the result file counts as well)."""
    return is_locked(directory / _LOCK) or is_locked(directory / "result.json.lock")


class DetachedChild:
    """The child of one command. Use from one thread at a time."""

    def __init__(self, directory: Path, process: subprocess.Popen[bytes] | None, pid: int | None) -> None:
        self._directory = directory
        self._process = process
        self.pid = pid
        self._read_bytes = 0
        self.status: int | None = None  # known of our own children only; negative = killed by that signal

    @classmethod
    def start(cls, argv: Sequence[str], directory: Path, environment: Mapping[str, str]) -> DetachedChild:
        """Start `argv` in `directory` as a session of its own.

        Raises ConfigError child.missing, PreconditionError state.locked while an earlier child lives,
        TransientError disk.*.
        """
        for leftover in ("result.json", _OUTPUT, _STDERR):
            (directory / leftover).unlink(missing_ok=True)
        try:
            lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise storage_error(error, directory / _LOCK, "creating") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with open(directory / _OUTPUT, "wb") as output, open(directory / _STDERR, "wb") as errors:
                process = subprocess.Popen(
                    list(argv),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=errors,
                    env=dict(environment),
                    cwd=directory,
                    start_new_session=True,
                    pass_fds=(lock,),
                )
        except BlockingIOError as error:
            raise PreconditionError("state.locked", "the command's child still runs", path=str(directory / _LOCK)) from error
        except (FileNotFoundError, PermissionError) as error:
            raise ConfigError("child.missing", f"can't start {argv[0]}: {error.strerror}") from error
        except OSError as error:
            raise storage_error(error, directory, "starting a child in") from error
        finally:
            os.close(lock)
        return cls(directory, process, process.pid)

    @classmethod
    def adopt(cls, directory: Path, pid: int | None) -> DetachedChild:
        """A child that an earlier agent started and that still holds its lock."""
        return cls(directory, None, pid)

    def ended(self) -> bool:
        """Whether it has ended; then what it left behind of its session is ended too."""
        if self._process is None:
            return not child_alive(self._directory)
        if self.status is not None:
            return True
        # Look without reaping: the group id can't be reused while its leader is a zombie.
        if os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return False
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self.status = self._process.wait()
        return True

    def terminate(self) -> None:
        """Ask it to end (SIGTERM), so that it ends its own children."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it and its whole session now."""
        if self.pid is not None and not self.ended():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self.pid is not None and not self.ended():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, number)

    def progress(self) -> dict[str, Any] | None:
        """The newest progress report since the last call, or None."""
        try:
            with open(self._directory / _OUTPUT, "rb") as output:
                size_bytes = output.seek(0, os.SEEK_END)
                output.seek(max(self._read_bytes, size_bytes - _TAIL_BYTES))
                content = output.read(_TAIL_BYTES)
        except OSError:
            return None
        whole, newline, _ = content.rpartition(b"\n")
        if not newline:
            return None
        self._read_bytes = max(self._read_bytes, size_bytes - len(content)) + len(whole) + 1
        for line in reversed(whole.split(b"\n")):
            report = _progress_of(line)
            if report is not None:
                return report
        return None

    def stderr_tail(self) -> str:
        """Its last lines on stderr, without secrets."""
        try:
            with open(self._directory / _STDERR, "rb") as errors:
                errors.seek(max(0, errors.seek(0, os.SEEK_END) - _TAIL_BYTES))
                lines = errors.read(_TAIL_BYTES).decode("utf-8", "replace").splitlines()
        except OSError:
            return ""
        return redact("\n".join(lines[-_STDERR_LINES:]))

    def sweep(self) -> None:
        """Remove what only mattered while it ran."""
        for leftover in (_OUTPUT, _STDERR, _LOCK, "result.json.lock"):
            with contextlib.suppress(OSError):
                (self._directory / leftover).unlink()


def _progress_of(line: bytes) -> dict[str, Any] | None:
    """A `{"progress": {...}}` line as the body of a progress event; None for any other line."""
    try:
        report = json.loads(line)["progress"]
        done, total = int(report["done"]), int(report["total"])
        phase, unit = str(report["phase"])[:64], str(report["unit"])[:16]
    except (ValueError, KeyError, TypeError, IndexError):
        return None
    if not (0 <= done < 2**63 and 0 <= total < 2**63):
        return None
    return {"phase": phase, "done": done, "total": total, "unit": unit}

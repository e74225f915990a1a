"""Child processes whose end is judged: exit status and stderr, deadline, no shell, clean environment.

A pipe of a shell hides the failure of all but its last command (a failing `pg_dump | gzip` exits with
0 and leaves a 20-byte backup); here every child is started alone and every status is looked at.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pgherd.proto.errors import ConfigError, PreconditionError, TransientError

_STDERR_LINES_MAX = 200
_TERMINATE_GRACE_S = 10.0


@dataclass(frozen=True, slots=True)
class Finished:
    """A child that ended: its status (negative = killed by that signal) and stderr's last lines."""

    argv: tuple[str, ...]
    status: int
    stdout: bytes
    stderr_lines: tuple[str, ...]

    @property
    def program(self) -> str:
        return Path(self.argv[0]).name

    def require_success(self, *, warnings_allowed: bool = True, hint: str = "") -> Finished:
        """Return self, or raise PreconditionError child.failed (status ≠ 0) or child.warned.

        With `warnings_allowed=False` any line on stderr counts as a warning.
        """
        tail = "\n".join(self.stderr_lines[-20:])
        if self.status != 0:
            how = f"was killed by signal {-self.status}" if self.status < 0 else f"exited with status {self.status}"
            last = self.stderr_lines[-1] if self.stderr_lines else "no message"
            raise PreconditionError("child.failed", f"{self.program} {how}: {last}", hint=hint, status=self.status, stderr=tail)
        if self.stderr_lines and not warnings_allowed:
            raise PreconditionError("child.warned", f"{self.program} warned: {self.stderr_lines[0]}", hint=hint, stderr=tail)
        return self


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """A child's environment: PATH, locale C.UTF-8, HOME, and `extra`; no inherited PG* or credentials."""
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8", "GRPC_ENABLE_FORK_SUPPORT": "0"}
    for name in ("HOME", "LD_LIBRARY_PATH", "TMPDIR", "TZ"):
        if name in os.environ:
            environment[name] = os.environ[name]
    environment.update(extra or {})
    return environment


class Child:
    """A running child with its stderr drained into a bounded tail by a thread of its own."""

    def __init__(self, process: subprocess.Popen[bytes], argv: tuple[str, ...]) -> None:
        self._process = process
        self._argv = argv
        self._stderr: deque[str] = deque(maxlen=_STDERR_LINES_MAX)
        self._drain = threading.Thread(target=self._drain_stderr, name=f"stderr-{process.pid}", daemon=True)
        self._drain.start()

    def _drain_stderr(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._stderr.append(line.decode("utf-8", "replace").rstrip())

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def stdout(self) -> IO[bytes]:
        """The child's output; read it to the end before `wait` when it was asked for."""
        assert self._process.stdout is not None, "start the child with capture_stdout=True"
        return self._process.stdout

    @property
    def stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None, "start the child with pipe_stdin=True"
        return self._process.stdin

    def poll(self) -> int | None:
        """Exit status if the child has ended, else None."""
        return self._process.poll()

    def wait(self, timeout_s: float, stdout: bytes = b"") -> Finished:
        """Wait for the end and collect stderr. Raises TransientError child.timeout after ending it."""
        try:
            status = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            self.end()
            raise TransientError(
                "child.timeout", f"{Path(self._argv[0]).name} didn't finish within {timeout_s:g} s", timeout_s=timeout_s
            ) from error
        self._drain.join(5.0)
        return Finished(self._argv, status, stdout, tuple(self._stderr))

    def end(self) -> int:
        """SIGTERM, ten seconds' grace, SIGKILL; returns the status. Safe to call on a dead child."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_TERMINATE_GRACE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        return self._process.wait()

    def close(self) -> None:
        """End the child and release its pipes."""
        self.end()
        self._drain.join(5.0)
        for stream in (self._process.stdout, self._process.stdin, self._process.stderr):
            if stream is not None:
                with suppress(OSError):  # a broken stdin pipe complains once more when closed
                    stream.close()


@contextmanager
def running(
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    capture_stdout: bool = False,
    pipe_stdin: bool = False,
    user: str | int | None = None,
    group: str | int | None = None,
    new_session: bool = False,
) -> Iterator[Child]:
    """Start a child; on leaving the block it is ended if it still runs.

    `new_session` keeps a terminal's Ctrl-C from it: the parent ends it in its own order.

    `argv[0]` is an absolute path or a name on PATH. `env` replaces the environment (default:
    `clean_environment()`). Raises ConfigError child.missing when the program isn't there.
    """
    arguments = tuple(str(part) for part in argv)
    try:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE if pipe_stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE if capture_stdout else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=dict(env) if env is not None else clean_environment(),
            cwd=cwd,
            user=user,
            group=group,
            extra_groups=[] if user is not None else None,
            start_new_session=new_session,
        )
    except (FileNotFoundError, PermissionError) as error:
        raise ConfigError(
            "child.missing",
            f"can't start {arguments[0]}: {error.strerror}",
            hint="install it or state its path in the configuration",
        ) from error
    child = Child(process, arguments)
    try:
        yield child
    finally:
        child.close()


def run(
    argv: Sequence[str | Path],
    *,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    input_bytes: bytes | None = None,
    stdout_bytes_max: int = 64 * 1024 * 1024,
    user: str | int | None = None,
    group: str | int | None = None,
) -> Finished:
    """Run a child to its end and return how it went (the caller judges with `require_success`).

    Raises TransientError child.timeout, ConfigError child.missing. Output beyond `stdout_bytes_max` is
    an error (child.failed): for streams use `running`.
    """
    with running(
        argv, env=env, cwd=cwd, capture_stdout=True, pipe_stdin=input_bytes is not None, user=user, group=group
    ) as child:
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            child.end()

        timer = threading.Timer(timeout_s, expire)
        timer.daemon = True
        timer.start()
        try:
            if input_bytes is not None:
                with suppress(BrokenPipeError):  # the child ended early; its status tells why
                    child.stdin.write(input_bytes)
                    child.stdin.close()
            output = child.stdout.read(stdout_bytes_max + 1)
        finally:
            timer.cancel()
        if expired.is_set():
            raise TransientError("child.timeout", f"{argv[0]} didn't finish within {timeout_s:g} s", timeout_s=timeout_s)
        if len(output) > stdout_bytes_max:
            raise PreconditionError(
                "child.failed", f"{argv[0]} wrote more than {stdout_bytes_max} bytes", limit_bytes=stdout_bytes_max
            )
        return child.wait(timeout_s, output)

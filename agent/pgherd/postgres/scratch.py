"""Throwaway servers: initdb and `postgres` as a direct child, gone without a trace at the end.

A workspace is a directory with a lock file beside it that its process holds for as long as it lives;
`sweep` removes the workspaces of processes that died, after ending the server that such a process left
behind (a postmaster outlives its parent's kill -9). Servers listen on a UNIX socket in a 0700
directory of their own OS user and nowhere else, and their configuration is written from nothing:
no restored postgresql.auto.conf, preload or archive command is ever taken over.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from pgherd.postgres.binaries import Binaries, staged
from pgherd.postgres.os_user import OsUser
from pgherd.proto.errors import ConfigError, PgherdError, PreconditionError
from pgherd.runtime.durable import exclusive_lock, storage_error
from pgherd.runtime.process import Child, running
from pgherd.runtime.process import run as run_child

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
_SOCKET_PATH_BYTES_MAX = 107  # sockaddr_un on Linux, without the final NUL
_PREFIX = "s-"

# Nobody's data depends on a scratch server surviving a crash: speed over durability.
UNSAFE_SETTINGS: Mapping[str, str] = {
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "autovacuum": "off",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "1h",
}


# ---- workspaces ---------------------------------------------------------------------------------


@contextlib.contextmanager
def workspace(parent: Path) -> Iterator[Path]:
    """A new directory below `parent`, removed at the end; swept later if this process is killed.

    0711, so that a server's own OS user can pass through it. Raises TransientError disk.io | disk.full.
    """
    try:
        parent.mkdir(mode=0o711, parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, parent, "creating") from error
    name = f"{_PREFIX}{secrets.token_hex(3)}"
    directory, lock = parent / name, parent / f"{name}.lock"
    with exclusive_lock(lock, f"the workspace {directory}"):
        directory.mkdir(mode=0o711)
        directory.chmod(0o711)  # whatever the umask
        try:
            yield directory
        finally:
            _remove(directory)
            lock.unlink(missing_ok=True)


def sweep(parent: Path) -> int:
    """Remove workspaces whose process is gone, ending servers they left behind; returns how many."""
    count = 0
    for lock in sorted(parent.glob(f"{_PREFIX}*.lock")):
        directory = lock.with_suffix("")
        try:
            with exclusive_lock(lock, f"the workspace {directory}"):
                if directory.exists():
                    _remove(directory)
                    count += 1
                lock.unlink(missing_ok=True)
        except PgherdError:
            continue  # its process lives, or it isn't ours
    return count


def _remove(directory: Path) -> None:
    for pid_file in [pid for depth in ("", "*/", "*/*/") for pid in directory.glob(f"{depth}postmaster.pid")]:
        _end_orphan(pid_file)
    shutil.rmtree(directory, ignore_errors=True)


def _end_orphan(pid_file: Path) -> None:
    """End the postmaster that runs on this data directory, after making sure that the pid is really it."""
    try:
        process = psutil.Process(int(pid_file.read_text(encoding="ascii").split("\n", 1)[0]))
        if str(pid_file.parent) not in process.cmdline():
            return
        process.send_signal(signal.SIGQUIT)
        process.wait(10.0)
    except psutil.TimeoutExpired:
        process.kill()
    except (OSError, ValueError, psutil.NoSuchProcess):
        return


# ---- servers ------------------------------------------------------------------------------------


def initdb(
    binaries: Binaries,
    data_directory: Path,
    user: OsUser,
    *,
    superuser: str = "postgres",
    encoding: str = "UTF8",
    locale: str = "C",
    checksums: bool = True,
) -> None:
    """Create an empty cluster that trusts its socket. Raises PreconditionError postgres.start_failed."""
    data_directory.mkdir(mode=0o700)
    user.own(data_directory)
    argv: list[str | Path] = [binaries.program("initdb"), "-D", data_directory, "-U", superuser, "-A", "trust"]
    argv += ["-E", encoding, f"--locale={locale}", "--no-sync"]
    if checksums:
        argv.append("--data-checksums")
    elif binaries.major >= 18:  # on by default since
        argv.append("--no-data-checksums")
    finished = run_child(argv, timeout_s=120.0, cwd=data_directory, user=user.child_user, group=user.child_group)
    if finished.status != 0:
        raise PreconditionError(
            "postgres.start_failed",
            f"initdb exited with status {finished.status}: {(finished.stderr_lines or ('no message',))[-1]}",
            hint=f"check that user {user.name} can reach {data_directory} and that it has room",
            stderr="\n".join(finished.stderr_lines[-20:]),
        )


def write_settings(data_directory: Path, settings: Mapping[str, str], user: OsUser) -> None:
    """Replace postgresql.conf by exactly `settings`, and empty postgresql.auto.conf."""
    lines = [f"{name} = '{value.replace(chr(39), chr(39) * 2)}'\n" for name, value in settings.items()]
    for name, text in (("postgresql.conf", "".join(lines)), ("postgresql.auto.conf", "")):
        write_file(data_directory / name, text, user)


def write_file(path: Path, text: str, user: OsUser) -> None:
    """Replace a file of `user` in a directory of `user` (0600). Raises TransientError disk.io | disk.full.

    What runs as that user, restored functions included, may have put a symbolic link there: a link is
    replaced, never followed, since we may be root.
    """
    temporary = path.with_name(f".tmp-{secrets.token_hex(8)}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(fd, "w", encoding="utf-8") as file:
            if user.dropped:
                os.fchown(fd, user.uid, user.gid)
            file.write(text)
            file.flush()
            os.fsync(fd)
        temporary.rename(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise storage_error(error, path, "writing") from error


def usable_by(binaries: Binaries, user: OsUser, directory: Path) -> Binaries:
    """`binaries`, or a copy of them below `directory` when `user` can't reach the originals."""
    return binaries if user.reaches(binaries.program("postgres")) else staged(binaries, directory)


class PostgresProcess:
    """A running `postgres` that is our direct child; use through `serving`."""

    def __init__(self, child: Child, data_directory: Path) -> None:
        self._child = child
        self.data_directory = data_directory

    @property
    def pid(self) -> int:
        return self._child.pid

    def running(self) -> bool:
        return self._child.poll() is None

    def wait_ready(self, timeout_s: float) -> None:
        """Until it accepts connections (what pg_ctl -w looks at). Raises PreconditionError postgres.start_failed."""
        deadline_mono_s = time.monotonic() + timeout_s
        while not self._ready():
            if not self.running():
                raise self._start_failed("ended while starting")
            if time.monotonic() > deadline_mono_s:
                self._child.end()
                raise self._start_failed(f"didn't accept connections within {timeout_s:g} s")
            time.sleep(0.02)

    def _ready(self) -> bool:
        try:
            lines = (self.data_directory / "postmaster.pid").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[0] == str(self.pid) and lines[7].strip() in ("ready", "standby")

    def _start_failed(self, how: str) -> PreconditionError:
        finished = self._child.wait(STOP_TIMEOUT_S)
        tail = "\n".join(finished.stderr_lines[-20:])
        last = next((line for line in reversed(finished.stderr_lines) if "FATAL" in line or "PANIC" in line), "")
        return PreconditionError(
            "postgres.start_failed",
            f"the server in {self.data_directory} {how}{': ' + last if last else ''}",
            hint="read its last log lines above",
            stderr=tail,
        )

    def stop(self, *, immediate: bool = False, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Fast shutdown (clean data directory) or immediate (throwaway); returns the exit status."""
        if self.running():
            os.kill(self.pid, signal.SIGQUIT if immediate else signal.SIGINT)
            with contextlib.suppress(PgherdError):  # child.timeout: it has been killed by then
                return self._child.wait(timeout_s).status
        return self._child.end()


@contextlib.contextmanager
def serving(
    binaries: Binaries,
    data_directory: Path,
    user: OsUser,
    *,
    start_timeout_s: float = START_TIMEOUT_S,
    immediate_stop: bool = False,
) -> Iterator[PostgresProcess]:
    """Run `postgres` on a data directory while inside. Raises PreconditionError postgres.start_failed."""
    argv: list[str | Path] = [binaries.program("postgres"), "-D", data_directory]
    with running(argv, cwd=data_directory, user=user.child_user, group=user.child_group) as child:
        process = PostgresProcess(child, data_directory)
        process.wait_ready(start_timeout_s)
        try:
            yield process
        finally:
            process.stop(immediate=immediate_stop)


@dataclass(frozen=True, slots=True)
class ScratchServer:
    """A throwaway server: reachable only by us, as its bootstrap superuser, over its socket."""

    binaries: Binaries
    data_directory: Path
    socket_directory: Path
    superuser: str
    process: PostgresProcess

    def conninfo(self, dbname: str = "postgres") -> str:
        """libpq keywords of a superuser connection; nothing secret in them."""
        from psycopg.conninfo import make_conninfo

        return make_conninfo(
            "", host=str(self.socket_directory), port=5432, user=self.superuser, dbname=dbname, options=_SESSION_OPTIONS
        )


# Restored settings of databases and roles hold for our sessions, too: they must not make them read-only or
# another role's, nor load a library into them.
_SESSION_OPTIONS = "-c default_transaction_read_only=off -c role=none -c session_preload_libraries= -c local_preload_libraries="


@contextlib.contextmanager
def socket_directory(preferred: Path, user: OsUser) -> Iterator[Path]:
    """A 0700 directory of `user` whose sockets' paths are short enough; below `preferred` if that is."""
    path = preferred / "run"
    temporary: Path | None = None
    if len(os.fsencode(path / ".s.PGSQL.65535.lock")) > _SOCKET_PATH_BYTES_MAX:
        temporary = Path(tempfile.mkdtemp(prefix="pgh-"))
        temporary.chmod(0o711)
        path = temporary / "run"
    path.mkdir(mode=0o700)
    user.own(path)
    try:
        yield path
    finally:
        shutil.rmtree(temporary or path, ignore_errors=True)


@contextlib.contextmanager
def scratch_server(
    binaries: Binaries,
    *,
    parent: Path,
    user: OsUser,
    superuser: str = "postgres",
    settings: Mapping[str, str] | None = None,
    start_timeout_s: float = START_TIMEOUT_S,
) -> Iterator[ScratchServer]:
    """An empty server in a workspace below `parent`, unsafe and fast; stopped and removed at the end.

    Raises PreconditionError postgres.start_failed; ConfigError config.invalid when `user` can't reach
    `parent`; TransientError disk.io | disk.full.
    """
    with workspace(parent) as directory, socket_directory(directory, user) as sockets:
        if not user.reaches(directory / "data"):
            raise ConfigError(
                "config.invalid",
                f"user {user.name} can't reach {parent}",
                hint="state a backup.scratch_directory whose parents let others pass (chmod o+x)",
            )
        usable = usable_by(binaries, user, directory)
        data_directory = directory / "data"
        initdb(usable, data_directory, user, superuser=superuser)
        write_settings(data_directory, {**UNSAFE_SETTINGS, **socket_settings(sockets), **(settings or {})}, user)
        with serving(usable, data_directory, user, start_timeout_s=start_timeout_s, immediate_stop=True) as process:
            yield ScratchServer(usable, data_directory, sockets, superuser, process)


def socket_settings(sockets: Path) -> dict[str, str]:
    """Settings of a server that only its own socket reaches."""
    return {
        "listen_addresses": "",
        "unix_socket_directories": str(sockets),
        "unix_socket_permissions": "0700",
        "port": "5432",
        "archive_mode": "off",
        "shared_preload_libraries": "",
        "logging_collector": "off",
        "log_timezone": "UTC",
        "timezone": "UTC",
        "cluster_name": "pgherd scratch",
    }

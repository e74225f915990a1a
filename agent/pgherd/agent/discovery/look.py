"""Look for PostgreSQL servers on this host, with what this user may see. Changes nothing, reads no secret.

A socket's listener is known from the kernel (SO_PEERCRED) to every user; nothing is sent over it, and a server
says nothing of a caller who leaves without a word. Programs that are found are never run: whoever may name
a process `postgres` must not make root execute a file of theirs.
"""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import psutil

from pgherd.agent.discovery.merge import ClusterClue, Instance, ProcessClue, SocketClue, instances, options_of, settings_of

_NAMES: Final = ("postgres", "postmaster")
_SOCKET: Final = re.compile(r"(/\S*)/\.s\.PGSQL\.(\d{1,5})$")
_SOCKET_DIRECTORIES: Final = ("/var/run/postgresql", "/tmp")  # noqa: S108 - where PostgreSQL puts its sockets
_FILE_MAX: Final = 1 << 20
_INSTANCES_MAX: Final = 256
_CONNECT_TIMEOUT_S: Final = 0.5


def look(proc: Path = Path("/proc"), debian: Path = Path("/etc/postgresql")) -> list[Instance]:
    """Every server that shows itself."""
    return instances(list(_processes()), list(_sockets(proc)), list(_clusters(debian)))


def _processes() -> Iterator[ProcessClue]:
    postmasters = []
    names = {}
    for process in psutil.process_iter(["name", "ppid", "cmdline", "username"]):
        names[process.pid] = process.info["name"] or ""
        if process.info["name"] in _NAMES and process.info["cmdline"]:
            postmasters.append(process)
    for process in postmasters[:_INSTANCES_MAX]:
        if names.get(process.info["ppid"], "") in _NAMES:
            continue  # a backend, or a postmaster's helper
        argv = tuple(process.info["cmdline"])
        if not options_of(argv) and len(argv) == 1 and ":" in argv[0]:
            continue  # a backend whose postmaster is hidden
        try:
            working_directory: str | None = process.cwd() or None
        except psutil.Error:
            working_directory = None
        directory = working_directory or options_of(argv).get("data_directory")
        lock = _text(Path(directory) / "postmaster.pid") if directory else None
        yield ProcessClue(
            pid=process.pid,
            user=process.info["username"] or "",
            argv=argv,
            working_directory=working_directory if lock is not None else None,
            lock_file=tuple(line.strip() for line in lock.splitlines()) if lock is not None else None,
            version_file=_text(Path(directory) / "PG_VERSION") if directory else None,
        )


def _sockets(proc: Path) -> Iterator[SocketClue]:
    seen: set[tuple[str, int]] = set()
    for path in [*_listed(proc), *_globbed()]:
        match = _SOCKET.search(path)
        if match is None:
            continue
        directory = str(Path(match[1]).resolve())
        if (directory, int(match[2])) in seen or len(seen) >= _INSTANCES_MAX:
            continue
        seen.add((directory, int(match[2])))
        pid = _listener(path)
        if pid is not None:
            yield SocketClue(directory, int(match[2]), pid or None)


def _listed(proc: Path) -> list[str]:
    """Sockets that the kernel knows, wherever they are."""
    text = _text(proc / "net" / "unix") or ""
    return [line.split()[-1] for line in text.splitlines()[1:] if "/.s.PGSQL." in line]


def _globbed() -> Iterable[str]:
    return [str(path) for directory in _SOCKET_DIRECTORIES for path in sorted(Path(directory).glob(".s.PGSQL.*"))]


def _listener(path: str) -> int | None:
    """The pid that listens there, 0 when that can't be known, None when nobody does."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(_CONNECT_TIMEOUT_S)
            probe.connect(path)
            pid: int = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
            return pid
    except (ConnectionRefusedError, FileNotFoundError):
        return None
    except OSError:  # not ours to enter, or its queue is full: somebody is there
        return 0


def _clusters(debian: Path) -> Iterator[ClusterClue]:
    for path in sorted(debian.glob("*/*/postgresql.conf"))[:_INSTANCES_MAX]:
        major, name = path.parts[-3], path.parts[-2]
        if major.isdigit():
            yield ClusterClue(int(major), name, str(path), settings_of(_text(path) or ""))


def _text(path: Path) -> str | None:
    """A small regular file's text, None when it isn't to be had."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            return file.read(_FILE_MAX).decode("utf-8", "replace")
    except OSError:
        return None

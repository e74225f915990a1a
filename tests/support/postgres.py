"""Real PostgreSQL servers for tests: direct children of the test process, gone when it ends.

Works as root (servers then run as `postgres` or `nobody`) and as an ordinary user, with Debian's
programs or the wheels'. A server listens on a UNIX socket (trust) and on a free loopback port
(scram passwords; replication on trust).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import psutil
import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from pgherd.postgres.binaries import Binaries, exactly, installed
from pgherd.postgres.os_user import OsUser, server_user
from pgherd.postgres.scratch import (
    PostgresProcess,
    initdb,
    serving,
    socket_directory,
    sweep,
    usable_by,
    workspace,
    write_settings,
)
from pgherd.runtime.process import run
from support.waiting import wait_until

# Short, traversable by the servers' user, and swept by the next session after a kill -9.
PARENT = Path(tempfile.gettempdir()) / f"pgherd-tests-{os.geteuid()}"

SETTINGS: Mapping[str, str] = {
    "listen_addresses": "127.0.0.1",
    "fsync": "off",  # a test's server survives kill -9, not a power cut
    "max_connections": "60",
    "max_wal_senders": "8",
    "wal_level": "replica",
    "hot_standby": "on",
    "shared_buffers": "16MB",
    "shared_preload_libraries": "pg_stat_statements",
    "logging_collector": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
}
_HBA = """\
local all all trust
local replication all trust
host replication all 127.0.0.1/32 trust
host all all 127.0.0.1/32 scram-sha-256
"""


def majors() -> list[int]:
    """Majors whose servers can run here, ascending."""
    return [binaries.major for binaries in installed() if binaries.has("postgres") and binaries.has("initdb")]


def default_major() -> int:
    """PGHERD_TEST_MAJOR, else the lowest installed (Debian's 15 where it is)."""
    wanted = os.environ.get("PGHERD_TEST_MAJOR")
    return int(wanted) if wanted else majors()[0]


def free_port() -> int:
    """A loopback TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return cast(int, probe.getsockname()[1])


@dataclass(slots=True)
class Server:
    """One server of a test. `major`, `port`, directories; methods below."""

    binaries: Binaries
    user: OsUser
    data_directory: Path
    socket_directory: Path
    port: int
    _process: PostgresProcess | None = None
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _passwords: dict[str, str] = field(default_factory=dict)

    @property
    def major(self) -> int:
        return self.binaries.major

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server isn't running"
        return self._process.pid

    # ---- talking to it

    def conninfo(self, role: str = "postgres", dbname: str = "postgres", *, tcp: bool = False, **extra: str | int) -> str:
        """libpq keywords without a password. Over the socket anybody is trusted; over TCP give a password."""
        host = "127.0.0.1" if tcp else str(self.socket_directory)
        return make_conninfo("", host=host, port=self.port, user=role, dbname=dbname, connect_timeout=5, **extra)

    def connect(self, dbname: str = "postgres", role: str = "postgres", *, autocommit: bool = True) -> psycopg.Connection[Any]:
        """A psycopg connection over the socket; close it."""
        return psycopg.connect(self.conninfo(role, dbname), autocommit=autocommit)

    def execute(
        self, query: str, parameters: Sequence[object] | None = None, *, dbname: str = "postgres", role: str = "postgres"
    ) -> list[tuple[Any, ...]]:
        """Run SQL as superuser on a connection of its own; the rows, [] for none. Several statements may go without parameters."""
        with self.connect(dbname, role) as connection, connection.cursor() as cursor:
            cursor.execute(query, parameters)
            return cursor.fetchall() if cursor.description is not None else []

    def create_role(
        self, name: str, password: str | None = None, attributes: str = "LOGIN", member_of: Sequence[str] = ()
    ) -> None:
        """A role with an optional password for TCP, as a member of `member_of`."""
        with self.connect() as connection:
            statement = sql.SQL("CREATE ROLE {} {}").format(sql.Identifier(name), sql.SQL(attributes))
            if password is not None:
                statement += sql.SQL(" PASSWORD {}").format(sql.Literal(password))
            connection.execute(statement)
            for group in member_of:
                connection.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(group), sql.Identifier(name)))

    def create_database(self, name: str) -> str:
        """An empty database; returns its name."""
        with self.connect() as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return name

    def drop_database(self, name: str) -> None:
        with self.connect() as connection:
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    # ---- doing things to it

    def start(self, timeout_s: float = 30.0) -> None:
        """Start it (again), on the same port and data directory."""
        assert self._process is None or not self._process.running(), "it is running"
        self._stack.close()
        self._process = self._stack.enter_context(
            serving(self.binaries, self.data_directory, self.user, start_timeout_s=timeout_s)
        )

    def stop(self) -> None:
        """Fast shutdown; safe when it isn't running."""
        if self._process is not None and self._process.running():
            self.resume()
        self._stack.close()

    def restart(self) -> None:
        self.stop()
        self.start()

    def kill(self) -> None:
        """kill -9 the postmaster and wait until its backends are gone (a restart would refuse before)."""
        family = psutil.Process(self.pid).children(recursive=True)
        os.kill(self.pid, signal.SIGKILL)
        self._stack.close()
        psutil.wait_procs(family, timeout=10)

    def pause(self) -> None:
        """SIGSTOP the postmaster and all its backends: a server that accepts TCP and answers nothing."""
        os.kill(self.pid, signal.SIGSTOP)
        family = [psutil.Process(self.pid), *psutil.Process(self.pid).children(recursive=True)]
        for process in family[1:]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        for process in family:  # the kernel stops them when it comes to it
            wait_until(lambda process=process: _is_stopped(process), 10, "a stopped server")  # type: ignore[misc]

    def resume(self) -> None:
        """Undo `pause`; harmless otherwise."""
        for process in psutil.Process(self.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        os.kill(self.pid, signal.SIGCONT)

    def promote(self, timeout_s: float = 20.0) -> None:
        """Promote a standby and wait until it is a primary."""
        self.execute("SELECT pg_promote(false)")
        wait_until(lambda: self.execute("SELECT NOT pg_is_in_recovery()")[0][0], timeout_s, "the promotion")

    def set(self, **settings: str) -> None:
        """ALTER SYSTEM and reload (restart it yourself where that's needed)."""
        with self.connect() as connection:
            for name, value in settings.items():
                connection.execute(sql.SQL("ALTER SYSTEM SET {} = {}").format(sql.Identifier(name), sql.Literal(value)))
            connection.execute("SELECT pg_reload_conf()")


def _is_stopped(process: psutil.Process) -> bool:
    try:
        return process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@dataclass(frozen=True, slots=True)
class Pair:
    """A primary and its streaming standby."""

    primary: Server
    standby: Server

    def wait_caught_up(self, timeout_s: float = 20.0) -> None:
        """Until the standby has replayed what the primary has written by now."""
        lsn = self.primary.execute("SELECT pg_current_wal_lsn()::text")[0][0]
        wait_until(
            lambda: self.standby.execute("SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", [lsn])[0][0],
            timeout_s,
            f"replay up to {lsn}",
        )


class Fleet:
    """Makes servers in one workspace; everything it made ends with it. Use through `fleet()`."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack) -> None:
        self._directory = directory
        self._stack = stack
        self._user = server_user("postgres", "nobody")
        self._templates: dict[int, Path] = {}
        self._count = 0

    def _template(self, binaries: Binaries) -> Path:
        """initdb once per major; a server is a copy of that."""
        path = self._directory / f"template-{binaries.major}"
        if binaries.major not in self._templates:
            initdb(binaries, path, self._user)
            (path / "pg_hba.conf").write_text(_HBA, encoding="utf-8")
            self._templates[binaries.major] = path
        return path

    def _binaries(self, major: int | None) -> Binaries:
        return usable_by(exactly(major or default_major()), self._user, self._directory)

    def _next_directory(self) -> Path:
        self._count += 1
        path = self._directory / f"n{self._count}"
        path.mkdir(mode=0o711)
        return path

    def _settings(self, sockets: Path, port: int, settings: Mapping[str, str] | None) -> dict[str, str]:
        own = {"unix_socket_directories": str(sockets), "port": str(port)}
        return {**SETTINGS, **own, **(settings or {})}

    def server(
        self,
        major: int | None = None,
        settings: Mapping[str, str] | None = None,
        *,
        start: bool = True,
        own_identifier: bool = False,
    ) -> Server:
        """A fresh empty server of `major`, a copy of a template: its system identifier is that of all others,
        unless `own_identifier` (half a second more)."""
        binaries, home = self._binaries(major), self._next_directory()
        data_directory = home / "data"
        if own_identifier:
            initdb(binaries, data_directory, self._user)
            (data_directory / "pg_hba.conf").write_text(_HBA, encoding="utf-8")
        else:
            template = self._template(binaries)
            run(["cp", "-a", "--reflink=auto", template, data_directory], timeout_s=60).require_success()
        return self._serve(binaries, home, data_directory, settings, start=start)

    def _serve(
        self, binaries: Binaries, home: Path, data_directory: Path, settings: Mapping[str, str] | None, *, start: bool = True
    ) -> Server:
        sockets = self._stack.enter_context(socket_directory(home, self._user))
        port = free_port()
        auto = (data_directory / "postgresql.auto.conf").read_text(encoding="utf-8")
        write_settings(data_directory, self._settings(sockets, port, settings), self._user)
        (data_directory / "postgresql.auto.conf").write_text(auto, encoding="utf-8")  # primary_conninfo of a standby
        server = Server(binaries, self._user, data_directory, sockets, port)
        self._stack.callback(server.stop)
        if start:
            server.start()
            if not server.execute("SELECT pg_is_in_recovery()")[0][0]:
                server.execute("CREATE EXTENSION IF NOT EXISTS pg_stat_statements")
        return server

    def standby(
        self, primary: Server, settings: Mapping[str, str] | None = None, *, application_name: str = "standby"
    ) -> Server:
        """A streaming standby of `primary`, made by pg_basebackup -R over its socket."""
        home = self._next_directory()
        data_directory = home / "data"
        home.chmod(0o711)
        self._user.own(home)
        target = primary.conninfo(application_name=application_name)
        argv: list[str | Path] = [primary.binaries.program("pg_basebackup"), "-D", data_directory, "-d", target]
        argv += ["-R", "-X", "stream", "-c", "fast", "--no-sync"]
        run(argv, timeout_s=60, cwd=home, user=self._user.child_user, group=self._user.child_group).require_success()
        server = self._serve(primary.binaries, home, data_directory, settings)
        wait_until(
            lambda: primary.execute("SELECT 1 FROM pg_stat_replication WHERE state = 'streaming'"), 20, "streaming replication"
        )
        return server

    def pair(self, major: int | None = None, settings: Mapping[str, str] | None = None) -> Pair:
        primary = self.server(major, settings)
        return Pair(primary, self.standby(primary, settings))


@contextlib.contextmanager
def fleet() -> Iterator[Fleet]:
    """A fleet in a workspace of its own; sweeps what killed test sessions left behind."""
    PARENT.mkdir(mode=0o711, exist_ok=True)
    sweep(PARENT)
    with workspace(PARENT) as directory, contextlib.ExitStack() as stack:
        yield Fleet(directory, stack)

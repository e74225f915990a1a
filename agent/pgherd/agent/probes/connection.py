"""The sampler's one connection to a node: persistent, bounded in every direction, never piling up.

Rules, each with a fault test:
- at most one established connection and one pending attempt, whatever the server does. A server that
  accepts and doesn't answer keeps the *same* attempt pending instead of getting a new one every cycle;
- an answer that doesn't come within `answer_timeout` costs the connection: its socket is shut down under
  the driver. Cancelling would open a second connection to the same hung postmaster;
- a reused connection that turns out dead (server restarted between two cycles) is replaced once, at once;
- the password file is read again at every attempt (rotation); a refused role isn't asked again for a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from psycopg import conninfo as libpq
from psycopg import pq
from psycopg.adapt import Loader
from psycopg.rows import dict_row

from pgherd.agent.config import NodeConfig, SamplingConfig
from pgherd.proto.clock import Clock
from pgherd.proto.errors import ConfigError, PgherdError, PreconditionError, TransientError
from pgherd.runtime.durable import read_secret

APPLICATION_NAME: Final = "pgherd-agent"

_AUTH_RETRY_S = 30.0  # a wrong password every cycle fills the server's log and locks accounts in LDAP
_CLOSE_TIMEOUT_S = 1.0

Rows = list[dict[str, Any]]


class _ReplacingTextLoader(Loader):
    """Names in shared catalogs may be in another encoding than this database's: show them, don't fail."""

    def load(self, data: Any) -> str:
        return bytes(data).decode("utf-8", "replace")


def session_parameters(node: NodeConfig, sampling: SamplingConfig) -> dict[str, str]:
    """libpq parameters of a sampling session, the password apart: timeouts hold from the first statement on."""
    given = libpq.conninfo_to_dict(node.conninfo)
    options = {
        "statement_timeout": f"{round(sampling.statement_timeout * 1000)}",
        "lock_timeout": f"{round(sampling.lock_timeout * 1000)}",
        "idle_in_transaction_session_timeout": "60000",
        "default_transaction_read_only": "on",
        "search_path": "pg_catalog",
        "DateStyle": "ISO",
        "jit": "off",
        "max_parallel_workers_per_gather": "0",
    }
    parameters = {key: str(value) for key, value in given.items() if value is not None and key != "password"}
    parameters["options"] = " ".join([str(given.get("options") or ""), *(f"-c {k}={v}" for k, v in options.items())]).strip()
    parameters.setdefault("application_name", APPLICATION_NAME)
    parameters["client_encoding"] = "UTF8"
    if "dbname" not in parameters and "service" not in parameters:
        parameters["dbname"] = "postgres"
    # A dead host is noticed in half a minute even while we only wait; a hung process keeps its socket.
    for key, value in (("keepalives_idle", "10"), ("keepalives_interval", "5"), ("keepalives_count", "3")):
        parameters.setdefault(key, value)
    return parameters


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an established connection leads."""

    host: str
    hostaddr: str
    port: str
    server_version_num: int


class NodeConnection:
    """One node's sampling connection. Not for concurrent use: one caller at a time."""

    def __init__(self, node: NodeConfig, sampling: SamplingConfig, clock: Clock) -> None:
        self._node = node
        self._sampling = sampling
        self._clock = clock
        self._connection: psycopg.AsyncConnection[dict[str, Any]] | None = None
        self._attempt: asyncio.Task[psycopg.AsyncConnection[dict[str, Any]]] | None = None
        self._refusal: PgherdError | None = None
        self._refused_until_mono_s = 0.0
        self.attempts = 0  # connection attempts since the start, for the agent's own metrics

    @property
    def connected(self) -> bool:
        return self._connection is not None

    @property
    def endpoint(self) -> Endpoint | None:
        """Where the connection leads, None while there is none."""
        if self._connection is None:
            return None
        link = self._connection.pgconn
        return Endpoint(
            host=link.host.decode("utf-8", "replace"),
            hostaddr=link.hostaddr.decode("utf-8", "replace"),
            port=link.port.decode(),
            server_version_num=link.server_version,
        )

    async def open(self) -> bool:
        """Make sure there is a connection; returns whether it is a new one.

        Raises TransientError postgres.unreachable | postgres.saturated | postgres.timeout, ConfigError
        postgres.auth | config.secret_unreadable, PreconditionError postgres.failed.
        """
        if self._connection is not None:
            if not self._connection.closed:
                return False
            await self.discard()
        if self._attempt is None:
            if self._refusal is not None and self._clock.mono_s() < self._refused_until_mono_s:
                raise self._refusal
            self.attempts += 1
            self._attempt = asyncio.create_task(self._connect(), name=f"connect {self._node.alias}")
        done, _ = await asyncio.wait({self._attempt}, timeout=self._sampling.connect_timeout)
        if not done:
            raise TransientError(
                "postgres.timeout",
                f"PostgreSQL accepts but didn't let us in within {self._sampling.connect_timeout:g} s",
                hint="look for stopped or disk-bound server processes (state T or D in ps)",
                phase="connect",
                timeout_s=self._sampling.connect_timeout,
            )
        attempt, self._attempt = self._attempt, None
        try:
            self._connection = attempt.result()
        except psycopg.Error as error:
            raise self._remember(connect_error(error)) from error
        except PgherdError as error:
            raise self._remember(error) from None
        self._refusal = None
        return True

    def _remember(self, error: PgherdError) -> PgherdError:
        if error.code in ("postgres.auth", "config.secret_unreadable"):
            self._refusal = error
            self._refused_until_mono_s = self._clock.mono_s() + min(_AUTH_RETRY_S, 3 * self._sampling.interval)
        return error

    async def _connect(self) -> psycopg.AsyncConnection[dict[str, Any]]:
        parameters = session_parameters(self._node, self._sampling)
        if self._node.password_file is not None:
            parameters["password"] = read_secret(self._node.password_file)
        link = await _dial(libpq.make_conninfo("", **parameters))
        connection: psycopg.AsyncConnection[dict[str, Any]] = psycopg.AsyncConnection(link, row_factory=dict_row)
        await connection.set_autocommit(True)
        for type_name in ("text", "name", "varchar"):
            connection.adapters.register_loader(type_name, _ReplacingTextLoader)
        return connection

    async def fetch(self, sql: str) -> Rows:
        """Run one read-only statement of ours and return its rows.

        Raises TransientError postgres.timeout (no answer in time, connection gone; or the server's own
        statement or lock timeout, connection kept; `phase` in the context tells) | postgres.unreachable
        (connection lost), ConfigError postgres.privilege, PreconditionError postgres.failed.
        """
        connection = self._connection
        if connection is None:
            raise TransientError("postgres.unreachable", "there is no connection to the server", phase="answer")
        work = asyncio.create_task(_execute(connection, sql))
        try:
            done, _ = await asyncio.wait({work}, timeout=self._sampling.answer_timeout)
        except asyncio.CancelledError:
            await self._abandon(work)
            raise
        if not done:
            await self._abandon(work)
            raise TransientError(
                "postgres.timeout",
                f"PostgreSQL didn't answer within {self._sampling.answer_timeout:g} s",
                hint="look for stopped or disk-bound server processes (state T or D in ps)",
                phase="answer",
                timeout_s=self._sampling.answer_timeout,
            )
        try:
            return work.result()
        except psycopg.Error as error:
            if connection.closed:
                await self.discard()
            raise statement_error(error, lost=self._connection is None) from error

    async def _abandon(self, work: asyncio.Task[Rows]) -> None:
        """Cut the socket under a statement whose answer nobody awaits any more; wait for the driver to notice."""
        connection, self._connection = self._connection, None
        if connection is not None:
            _shut_down(connection.pgconn)
        done, _ = await asyncio.wait({work}, timeout=_CLOSE_TIMEOUT_S)
        if not done:
            work.cancel()
            await asyncio.wait({work}, timeout=_CLOSE_TIMEOUT_S)
        if work.done() and not work.cancelled():
            work.exception()  # looked at: the lost socket is what we caused
        if connection is not None:
            connection.pgconn.finish()

    async def discard(self) -> None:
        """Drop the connection without a word to the server; the next `open` makes a new one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            _shut_down(connection.pgconn)
            connection.pgconn.finish()

    async def close(self) -> None:
        """End the connection and any pending attempt."""
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.cancel()
            with contextlib.suppress(asyncio.CancelledError, psycopg.Error, PgherdError):
                await attempt
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(psycopg.Error):
                await connection.close()


async def _execute(connection: psycopg.AsyncConnection[dict[str, Any]], sql: str) -> Rows:
    cursor = await connection.execute(sql.encode())
    return await cursor.fetchall()


def _shut_down(link: pq.abc.PGconn) -> None:
    """End a connection's socket in both directions: wakes whoever waits on it, on both sides."""
    with contextlib.suppress(OSError, psycopg.Error):
        end = socket.socket(fileno=os.dup(link.socket))
        try:
            end.shutdown(socket.SHUT_RDWR)
        finally:
            end.close()


# ---- dialling -----------------------------------------------------------------------------------

_SQLSTATE_RE = re.compile(rb'ErrorResponse\b[^\n]*? C "([0-9A-Z]{5})"')


class ConnectFailed(psycopg.OperationalError):
    """A connection attempt that the server (with its SQLSTATE) or the system ("" ) refused."""

    def __init__(self, message: str, state: str, needs_password: bool) -> None:
        super().__init__(message)
        self.state = state
        self.needs_password = needs_password


async def _dial(conninfo: str) -> pq.abc.PGconn:
    """Open a libpq connection without blocking the loop and without a deadline: the caller waits or leaves it.

    libpq hides the SQLSTATE of a refused connection and its text is in the server's language, so the
    protocol trace of the attempt is kept in memory and read for it (libpq >= 14; older: text alone).
    """
    link: pq.abc.PGconn = await asyncio.to_thread(pq.PGconn.connect_start, conninfo.encode())
    trace_fd = os.memfd_create(f"pgherd-{uuid.uuid4()}")
    try:
        if link.status != pq.ConnStatus.BAD:
            with contextlib.suppress(psycopg.NotSupportedError):
                link.trace(trace_fd)
        while link.status != pq.ConnStatus.BAD:
            match link.connect_poll():
                case pq.PollingStatus.OK:
                    link.untrace()
                    link.nonblocking = 1
                    return link
                case pq.PollingStatus.READING:
                    await _ready(link.socket, write=False)
                case pq.PollingStatus.WRITING:
                    await _ready(link.socket, write=True)
                case _:
                    break
        message = link.get_error_message("utf-8").strip()
        needs_password = bool(link.needs_password)
        link.untrace()
        found = _SQLSTATE_RE.findall(os.pread(trace_fd, 1 << 16, 0))
        raise ConnectFailed(message, found[-1].decode() if found else "", needs_password)
    except BaseException:
        link.finish()
        raise
    finally:
        os.close(trace_fd)


async def _ready(fd: int, *, write: bool) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    add, remove = (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)
    add(fd, ready.set)
    try:
        await ready.wait()
    finally:
        remove(fd)


# ---- naming what went wrong (pure) ---------------------------------------------------------------

_SATURATED_TEXTS = ("too many clients", "too many connections", "remaining connection slots")
_AUTH_TEXTS = ("password authentication failed", "no pg_hba.conf entry", "authentication failed", "no password supplied")


def connect_error(error: psycopg.Error) -> PgherdError:
    """A failed connection attempt in our words: who must act, and what next."""
    text = " ".join(str(error).split()) or "the connection attempt failed"
    state = error.state if isinstance(error, ConnectFailed) else (error.sqlstate or "")
    lowered = text.lower()
    if state == "53300" or (not state and any(word in lowered for word in _SATURATED_TEXTS)):
        return TransientError(
            "postgres.saturated",
            text,
            hint="raise max_connections or end idle sessions; on 16+ GRANT pg_use_reserved_connections keeps a slot for the agent",
            sqlstate="53300",
        )
    needs_password = isinstance(error, ConnectFailed) and error.needs_password
    if state.startswith("28") or needs_password or (not state and any(word in lowered for word in _AUTH_TEXTS)):
        return ConfigError("postgres.auth", text, hint="check role, password_file and pg_hba.conf", sqlstate=state)
    if state in ("", "57P03", "57P01", "57P02"):  # nobody listens, or it is starting up or shutting down
        return TransientError("postgres.unreachable", text, hint="is the server running at that address?", sqlstate=state)
    if state == "42501":
        return ConfigError("postgres.privilege", text, hint="run `pgherd-agent sql --for monitor`", sqlstate=state)
    return PreconditionError("postgres.failed", text, sqlstate=state)


def statement_error(error: psycopg.Error, *, lost: bool) -> PgherdError:
    """A failed statement in our words. Only PostgreSQL's primary message is kept: detail may hold data."""
    state = error.sqlstate or ""
    text = (error.diag.message_primary or str(error) or "the statement failed").strip().splitlines()[0]
    if state in ("57014", "55P03"):
        what = "lock" if state == "55P03" or "lock" in text.lower() else "statement"
        return TransientError("postgres.timeout", text, phase=what, sqlstate=state)
    if state == "42501":
        return ConfigError("postgres.privilege", text, hint="run `pgherd-agent sql --for monitor`", sqlstate=state)
    if lost:
        return TransientError("postgres.unreachable", text, phase="answer", sqlstate=state)
    return PreconditionError("postgres.failed", text, sqlstate=state)


def instance_label(node: NodeConfig, hostname: str, environment: Mapping[str, str]) -> str:
    """host:port of a node for the `instance` label: stable, known before the server was ever reached.

    A socket directory or loopback address stands for this host. A `service=` hides its address: then
    state `instance` in the configuration, or host:5432 is assumed.
    """
    if node.instance:
        return node.instance
    given = libpq.conninfo_to_dict(node.conninfo)
    host = str(given.get("host") or given.get("hostaddr") or environment.get("PGHOST", "")).split(",")[0]
    port = str(given.get("port") or environment.get("PGPORT", "") or "5432").split(",")[0]
    if not host or host.startswith(("/", "@")) or host in ("localhost", "127.0.0.1", "::1"):
        host = hostname
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

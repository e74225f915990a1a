"""The sampler's one connection to a node: persistent, shared, bounded in every direction, never piling up.

Rules, each with a fault test:
- its users take turns, first come first served, a whole pipeline each;
- at most one established connection and one pending attempt, whatever the server does. A server that
  accepts and doesn't answer keeps the *same* attempt pending instead of getting a new one every cycle;
- an answer that doesn't come within `answer_timeout` costs the connection: our end of its socket is shut down under
  the driver. Cancelling would open a second connection to the same hung postmaster;
- a session that we gave up counts until the server has ended it: a backend that hangs in the kernel (a dead volume)
  hears neither its statement timeout nor our goodbye. With those of the node's other connection (`Sessions`) there
  are never more than two;
- a reused connection that turns out dead (server restarted between two cycles) is replaced once, at once;
- the password file is read again at every attempt (rotation); a refused role isn't asked again for a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from psycopg import adapt, pq
from psycopg import conninfo as libpq

from pgherd.agent.config import NodeConfig, SamplingConfig
from pgherd.agent.probes.dial import ConnectFailed, dial
from pgherd.agent.probes.disk import is_local
from pgherd.agent.probes.meter import Meter, Usage, cost_shares, since
from pgherd.agent.probes.pipeline import Exchange, Outcome, Prepared, Question, SilentServerError
from pgherd.agent.probes.sessions import Sessions
from pgherd.proto.clock import Clock
from pgherd.proto.errors import ConfigError, PgherdError, PreconditionError, TransientError
from pgherd.runtime.durable import read_secret

APPLICATION_NAME: Final = "pgherd-agent"

_AUTH_RETRY_S = 30.0  # a wrong password every cycle fills the server's log and locks accounts in LDAP

Rows = list[dict[str, Any]]


class _ReplacingTextLoader(adapt.Loader):
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


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one question: rows, or the error that says why there are none.

    Errors: TransientError postgres.timeout (`phase` tells: "statement" or "lock", the server's own and the
    connection is kept; "answer", it fell silent and the connection is gone; "unasked", the time was up) |
    postgres.unreachable (connection lost), ConfigError postgres.privilege, PreconditionError postgres.failed.
    """

    rows: Rows
    error: PgherdError | None
    duration_s: float  # how long the server took, network apart
    cost_s: float  # what of that it did for us or held for us: see meter.cost_s


class NodeConnection:
    """One node's sampling connection, for all its users: each call has it for itself, in the order of asking."""

    def __init__(self, node: NodeConfig, sampling: SamplingConfig, clock: Clock, *, beside: Sessions | None = None) -> None:
        """`beside`: the sessions of the node's other connection, to which this one's belong; None for those of its own."""
        self._node = node
        self._owns_sessions = beside is None
        self.sessions = beside or Sessions()
        self._sampling = sampling
        self._clock = clock
        self._turn = asyncio.Lock()  # fair: wakes its waiters in their order
        self._link: pq.abc.PGconn | None = None
        self._prepared = Prepared()
        self._meter: Meter | None = None
        self._own_meter: Meter | None = None
        self._adapters = adapt.AdaptersMap(psycopg.adapters)
        for type_name in ("text", "name", "varchar"):
            self._adapters.register_loader(type_name, _ReplacingTextLoader)
        self._attempt: asyncio.Task[pq.abc.PGconn] | None = None
        self._refusal: PgherdError | None = None
        self._refused_until_mono_s = 0.0
        self.attempts = 0  # connection attempts since the start, for the agent's own metrics
        self.cpu_s = 0.0  # CPU that its backends used for us; 0 where only the server's own time can be known

    @property
    def connected(self) -> bool:
        return self._link is not None

    @property
    def busy(self) -> bool:
        """Whether somebody has it now: for users that would rather skip a turn than wait."""
        return self._turn.locked()

    @property
    def endpoint(self) -> Endpoint | None:
        """Where the connection leads, None while there is none."""
        if self._link is None:
            return None
        return Endpoint(
            host=self._link.host.decode("utf-8", "replace"),
            hostaddr=self._link.hostaddr.decode("utf-8", "replace"),
            port=self._link.port.decode(),
            server_version_num=self._link.server_version,
        )

    # ---- opening

    async def open(self) -> bool:
        """Make sure there is a connection; returns whether it is a new one.

        Raises TransientError postgres.unreachable | postgres.saturated | postgres.timeout, ConfigError
        postgres.auth | config.secret_unreadable, PreconditionError postgres.failed.
        """
        async with self._turn:
            return await self._open()

    async def _open(self) -> bool:
        if self._link is not None:
            if self._link.status == pq.ConnStatus.OK:
                return False
            self._discard()
        if self._attempt is None:
            if self._refusal is not None and self._clock.mono_s() < self._refused_until_mono_s:
                raise self._refusal
            if not self.sessions.take(self):
                raise TransientError(
                    "postgres.timeout",
                    "we have two sessions at the server, one of them given up and still hanging: no third until one ends",
                    hint="look for stopped or disk-bound server processes (state T or D in ps)",
                    phase="connect",
                )
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
            self._link = attempt.result()
        except psycopg.Error as error:
            raise self._remember(connect_error(error)) from error
        except PgherdError as error:
            raise self._remember(error) from None
        finally:
            if self._link is None:
                self.sessions.leave(self)
        self._prepared = Prepared()
        self._refusal = None
        self._own_meter = Meter.of_this_thread()
        endpoint = self.endpoint
        if endpoint is not None and is_local(endpoint.host, endpoint.hostaddr):
            self._meter = Meter.of_backend(self._link.backend_pid)
        return True

    def _remember(self, error: PgherdError) -> PgherdError:
        if error.code in ("postgres.auth", "config.secret_unreadable"):
            self._refusal = error
            self._refused_until_mono_s = self._clock.mono_s() + min(_AUTH_RETRY_S, 3 * self._sampling.interval)
        return error

    async def _connect(self) -> pq.abc.PGconn:
        parameters = session_parameters(self._node, self._sampling)
        if self._node.password_file is not None:
            parameters["password"] = read_secret(self._node.password_file)
        return await dial(libpq.make_conninfo("", **parameters))

    # ---- asking

    async def fetch(self, sql: str, *parameters: str | None) -> Rows:
        """One statement's rows. Raises what `Answer` lists."""
        (answer,) = await self.fetch_many([Question(sql, parameters)])
        if answer.error is not None:
            raise answer.error
        return answer.rows

    async def fetch_many(self, questions: Sequence[Question], *, send_for_s: float = float("inf")) -> list[Answer]:
        """Answers to all questions, in their order, from one pipeline; what went wrong is in the answers.

        After `send_for_s` the questions that aren't on their way yet stay unasked. A server that is silent for
        `answer_timeout` costs the connection. Parameters are text; the server knows their types from the statement.
        """
        async with self._turn:
            return await self._fetch_many(questions, self._clock.mono_s() + send_for_s)

    async def _fetch_many(self, questions: Sequence[Question], send_until_mono_s: float) -> list[Answer]:
        link = self._link
        if link is None:
            lost: PgherdError = TransientError("postgres.unreachable", "there is no connection to the server", phase="answer")
            return [Answer([], lost, 0.0, 0.0) for _ in questions]
        before = self._accounts()
        exchange = Exchange(link, questions, self._prepared, self._clock.mono_s)
        rest: PgherdError = TransientError("postgres.timeout", "there was no time left to ask", phase="unasked")
        try:
            await exchange.run(self._sampling.answer_timeout, send_until_mono_s)
        except SilentServerError:
            self._discard()
            rest = TransientError(
                "postgres.timeout",
                f"PostgreSQL didn't answer within {self._sampling.answer_timeout:g} s",
                hint="look for stopped or disk-bound server processes (state T or D in ps)",
                phase="answer",
                timeout_s=self._sampling.answer_timeout,
            )
        except psycopg.Error as error:
            self._discard()
            rest = statement_error(error, lost=True)
        except BaseException:  # cancelled in the middle of a conversation: nobody can take it up again
            self._discard()
            raise
        after = self._accounts()
        backend, own = since(before[0], after[0]), since(before[1], after[1])
        if backend is not None:
            self.cpu_s += backend.cpu_s
        shares = cost_shares([outcome.duration_s for outcome in exchange.outcomes if outcome.sent], backend, own)
        return [self._answer(outcome, rest, next(shares) if outcome.sent else 0.0) for outcome in exchange.outcomes]

    def _accounts(self) -> tuple[Usage | None, Usage | None]:
        """The backend's and our own, None where they can't be read."""
        return self._meter.read() if self._meter else None, self._own_meter.read() if self._own_meter else None

    def _answer(self, outcome: Outcome, rest: PgherdError, share_s: float) -> Answer:
        rows: Rows = []
        error: PgherdError | None = None
        if outcome.failure is not None:
            error = statement_error(outcome.failure, lost=False)
        elif outcome.result is None:
            error = rest
        else:
            rows = self._rows(outcome.result)
        return Answer(rows, error, outcome.duration_s, share_s)

    def _rows(self, result: pq.abc.PGresult) -> Rows:
        transformer = adapt.Transformer(self)
        transformer.set_pgresult(result)
        names = [(result.fname(index) or b"").decode() for index in range(result.nfields)]
        return transformer.load_rows(0, result.ntuples, lambda values: dict(zip(names, values, strict=True)))

    @property
    def adapters(self) -> adapt.AdaptersMap:
        """How values are read (psycopg's AdaptContext)."""
        return self._adapters

    @property
    def connection(self) -> None:
        """None: values are read without regard to a psycopg connection (psycopg's AdaptContext)."""
        return

    # ---- ending

    async def discard(self) -> None:
        """Drop the connection without a word to the server; the next `open` makes a new one."""
        async with self._turn:
            self._discard()

    def _discard(self) -> None:
        link = self._let_go()
        if link is not None:
            self.sessions.abandon(self, link)

    def _let_go(self) -> pq.abc.PGconn | None:
        for meter in (self._meter, self._own_meter):
            if meter is not None:
                meter.close()
        link, self._link, self._meter, self._own_meter = self._link, None, None, None
        return link

    async def close(self, *, until_gone_s: float = 0.0) -> None:
        """End the connection and any pending attempt; wait at most `until_gone_s` until the server has ended its side."""
        async with self._turn:
            attempt, self._attempt = self._attempt, None
            if attempt is not None:
                attempt.cancel()
                with contextlib.suppress(asyncio.CancelledError, psycopg.Error, PgherdError):
                    await attempt
            link = self._let_go()
            if link is not None and until_gone_s > 0:
                await _finish_and_wait(link, until_gone_s)
            elif link is not None:
                link.finish()
            self.sessions.leave(self)
            if self._owns_sessions:
                self.sessions.forget()


async def _finish_and_wait(link: pq.abc.PGconn, timeout_s: float) -> None:
    """Say goodbye and wait for the backend's end, seen as the end of the stream on a second descriptor of the socket."""
    try:
        end = socket.socket(fileno=os.dup(link.socket))
    except (OSError, psycopg.Error):
        link.finish()
        return
    with end:
        link.finish()
        end.setblocking(False)
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(timeout_s):
                while await loop.sock_recv(end, 4096):
                    pass


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

"""A plain connection for the agent's short-lived children, and PostgreSQL's failures in our words.

The resident sampler has its own asynchronous connection; this one belongs to backups, restores and
fingerprints. Its settings are pinned: database- and role-level settings bend text output (DateStyle,
extra_float_digits, bytea_output …), and server-side timeouts would kill the exporter of a snapshot.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo

from pgherd.proto.errors import ConfigError, PgherdError, PreconditionError, TransientError

APPLICATION_NAME = "pgherd-backup"  # our own alerts exempt it; look for it in pg_stat_activity
CONNECT_TIMEOUT_S = 10
_SATURATED = "53300"

# Text output as pg_dump pins it, and nothing that ends or reroutes our transaction. A setting that the
# server's major doesn't know is left out.
PINNED_SETTINGS: Mapping[str, str] = {
    "search_path": "",
    "datestyle": "ISO, YMD",
    "intervalstyle": "postgres",
    "timezone": "UTC",
    "extra_float_digits": "3",
    "bytea_output": "hex",
    "xmloption": "content",
    "lc_monetary": "C",
    "lc_numeric": "C",
    "lc_time": "C",
    "quote_all_identifiers": "off",
    "row_security": "off",
    "standard_conforming_strings": "on",
    "statement_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
    "transaction_timeout": "0",
    # A backend notices within a second that we are gone: without it the digest of a large table goes on for
    # hours, with its locks and its snapshot, after we were killed (14+).
    "client_connection_check_interval": "1s",
    "max_parallel_workers_per_gather": "0",
    "jit": "off",
    "synchronize_seqscans": "off",
}


@dataclass(frozen=True, slots=True)
class Target:
    """Where and as whom to connect. The password never goes into a conninfo that becomes an argument."""

    conninfo: str
    password: str | None = None

    def of_database(self, dbname: str) -> str:
        """libpq keywords for `dbname`, without the password: fit for a child's arguments."""
        return make_conninfo(self.conninfo, dbname=dbname, application_name=APPLICATION_NAME, connect_timeout=CONNECT_TIMEOUT_S)

    def environment(self) -> dict[str, str]:
        """What a libpq child needs besides its arguments."""
        return {"PGPASSWORD": self.password} if self.password is not None else {}

    @property
    def default_database(self) -> str:
        """The database that the conninfo names, else `postgres`."""
        return str(psycopg.conninfo.conninfo_to_dict(self.conninfo).get("dbname") or "postgres")


@contextlib.contextmanager
def connect(target: Target, dbname: str | None = None, *, lock_timeout_s: float = 30.0) -> Iterator[psycopg.Connection[Any]]:
    """A pinned autocommit connection; statement failures inside the block leave as PgherdErrors.

    Raises postgres.unreachable, postgres.auth, postgres.saturated; from within postgres.timeout,
    postgres.privilege, postgres.failed.
    """
    keywords: dict[str, Any] = {"client_encoding": "UTF8"}
    if target.password is not None:
        keywords["password"] = target.password
    try:
        connection = psycopg.connect(target.of_database(dbname or target.default_database), autocommit=True, **keywords)
    except psycopg.Error as error:
        raise connect_failure(error) from error
    try:
        _pin(connection, lock_timeout_s)
        yield connection
    except psycopg.Error as error:
        raise statement_failure(error) from error
    finally:
        connection.close()


def _pin(connection: psycopg.Connection[Any], lock_timeout_s: float) -> None:
    settings = {**PINNED_SETTINGS, "lock_timeout": f"{int(lock_timeout_s * 1000)}ms"}
    connection.execute(
        "SELECT pg_catalog.set_config(s.name, w.value, false) FROM pg_catalog.pg_settings s "
        "JOIN pg_catalog.jsonb_each_text(%s::pg_catalog.jsonb) w(name, value) ON w.name = pg_catalog.lower(s.name)",
        [json.dumps(settings)],
    )


def connect_failure(error: psycopg.Error) -> PgherdError:
    """Why a connection attempt failed, by who must act."""
    text = " ".join(str(error).split()) or "the connection failed"  # libpq's has a line per address, and a question below each
    if isinstance(error, psycopg.errors.ConnectionTimeout):
        return TransientError(
            "postgres.timeout", text, hint="look for stopped or disk-bound server processes (state T or D in ps)"
        )
    state = error.sqlstate or ""
    if state == _SATURATED or "too many clients" in text or "remaining connection slots" in text:
        return TransientError("postgres.saturated", text, hint="wait for a free slot or raise max_connections")
    if state.startswith("28") or "authentication failed" in text or "no password supplied" in text or "pg_hba.conf" in text:
        return ConfigError("postgres.auth", text, hint="check the role, its password_file and pg_hba.conf")
    return TransientError("postgres.unreachable", text, hint="check that the server runs and that conninfo is right")


def statement_failure(error: psycopg.Error) -> PgherdError:
    """Why a statement failed, by who must act; the text is PostgreSQL's primary message."""
    state = error.sqlstate or ""
    text = error.diag.message_primary or (str(error).strip().splitlines() or ["the connection was lost"])[0]
    if state in ("57014", "55P03", "25P03", "25P04"):
        return TransientError("postgres.timeout", text, hint="look for what blocks it in pg_stat_activity", sqlstate=state)
    if state == "42501" or "row-level security" in text:
        return ConfigError(
            "postgres.privilege",
            text,
            hint="grant what `pgherd-agent sql --for backup` prints (pg_read_all_data, BYPASSRLS)",
            sqlstate=state,
        )
    if not state or state.startswith(("08", "57P")):
        return TransientError(
            "postgres.unreachable", text, hint="the server ended the connection; read its log", sqlstate=state
        )
    return PreconditionError("postgres.failed", text, sqlstate=state)

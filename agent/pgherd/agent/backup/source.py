"""What a server says about itself before a backup: identity, databases, tablespaces, what we may read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from psycopg import Connection

from pgherd.agent.backup.deadline import Deadline
from pgherd.postgres.connection import Target, connect
from pgherd.proto.errors import PreconditionError
from pgherd.storage.manifest import Extension, Tablespace

_ANSWER_TIMEOUT_S = 60.0

_FACTS_SQL = """
SELECT current_setting('server_version_num')::int, current_setting('server_version'),
       (SELECT system_identifier::text FROM pg_control_system()), pg_is_in_recovery(),
       (SELECT rolname FROM pg_roles WHERE oid = 10), current_setting('data_checksums') = 'on',
       has_table_privilege('pg_catalog.pg_authid', 'SELECT')
"""

_DATABASES_SQL = """
SELECT datname, pg_get_userbyid(datdba), pg_encoding_to_char(encoding), {provider}, datcollate, datctype,
       coalesce({locale}, ''), {version}, datallowconn, datconnlimit = -2
FROM pg_database WHERE datname <> 'template0' ORDER BY datname
"""


# ALTER ROLE ALL SET …: no tool of PostgreSQL dumps these (checked up to 18). Values of list settings are kept
# quoted in the catalogue; the names are those that the server's own guc_tables.c flags GUC_LIST_QUOTE.
_SETTINGS_OF_ALL_SQL = """
SELECT format('ALTER ROLE ALL SET %I TO %s;',
              name, CASE WHEN name IN ('local_preload_libraries', 'search_path', 'session_preload_libraries', 'temp_tablespaces')
                         THEN coalesce(nullif(value, ''), $$''$$) ELSE quote_literal(value) END)
FROM (SELECT split_part(setting, '=', 1) AS name, substr(setting, strpos(setting, '=') + 1) AS value
      FROM pg_db_role_setting, unnest(setconfig) setting WHERE setrole = 0 AND setdatabase = 0) AS settings
ORDER BY 1
"""


@dataclass(frozen=True, slots=True)
class DatabaseFacts:
    name: str
    owner: str
    encoding: str
    locale_provider: str
    lc_collate: str
    lc_ctype: str
    locale: str
    collation_version: str


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """Facts of one moment; `left_out` maps databases that can't be connected to onto the reason."""

    version_num: int
    version: str
    system_identifier: str
    is_standby: bool
    bootstrap_superuser: str
    data_checksums: bool
    may_read_role_passwords: bool
    databases: tuple[DatabaseFacts, ...]
    left_out: Mapping[str, str]
    tablespaces: tuple[Tablespace, ...]

    @property
    def major(self) -> int:
        return self.version_num // 10000


def server_facts(target: Target) -> ServerFacts:
    """Ask the server. Raises postgres.* errors, TransientError child.timeout when it hangs."""
    with (
        Deadline(_ANSWER_TIMEOUT_S, "asking the server about itself") as deadline,
        connect(target) as connection,
        deadline.over_connection(connection),
    ):
        version_num, version, system_identifier, is_standby, superuser, checksums, may_read = connection.execute(
            _FACTS_SQL
        ).fetchall()[0]
        databases, left_out = _databases(connection, version_num // 10000)
        tablespaces = connection.execute(
            "SELECT spcname, pg_get_userbyid(spcowner), pg_tablespace_location(oid) FROM pg_tablespace "
            "WHERE spcname !~ '^pg_' ORDER BY spcname"
        ).fetchall()
    if not databases:
        raise PreconditionError("postgres.failed", "the server has no database that accepts connections")
    return ServerFacts(
        version_num=version_num,
        version=version,
        system_identifier=system_identifier,
        is_standby=is_standby,
        bootstrap_superuser=superuser,
        data_checksums=checksums,
        may_read_role_passwords=may_read,
        databases=databases,
        left_out=left_out,
        tablespaces=tuple(Tablespace(*row) for row in tablespaces),
    )


def _databases(connection: Connection[Any], major: int) -> tuple[tuple[DatabaseFacts, ...], dict[str, str]]:
    query = _DATABASES_SQL.format(
        provider="datlocprovider::text" if major >= 15 else "'c'",
        locale={15: "daticulocale", 16: "daticulocale"}.get(major, "datlocale") if major >= 15 else "NULL",
        version="coalesce(pg_database_collation_actual_version(oid), '')" if major >= 15 else "''",
    )
    databases, left_out = [], {}
    for *facts, allows_connections, is_invalid in connection.execute(query.encode()):
        if is_invalid:
            left_out[facts[0]] = "invalid: a DROP DATABASE was interrupted, nothing in it can be read"
        elif not allows_connections:
            left_out[facts[0]] = "allows no connections (datallowconn is off)"
        else:
            databases.append(DatabaseFacts(*facts))
    return tuple(databases), left_out


def settings_of_all_roles(connection: Connection[Any]) -> bytes:
    """What `ALTER ROLE ALL SET` has set, as SQL; b"" for nothing."""
    return "".join(f"{row[0]}\n" for row in connection.execute(_SETTINGS_OF_ALL_SQL)).encode()


def extensions(connection: Connection[Any]) -> tuple[Extension, ...]:
    """Extensions of the connected database."""
    rows = connection.execute("SELECT extname, extversion FROM pg_extension ORDER BY extname").fetchall()
    return tuple(Extension(*row) for row in rows)


def invalid_indexes(connection: Connection[Any]) -> list[str]:
    """Indexes that pg_dump leaves out without a word because they are INVALID."""
    rows = connection.execute(
        "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_index x JOIN pg_class c ON c.oid = x.indexrelid "
        "JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_class t ON t.oid = x.indrelid "
        "WHERE NOT x.indisvalid AND t.relkind <> 'p' AND n.nspname !~ '^pg_' ORDER BY 1"
    ).fetchall()
    return [row[0] for row in rows]

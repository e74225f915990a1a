"""Collect the facts for `check`: reads only, over short-lived connections, never touches the server's files."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import psycopg
from psycopg.rows import dict_row

from pgherd.agent.backup.deadline import Deadline
from pgherd.agent.config import AgentConfig, NodeConfig
from pgherd.agent.preflight.facts import Archiver, DatabaseRights, Disk, Facts, HostSide, ServerSide, Slot
from pgherd.agent.probes.disk import AVAIL, DiskProbe
from pgherd.agent.probes.host import HostProbe
from pgherd.agent.probes.local import LocalProbe
from pgherd.agent.probes.places import PLACES_SQL
from pgherd.postgres.binaries import client_for, exactly
from pgherd.postgres.connection import Target, connect
from pgherd.postgres.os_user import server_user
from pgherd.proto.errors import PgherdError
from pgherd.runtime.clock import SystemClock
from pgherd.runtime.durable import read_secret

_STATEMENT_TIMEOUT_S: Final = 10
_LOCK_TIMEOUT_S: Final = 1.0
_HUNG_AFTER_S: Final = 30.0  # a server that stops answering keeps no timeouts of its own
_DATABASES_MAX: Final = 200  # beyond, the rest is left unlooked-at and said so

_SETTINGS: Final = (
    "wal_level", "max_wal_senders", "full_page_writes", "fsync", "data_checksums", "wal_log_hints", "archive_mode",
    "archive_command", "archive_library", "restore_command", "hot_standby", "hot_standby_feedback",
    "max_standby_streaming_delay", "synchronous_standby_names", "max_slot_wal_keep_size", "primary_conninfo",
    "primary_slot_name", "config_file", "hba_file", "shared_preload_libraries", "reserved_connections",
    "superuser_reserved_connections", "idle_in_transaction_session_timeout", "cluster_name",
)  # fmt: skip

_ROLE_SQL: Final = """
SELECT r.rolname, r.rolsuper, r.rolbypassrls, r.rolreplication, pg_is_in_recovery(),
       current_setting('server_version_num')::int, has_table_privilege('pg_catalog.pg_authid', 'SELECT'),
       ARRAY(SELECT g.rolname::text FROM pg_roles g WHERE pg_has_role(r.oid, g.oid, 'USAGE') AND g.oid <> r.oid)
FROM pg_roles r WHERE r.rolname = current_user
"""

# reset_val: what a new session gets; our own session's values are pinned.
_SETTINGS_SQL: Final = "SELECT name, reset_val FROM pg_settings WHERE name = ANY(%s)"

_ROLE_SETTINGS_SQL: Final = """
SELECT unnest(setconfig) FROM pg_db_role_setting
WHERE setrole IN (0, (SELECT oid FROM pg_roles WHERE rolname = current_user))
  AND setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
ORDER BY setrole, setdatabase
"""

_SLOTS_SQL: Final = """
SELECT slot_name, slot_type, active,
       ((CASE WHEN pg_is_in_recovery() THEN pg_last_wal_receive_lsn() ELSE pg_current_wal_lsn() END) - restart_lsn)::bigint,
       coalesce(wal_status, '')
FROM pg_replication_slots
"""

_ARCHIVER_SQL: Final = """
SELECT extract(epoch FROM clock_timestamp() - last_archived_time)::float8,
       extract(epoch FROM clock_timestamp() - last_failed_time)::float8, coalesce(last_failed_wal, ''), failed_count
FROM pg_stat_archiver
"""

_STATEMENTS_SQL: Final = "SELECT count(*) FROM pg_extension WHERE extname = 'pg_stat_statements'"

_SEQUENCES_SQL: Final = """
SELECT count(*) FROM pg_sequence WHERE NOT seqcycle AND NOT has_sequence_privilege(seqrelid, 'SELECT, USAGE')
"""

_RIGHTS_SQL: Final = """
SELECT count(*) FILTER (WHERE NOT has_table_privilege(c.oid, 'SELECT')
                           OR NOT has_schema_privilege(c.relnamespace, 'USAGE')),
       count(*) FILTER (WHERE c.relrowsecurity)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'm', 'S') AND c.relpersistence <> 't'
  AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
"""

_LARGE_OBJECTS_SQL: Final = """
SELECT count(*) FROM pg_largeobject_metadata m
WHERE current_setting('lo_compat_privileges') = 'off' AND NOT pg_has_role(m.lomowner, 'USAGE')
  AND NOT EXISTS (SELECT FROM aclexplode(m.lomacl) a
                  WHERE a.privilege_type = 'SELECT' AND (a.grantee = 0 OR pg_has_role(a.grantee, 'USAGE')))
"""

_SUBSCRIPTIONS_SQL: Final = """
SELECT count(*) FROM pg_subscription WHERE subdbid = (SELECT oid FROM pg_database WHERE datname = current_database())
"""

_FOREIGN_FILES: Final = ("/etc/patroni", "/etc/patroni.yml", "/etc/patroni/patroni.yml", "/etc/repmgr.conf", "/etc/stolon")


def gather(config: AgentConfig, node: NodeConfig) -> Facts:
    """Everything `check` judges. A server that can't be reached is a fact, not an error."""
    server: ServerSide | None = None
    code = message = hint = ""
    local = LocalProbe(node, DiskProbe(_HUNG_AFTER_S), HostProbe(SystemClock()))
    try:
        target = Target(node.conninfo, read_secret(node.password_file) if node.password_file else None)
        server = _server(target, local)
    except PgherdError as error:
        code, message, hint = error.code, error.message, error.hint
    return Facts(node.alias, _host(config, node, server.major if server else None, local), server, code, message, hint)


# ---- the server ---------------------------------------------------------------------------------


def _server(target: Target, local: LocalProbe) -> ServerSide:
    """What the server says; `local` learns from it where its files are."""
    with (
        Deadline(_HUNG_AFTER_S, "asking the server") as deadline,
        connect(target, lock_timeout_s=_LOCK_TIMEOUT_S) as connection,
        deadline.over_connection(connection),
    ):
        connection.execute(f"SET statement_timeout = '{_STATEMENT_TIMEOUT_S}s'".encode())
        connection.execute("SET default_transaction_read_only = on")
        role, superuser, bypass, replication, standby, version, authid, groups = connection.execute(_ROLE_SQL).fetchall()[0]
        with connection.cursor(row_factory=dict_row) as places:
            local.locate(places.execute(PLACES_SQL.encode()).fetchall(), connection.info.host, connection.info.hostaddr)
        extensions = connection.execute(_STATEMENTS_SQL).fetchall()[0][0]
        settings = dict(connection.execute(_SETTINGS_SQL, [list(_SETTINGS)]).fetchall())
        names = [row[0] for row in connection.execute("SELECT datname FROM pg_database WHERE datallowconn ORDER BY datname")]
        closed = [
            row[0]
            for row in connection.execute(
                "SELECT datname FROM pg_database WHERE NOT datallowconn AND datname <> 'template0' ORDER BY 1"
            )
        ]
        slots = _or_none(connection, _SLOTS_SQL)
        archiver = _or_none(connection, _ARCHIVER_SQL)
        sizes = _or_none(connection, "SELECT sum(pg_database_size(oid))::bigint FROM pg_database WHERE datallowconn")
        applications = connection.execute(
            "SELECT DISTINCT application_name FROM pg_stat_activity WHERE application_name <> '' "
            "UNION SELECT DISTINCT application_name FROM pg_stat_replication WHERE application_name <> ''"
        ).fetchall()
        return ServerSide(
            version_num=version,
            role=role,
            superuser=superuser,
            bypass_rls=bypass,
            replication=replication,
            memberships=frozenset(groups),
            is_standby=standby,
            settings=settings,
            role_settings=dict(row[0].split("=", 1) for row in connection.execute(_ROLE_SETTINGS_SQL)),
            databases_bytes=sizes[0][0] if sizes else None,
            databases_closed=tuple(closed),
            databases=tuple(_rights(target, name, number) for number, name in enumerate(names)),
            slots=tuple(Slot(*row) for row in slots) if slots is not None else None,
            archiver=Archiver(*archiver[0]) if archiver else None,
            application_names=frozenset(row[0] for row in applications),
            may_read_pg_authid=authid,
            statements=_statements(extensions, settings.get("shared_preload_libraries")),
        )


def _statements(extensions: int, preloaded: str | None) -> Literal["", "extension_absent", "not_preloaded"] | None:
    if preloaded is None:
        return None
    if "pg_stat_statements" not in preloaded:
        return "not_preloaded"
    return "" if extensions else "extension_absent"


def _or_none(connection: psycopg.Connection[Any], query: str) -> list[tuple[Any, ...]] | None:
    """The rows, None when the role may not ask this or the answer took too long."""
    try:
        return connection.execute(query.encode()).fetchall()
    except (psycopg.errors.InsufficientPrivilege, psycopg.errors.QueryCanceled, psycopg.errors.LockNotAvailable):
        return None


def _rights(target: Target, name: str, number: int) -> DatabaseRights:
    if number >= _DATABASES_MAX:
        return DatabaseRights(name, error=f"only the first {_DATABASES_MAX} databases are looked into")
    try:
        with (
            Deadline(_HUNG_AFTER_S, f"asking database {name}") as deadline,
            connect(target, name, lock_timeout_s=_LOCK_TIMEOUT_S) as connection,
            deadline.over_connection(connection),
        ):
            connection.execute(f"SET statement_timeout = '{_STATEMENT_TIMEOUT_S}s'".encode())
            unreadable, with_rls = connection.execute(_RIGHTS_SQL).fetchall()[0]
            objects = connection.execute(_LARGE_OBJECTS_SQL).fetchall()[0][0]
            subscriptions = connection.execute(_SUBSCRIPTIONS_SQL).fetchall()[0][0]
            sequences = connection.execute(_SEQUENCES_SQL).fetchall()[0][0]
            return DatabaseRights(name, "", unreadable, with_rls, objects, subscriptions, sequences)
    except PgherdError as error:
        return DatabaseRights(name, error=error.message)


# ---- this host ----------------------------------------------------------------------------------


def _host(config: AgentConfig, node: NodeConfig, major: int | None, local: LocalProbe) -> HostSide:
    measured, unmeasured = asyncio.run(local.sample())
    client_major, client_problem = None, ""
    if major is not None:
        try:
            client_major = client_for(major, node.bin_directory).major
        except PgherdError as error:
            client_problem = error.message
    repository, repository_problem = _repository(config.backup.repository) if config.backup.enabled else (None, "")
    return HostSide(
        client_major=client_major,
        client_problem=client_problem,
        scratch_problem=_scratch_problem(config, node, major) if major is not None else None,
        repository=repository,
        repository_problem=repository_problem,
        backups_enabled=config.backup.enabled,
        role_passwords=config.backup.role_passwords,
        restore_roots={name: _root_problem(path) for name, path in config.policy.restore_roots.items()},
        foreign_files=_foreign_files(os.environ),
        volumes=tuple(sample.labels["path_kind"] for sample in measured if sample.metric is AVAIL),
        unmeasured=unmeasured,
    )


def _scratch_problem(config: AgentConfig, node: NodeConfig, major: int) -> str:
    """Proving a backup needs a server of the same major, and an OS user that it may run as."""
    try:
        binaries = exactly(major, node.bin_directory)
        for program in ("postgres", "initdb", "pg_restore"):
            binaries.program(program)
        server_user(config.backup.scratch_user, "pgherd-scratch", "nobody", "postgres")
    except PgherdError as error:
        return error.message
    return ""


def _repository(path: Path) -> tuple[Disk | None, str]:
    """Room on the volume where the repository is, or will be made."""
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        stat = os.statvfs(place)
    except OSError as error:
        return None, f"the repository {path} can't be looked at: {error.strerror}"
    problem = "" if os.access(place, os.W_OK | os.X_OK) else f"the repository {path} can't be written by this user"
    return Disk(stat.f_bavail * stat.f_frsize, str(place)), problem


def _root_problem(path: Path) -> str:
    if not path.is_dir():
        return f"{path} isn't a directory"
    return "" if os.access(path, os.W_OK | os.X_OK) else f"{path} can't be written by this user"


def _foreign_files(environment: Mapping[str, str]) -> tuple[str, ...]:
    named = [name for name in environment if name.startswith("PATRONI_")]
    return (*[path for path in _FOREIGN_FILES if Path(path).exists()], *(["PATRONI_ environment"] if named else []))

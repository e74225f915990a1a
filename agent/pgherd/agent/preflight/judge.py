"""From facts to findings. Pure.

Never broken: what isn't known is `unknown`, never `ok`; every finding that isn't ok or info has a remedy
that can be pasted: SQL, a configuration line or a command.

Severities: ok · info (nothing to do) · warning (works, but will hurt) · blocker (doesn't work) · unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Final, Literal

from pgherd.agent.grants.statements import backup_grants, monitor_grants, quoted, statements_extension
from pgherd.agent.preflight.facts import Facts, HostSide, ServerSide, Slot
from pgherd.agent.probes.catalog import OLDEST_MAJOR, TESTED_MAJORS

Severity = Literal["ok", "info", "warning", "blocker", "unknown"]
SEVERITIES: Final[tuple[Severity, ...]] = ("blocker", "warning", "unknown", "info", "ok")

_GIB = 1 << 30
_COMPRESSED_SHARE = 0.25  # a guess for text-heavy data, used for a warning only


@dataclass(frozen=True, slots=True)
class Finding:
    """One judgement. `check` is a stable dotted name."""

    check: str
    severity: Severity
    message: str
    remedy: str = ""

    def as_dict(self) -> dict[str, str]:
        """The wire's and the JSON's members."""
        return asdict(self)


def judge(facts: Facts) -> tuple[Finding, ...]:
    """All findings, the gravest first; within a severity in the order of the checks."""
    found = [*_connectivity(facts)]
    if facts.server is not None:
        for check in _SERVER_CHECKS:
            found += check(facts.server, facts.host)
    found += _host(facts.host, facts.server)
    return tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)))


def _connectivity(facts: Facts) -> Iterator[Finding]:
    if facts.server is not None:
        yield Finding("connection", "ok", f"connected as {facts.server.role}")
        return
    severity: Severity = (
        "unknown" if facts.connection_code in ("postgres.saturated", "postgres.timeout", "child.timeout") else "blocker"
    )
    remedy = facts.connection_hint or "check that the server runs and that conninfo is right"
    yield Finding("connection", severity, f"{facts.connection_message} [{facts.connection_code}]", remedy)


def _version(server: ServerSide, host: HostSide) -> Iterator[Finding]:
    major = server.major
    if major < OLDEST_MAJOR:
        yield Finding(
            "version", "blocker", f"PostgreSQL {major} is older than {OLDEST_MAJOR}", "upgrade the server with pg_upgrade"
        )
    elif major in (13, 14):
        yield Finding("version", "info", f"PostgreSQL {major} is served as best effort; tested are {_tested()}")
    elif major > max(TESTED_MAJORS):
        yield Finding(
            "version", "info", f"PostgreSQL {major} is newer than the tested {_tested()}; the newest known questions are asked"
        )
    else:
        yield Finding("version", "ok", f"PostgreSQL {major}")


def _tested() -> str:
    return ", ".join(map(str, TESTED_MAJORS))


def _sampling_grants(server: ServerSide, host: HostSide) -> Iterator[Finding]:
    grants = monitor_grants(server.role, server.major)
    if server.superuser:
        remedy = "CREATE ROLE pgherd LOGIN; then run the output of `pgherd-agent sql --for monitor,backup`"
        yield Finding("grants.monitor", "warning", f"{server.role} is a superuser: far more than sampling needs", remedy)
    elif "pg_monitor" in server.memberships:
        yield Finding("grants.monitor", "ok", f"{server.role} is a member of pg_monitor")
    elif {"pg_read_all_stats", "pg_read_all_settings"} <= server.memberships:
        message = f"{server.role} reads statistics and settings but can't list pg_wal: pg_wal_size_bytes stays unknown"
        yield Finding("grants.monitor", "warning", message, f"{grants[0].sql};")
    else:
        message = f"{server.role} isn't a member of pg_monitor: sessions, WAL and data directory stay unknown"
        yield Finding("grants.monitor", "blocker", message, f"{grants[0].sql};")
    if server.major >= 16 and not server.superuser:
        if "pg_use_reserved_connections" not in server.memberships:
            message = "without pg_use_reserved_connections the agent can't reconnect when connections run out"
            yield Finding("grants.reserved_connections", "warning", message, f"{grants[1].sql};")
        elif server.settings.get("reserved_connections", "0") == "0":
            message = "reserved_connections is 0: pg_use_reserved_connections has nothing to use"
            yield Finding("grants.reserved_connections", "info", message)


def _inside_databases(server: ServerSide, host: HostSide) -> Iterator[Finding]:
    """What the walks over the databases and the statements' figures need."""
    for database in server.databases:
        if database.error:
            message = f"tables and sizes of database {database.name} stay unknown: {database.error}"
            remedy = f"GRANT CONNECT ON DATABASE {quoted(database.name)} TO {quoted(server.role)};"
            yield Finding("sampling.databases", "unknown", message, remedy)
    hidden = sum(database.sequences_unreadable for database in server.databases)
    if hidden and not server.superuser:
        name = quoted(server.role)
        remedy = (
            f"GRANT pg_read_all_data TO {name};"
            if server.major >= 14
            else f"GRANT SELECT ON ALL SEQUENCES IN SCHEMA public TO {name};"
        )
        yield Finding(
            "sampling.sequences", "unknown", f"how full {hidden} sequences are can't be read by {server.role}", remedy
        )
    if server.statements is None:
        message = "shared_preload_libraries can't be read: whether pg_stat_statements counts is unknown"
        yield Finding("sampling.statements", "unknown", message, f"GRANT pg_read_all_settings TO {quoted(server.role)};")
    elif server.statements == "not_preloaded":
        message = "pg_stat_statements isn't preloaded: which statements take the time stays unknown"
        remedy = (
            "ALTER SYSTEM SET shared_preload_libraries = 'pg_stat_statements'; -- beside what it has; then restart the server"
        )
        yield Finding("sampling.statements", "warning", message, remedy)
    elif server.statements == "extension_absent":
        message = "the extension pg_stat_statements isn't in the database that conninfo names: statements stay unknown"
        yield Finding("sampling.statements", "warning", message, f"{statements_extension().sql};")
    else:
        yield Finding("sampling.statements", "ok", "pg_stat_statements is there")


_UNMEASURED: Final = {
    "permission_denied": "run the agent as a user that may enter it, or name a path on the same volume in disk_paths",
    "stderr_hidden": "name the log directory as disk_paths.log_directory, or run the agent as the server's user",
    "data_directory_hidden": "GRANT pg_read_all_settings to the agent's role, or state data_directory",
    "log_directory_hidden": "GRANT pg_read_all_settings to the agent's role, or name it in disk_paths",
    "not_supported": "boot with psi=1 for pressure figures",
}


def _volumes(host: HostSide) -> Iterator[Finding]:
    if host.unmeasured.get("disk") == "remote_server":
        message = "the server isn't on this host (or in a container of it): no disk and host series; everything else works"
        yield Finding("sampling.host", "info", message)
        return
    for probe, reason in host.unmeasured.items():
        remedy = _UNMEASURED.get(
            reason, "see that the path exists and its volume answers, or name another path on it in disk_paths"
        )
        yield Finding("sampling.host", "unknown", f"{probe.removeprefix('disk_')} can't be measured: {reason}", remedy)
    if host.volumes and not host.unmeasured:
        yield Finding("sampling.host", "ok", f"measures the volumes of {', '.join(host.volumes)}")


def _backup_grants(server: ServerSide, host: HostSide) -> Iterator[Finding]:
    if not host.backups_enabled:
        yield Finding("grants.backup", "info", "backups are disabled in the configuration (backup.enabled)")
        return
    blind = [database for database in server.databases if database.error]
    for database in blind:
        message = f"database {database.name} can't be looked into: {database.error}"
        remedy = f"GRANT CONNECT ON DATABASE {quoted(database.name)} TO {quoted(server.role)};"
        yield Finding("grants.backup", "unknown", message, remedy)
    for name in server.databases_closed:
        message = f"database {name} allows no connections and can't be dumped: backups count as incomplete"
        remedy = f"ALTER DATABASE {quoted(name)} ALLOW_CONNECTIONS true; -- or drop it"
        yield Finding("databases.closed", "warning", message, remedy)
    read, bypass, large, authid = backup_grants(server.role, server.major)
    total = sum(database.tables_unreadable for database in server.databases)
    if total:
        names = ", ".join(d.name for d in server.databases if d.tables_unreadable)
        yield Finding("grants.backup", "blocker", f"{total} tables can't be read by {server.role} (in {names})", f"{read.sql};")
    elif not blind:
        yield Finding("grants.backup", "ok", f"{server.role} reads every table of {len(server.databases)} databases")
    if any(database.tables_with_rls for database in server.databases) and not (server.bypass_rls or server.superuser):
        message = "tables with row level security exist: pg_dump fails without BYPASSRLS"
        yield Finding("grants.row_security", "blocker", message, f"{bypass.sql};")
    if sum(database.large_objects_unreadable for database in server.databases):
        message = "large objects of other owners exist: pg_dump fails on them"
        yield Finding("grants.large_objects", "blocker", message, f"{large.sql};")
    if any(database.subscriptions for database in server.databases) and not server.superuser:
        message = "subscriptions exist and only a superuser's pg_dump keeps them: backups are incomplete"
        remedy = "keep their CREATE SUBSCRIPTION statements elsewhere, or let a superuser role take this node's backups"
        yield Finding("grants.subscriptions", "warning", message, remedy)
    if host.role_passwords and not (server.may_read_pg_authid or server.superuser):
        message = "role passwords can't be read: backups count as incomplete"
        remedy = f'{authid.sql}; -- or set "role_passwords = false" under [backup]'
        yield Finding("grants.role_passwords", "warning", message, remedy)


def _wal(server: ServerSide, host: HostSide) -> Iterator[Finding]:
    settings = server.settings
    level = settings.get("wal_level")
    if level is None:
        yield Finding(
            "wal_level", "unknown", "wal_level can't be read", f"GRANT pg_read_all_settings TO {quoted(server.role)};"
        )
    elif level == "minimal":
        yield Finding(
            "wal_level",
            "warning",
            "wal_level = minimal: no standby and no WAL archive is possible",
            _alter("wal_level", "replica", restart=True),
        )
    else:
        yield Finding("wal_level", "ok", f"wal_level = {level}")
    if settings.get("max_wal_senders") == "0":
        message = "max_wal_senders = 0: no standby can stream and no base backup can be taken"
        yield Finding("max_wal_senders", "warning", message, _alter("max_wal_senders", "10", restart=True))
    if settings.get("full_page_writes") == "off":
        message = "full_page_writes = off: a crash can tear pages, and pg_rewind refuses this cluster"
        yield Finding("full_page_writes", "warning", message, _alter("full_page_writes", "on"))
    if settings.get("fsync") == "off":
        yield Finding(
            "fsync", "warning", "fsync = off: an operating system crash can destroy the cluster", _alter("fsync", "on")
        )
    checksums, hints = settings.get("data_checksums"), settings.get("wal_log_hints")
    if checksums == "on" or hints == "on":
        yield Finding("rewind", "ok", "pg_rewind can rejoin a former primary")
    elif checksums is None:
        yield Finding(
            "rewind", "unknown", "data_checksums can't be read", f"GRANT pg_read_all_settings TO {quoted(server.role)};"
        )
    else:
        message = "neither data checksums nor wal_log_hints: a former primary can't be rewound, only built anew"
        yield Finding("rewind", "warning", message, _alter("wal_log_hints", "on", restart=True))
    if checksums == "off":
        remedy = "stop the server cleanly, then: pg_checksums --enable -D <data directory>"
        yield Finding("data_checksums", "warning", "no data checksums: damaged pages are read without a word", remedy)


def _alter(name: str, value: str, *, restart: bool = False) -> str:
    after = "then restart the server" if restart else "SELECT pg_reload_conf();"
    return f"ALTER SYSTEM SET {name} = '{value}'; {'-- ' if restart else ''}{after}"


def _archiving(server: ServerSide, host: HostSide) -> Iterator[Finding]:
    settings = server.settings
    mode = settings.get("archive_mode")
    if mode is None:
        yield Finding(
            "archiving", "unknown", "archive_mode can't be read", f"GRANT pg_read_all_settings TO {quoted(server.role)};"
        )
        return
    if mode == "off":
        yield Finding("archiving", "info", "archive_mode = off: recovery goes back to whole backups, not to a point in time")
        return
    if not settings.get("archive_command") and not settings.get("archive_library"):
        message = "archive_mode is on with neither archive_command nor archive_library: WAL piles up in pg_wal"
        yield Finding("archiving", "blocker", message, _alter("archive_command", "<your archive command>"))
        return
    archiver = server.archiver
    if archiver is None:
        yield Finding("archiving", "unknown", "pg_stat_archiver can't be read", f"GRANT pg_monitor TO {quoted(server.role)};")
    elif archiver.failing:
        message = f"archiving fails: {archiver.failed_count} failures, last at {archiver.last_failed_wal}; WAL piles up until it works"
        yield Finding(
            "archiving", "blocker", message, "read the server log for the archive command's message, then mend archive_command"
        )
    elif archiver.last_archived_age_s is None:
        yield Finding(
            "archiving", "warning", "nothing has been archived yet", "SELECT pg_switch_wal(); -- then look at pg_stat_archiver"
        )
    else:
        yield Finding("archiving", "ok", f"last segment archived {archiver.last_archived_age_s:.0f} s ago")


def _slots(server: ServerSide, host: HostSide) -> Iterator[Finding]:
    if server.slots is None:
        yield Finding("slots", "unknown", "replication slots can't be read", f"GRANT pg_monitor TO {quoted(server.role)};")
        return
    for slot in server.slots:
        if slot.wal_status in ("lost", "unreserved"):
            message = f"slot {slot.name} is {slot.wal_status}: its consumer can't catch up any more"
            yield Finding("slots", "warning", message, _drop(slot))
        elif not slot.active:
            kept = "unknown" if slot.retained_bytes is None else f"{slot.retained_bytes / _GIB:.2f} GiB"
            message = f"slot {slot.name} is inactive and keeps WAL ({kept} so far)"
            yield Finding("slots", "warning", message, f"bring its consumer back, or: {_drop(slot)}")
    if server.slots and server.settings.get("max_slot_wal_keep_size") == "-1":
        message = "max_slot_wal_keep_size = -1: one dead consumer can fill the disk of pg_wal and stop the server"
        yield Finding("slots.bound", "warning", message, _alter("max_slot_wal_keep_size", "64GB"))
    elif not any(not slot.active or slot.wal_status in ("lost", "unreserved") for slot in server.slots):
        yield Finding("slots", "ok", f"{len(server.slots)} slots, none inactive")


def _drop(slot: Slot) -> str:
    name = slot.name.replace("'", "''")
    return f"SELECT pg_drop_replication_slot('{name}');"


def _replication(server: ServerSide, host: HostSide) -> Iterator[Finding]:
    settings = server.settings
    names = settings.get("synchronous_standby_names", "")
    members = names.rpartition("(")[2].rstrip(") ").split(",")
    if "*" in [member.strip().strip('"') for member in members]:
        message = "synchronous_standby_names has '*': any client that streams WAL (a backup tool, a stray standby) can satisfy or block commits"
        remedy = _alter("synchronous_standby_names", "FIRST 1 (<name of your standby>)")
        yield Finding("synchronous_standby_names", "warning", message, remedy)
    if server.is_standby:
        yield Finding("role", "info", "this node is a standby")
    if settings.get("hot_standby") == "off":
        message = "hot_standby = off: as a standby it can't be sampled or backed up"
        yield Finding("hot_standby", "warning", message, _alter("hot_standby", "on", restart=True))
    if server.is_standby and settings.get("hot_standby_feedback") == "off" and host.backups_enabled:
        delay = settings.get("max_standby_streaming_delay", "")
        message = f"a long pg_dump on this standby is cancelled by replay after max_standby_streaming_delay ({delay} ms)"
        yield Finding("standby_backup", "info", message)


def _timeouts(server: ServerSide, host: HostSide) -> Iterator[Finding]:
    for name in ("statement_timeout", "idle_in_transaction_session_timeout", "transaction_timeout", "idle_session_timeout"):
        value = server.role_settings.get(name)
        if value not in (None, "0", "0ms"):
            message = (
                f"{name} = {value} for {server.role}: pgherd sets its own for its sessions, other tools of this role are cut"
            )
            yield Finding("timeouts", "info", message)
    value = server.settings.get("idle_in_transaction_session_timeout")
    if value == "0":
        message = "idle_in_transaction_session_timeout = 0: a forgotten transaction can hold back vacuum for ever"
        yield Finding("timeouts", "warning", message, _alter("idle_in_transaction_session_timeout", "15min"))


_ARCHIVE_TOOLS: Final = {
    "pgbackrest": "pgBackRest",
    "barman": "Barman",
    "wal-g": "WAL-G",
    "wal-e": "WAL-E",
    "pg_probackup": "pg_probackup",
}
_MANAGERS: Final = {
    "patroni": "Patroni",
    "repmgr": "repmgr",
    "pg_auto_failover": "pg_auto_failover",
    "pgautofailover": "pg_auto_failover",
    "stolon": "Stolon",
    "cnpg": "CloudNativePG",
}


def _managers(server: ServerSide, host: HostSide) -> Iterator[Finding]:
    settings = server.settings
    clues = " ".join(
        [*server.application_names, *(slot.name for slot in server.slots or ()), settings.get("primary_conninfo", "")]
        + [
            settings.get(name, "")
            for name in ("config_file", "hba_file", "shared_preload_libraries", "restore_command", "primary_slot_name")
        ]
        + list(host.foreign_files)
    ).lower()
    managers = sorted({title for word, title in _MANAGERS.items() if word in clues})
    if managers:
        message = f"{' and '.join(managers)} seems to manage this cluster: pgherd must not promote or restart it"
        remedy = "keep pgherd's failover off for this cluster (it is by default); let that manager switch roles"
        yield Finding("foreign_manager", "warning", message, remedy)
    elif settings.get("config_file") is None:
        yield Finding(
            "foreign_manager", "unknown", "file settings can't be read", f"GRANT pg_read_all_settings TO {quoted(server.role)};"
        )
    else:
        yield Finding("foreign_manager", "ok", "no trace of another cluster manager")
    commands = " ".join(settings.get(name, "") for name in ("archive_command", "archive_library", "restore_command")).lower()
    tools = sorted({title for word, title in _ARCHIVE_TOOLS.items() if word in commands})
    if tools:
        yield Finding(
            "foreign_archive", "info", f"{' and '.join(tools)} archives WAL here; pgherd leaves archive_command alone"
        )


def _repository_room(server: ServerSide, host: HostSide) -> Iterator[Finding]:
    if not host.backups_enabled or host.repository is None:
        return
    if server.databases_bytes is None:
        message = "the databases' size can't be read: whether the repository has room is unknown"
        yield Finding("repository.room", "unknown", message, f"GRANT pg_monitor TO {quoted(server.role)};")
        return
    expected = server.databases_bytes * _COMPRESSED_SHARE
    free, size = host.repository.avail_bytes / _GIB, server.databases_bytes / _GIB
    figures = f"{free:.1f} GiB free for databases of {size:.1f} GiB"
    if host.repository.avail_bytes < expected:
        remedy = "point backup.repository at a larger volume, or lower backup.keep"
        yield Finding("repository.room", "warning", f"the repository may not hold even one backup: {figures}", remedy)
    else:
        yield Finding("repository.room", "ok", figures)


_SERVER_CHECKS: Final[tuple[Callable[[ServerSide, HostSide], Iterator[Finding]], ...]] = (
    _version, _sampling_grants, _inside_databases, _backup_grants, _wal, _archiving, _slots, _replication, _timeouts, _managers, _repository_room,
)  # fmt: skip


def _host(host: HostSide, server: ServerSide | None) -> Iterator[Finding]:
    yield from _volumes(host)
    if host.backups_enabled:
        if host.client_major is not None:
            yield Finding("client_programs", "ok", f"pg_dump {host.client_major} is there")
        elif server is None:
            yield Finding(
                "client_programs",
                "unknown",
                "which pg_dump is needed is unknown while the server is",
                "mend the connection first",
            )
        else:
            remedy = f"apt install postgresql-client-{server.major}, or state bin_directory under [[nodes]]"
            yield Finding("client_programs", "blocker", host.client_problem, remedy)
        if host.repository_problem:
            remedy = "create it as the agent's user (install -d -m 700), or set backup.repository"
            yield Finding("repository", "blocker", host.repository_problem, remedy)
    if host.scratch_problem and server is not None:
        message = f"no backup can be proven by restoring it here: {host.scratch_problem}"
        remedy = f"apt install postgresql-{server.major}, or state bin_directory under [[nodes]] and backup.scratch_user"
        yield Finding("restore.scratch", "warning", message, remedy)
    elif host.scratch_problem == "":
        yield Finding("restore.scratch", "ok", "a scratch server of the node's version can run here")
    if not host.restore_roots:
        yield Finding("restore_roots", "info", "no policy.restore_roots: restores go only into scratch servers")
    for name, problem in host.restore_roots.items():
        if problem:
            yield Finding(
                "restore_roots",
                "warning",
                f"restore root {name}: {problem}",
                "create the directory for the agent's user, or mend the path",
            )
        else:
            yield Finding("restore_roots", "ok", f"restore root {name} is usable")

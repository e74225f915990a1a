"""The judgement of `check` over facts: each trouble has its finding, each finding its remedy."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from pgherd.agent.grants.statements import PURPOSES, grants, quoted, script
from pgherd.agent.preflight.facts import Archiver, DatabaseRights, Disk, Facts, HostSide, ServerSide, Slot
from pgherd.agent.preflight.judge import Finding, judge

HOST = HostSide(client_major=17, scratch_problem="", repository=Disk(1 << 40, "/"), restore_roots={"main": ""})
SERVER = ServerSide(
    version_num=170010,
    role="pgherd",
    superuser=False,
    bypass_rls=True,
    replication=False,
    memberships=frozenset({"pg_monitor", "pg_use_reserved_connections", "pg_read_all_data"}),
    is_standby=False,
    settings={
        "wal_level": "replica", "max_wal_senders": "10", "full_page_writes": "on", "fsync": "on", "data_checksums": "on",
        "wal_log_hints": "off", "archive_mode": "on", "archive_command": "cp %p /archive/%f", "hot_standby": "on",
        "synchronous_standby_names": "", "max_slot_wal_keep_size": "65536", "config_file": "/data/postgresql.conf",
        "reserved_connections": "3", "idle_in_transaction_session_timeout": "900000",
    },
    role_settings={},
    databases_bytes=1 << 30,
    databases_closed=(),
    databases=(DatabaseRights("app"),),
    slots=(Slot("standby", "physical", True, 0, "reserved"),),
    archiver=Archiver(10.0, None, "", 0),
    application_names=frozenset({"psql"}),
    may_read_pg_authid=True,
    statements="",
)  # fmt: skip


def found(server: ServerSide | None = SERVER, host: HostSide = HOST) -> dict[str, Finding]:
    findings = judge(Facts("n1", host, server, "postgres.unreachable", "connection refused", "start it"))
    gravest: dict[str, Finding] = {}
    for finding in findings:
        gravest.setdefault(finding.check, finding)
    return gravest


def setting(**values: str) -> dict[str, Any]:
    return {"settings": {**SERVER.settings, **values}}


def test_a_healthy_node_has_nothing_to_mend() -> None:
    assert {finding.severity for finding in found().values()} <= {"ok", "info"}


@pytest.mark.parametrize(
    ("change", "check", "severity", "remedy"),
    [
        ({"version_num": 120000}, "version", "blocker", "pg_upgrade"),
        ({"version_num": 140000}, "version", "info", ""),
        ({"version_num": 190000}, "version", "info", ""),
        ({"memberships": frozenset()}, "grants.monitor", "blocker", "GRANT pg_monitor TO pgherd;"),
        ({"statements": "not_preloaded"}, "sampling.statements", "warning", "shared_preload_libraries"),
        ({"statements": "extension_absent"}, "sampling.statements", "warning", "CREATE EXTENSION"),
        ({"databases": (DatabaseRights("x", error="no"),)}, "sampling.databases", "unknown", "GRANT CONNECT ON DATABASE x"),
        ({"databases": (DatabaseRights("x", sequences_unreadable=3),)}, "sampling.sequences", "unknown", "pg_read_all_data"),
        ({"memberships": frozenset({"pg_monitor"})}, "grants.reserved_connections", "warning", "GRANT pg_use_reserved"),
        ({"superuser": True}, "grants.monitor", "warning", "--for monitor,backup"),
        ({"databases": (DatabaseRights("a", tables_unreadable=3),)}, "grants.backup", "blocker", "GRANT pg_read_all_data"),
        ({"databases": (DatabaseRights("a", error="no CONNECT"),)}, "grants.backup", "unknown", "GRANT CONNECT ON DATABASE a"),
        ({"databases": (DatabaseRights("a", tables_with_rls=1),), "bypass_rls": False}, "grants.row_security", "blocker", "BYPASSRLS"),
        ({"databases": (DatabaseRights("a", large_objects_unreadable=1),)}, "grants.large_objects", "blocker", "lo_compat"),
        ({"databases": (DatabaseRights("a", subscriptions=1),)}, "grants.subscriptions", "warning", "CREATE SUBSCRIPTION"),
        ({"databases_closed": ("odd one",)}, "databases.closed", "warning", 'ALTER DATABASE "odd one" ALLOW_CONNECTIONS true;'),
        ({"may_read_pg_authid": False}, "grants.role_passwords", "warning", "role_passwords = false"),
        (setting(wal_level="minimal"), "wal_level", "warning", "ALTER SYSTEM SET wal_level"),
        (setting(max_wal_senders="0"), "max_wal_senders", "warning", "restart"),
        (setting(full_page_writes="off"), "full_page_writes", "warning", "pg_reload_conf"),
        (setting(data_checksums="off"), "rewind", "warning", "wal_log_hints"),
        (setting(data_checksums="off", wal_log_hints="on"), "data_checksums", "warning", "pg_checksums"),
        (setting(archive_mode="off"), "archiving", "info", ""),
        (setting(archive_command=""), "archiving", "blocker", "archive_command"),
        ({"archiver": Archiver(50.0, 5.0, "0001", 9)}, "archiving", "blocker", "archive_command"),
        ({"archiver": Archiver(5.0, 50.0, "0001", 9)}, "archiving", "ok", ""),
        ({"archiver": None}, "archiving", "unknown", "GRANT pg_monitor"),
        ({"slots": None}, "slots", "unknown", "GRANT pg_monitor"),
        ({"slots": (Slot("it's", "physical", False, 1 << 30, "extended"),)}, "slots", "warning", "drop_replication_slot('it''s')"),
        ({"slots": (Slot("s", "logical", False, None, "lost"),)}, "slots", "warning", "pg_drop_replication_slot"),
        (setting(max_slot_wal_keep_size="-1"), "slots.bound", "warning", "max_slot_wal_keep_size"),
        (setting(synchronous_standby_names="*"), "synchronous_standby_names", "warning", "FIRST 1"),
        (setting(synchronous_standby_names="ANY 1 (a, *)"), "synchronous_standby_names", "warning", "FIRST 1"),
        ({"role_settings": {"statement_timeout": "5s"}}, "timeouts", "info", ""),
        (setting(idle_in_transaction_session_timeout="0"), "timeouts", "warning", "15min"),
        ({"application_names": frozenset({"Patroni restapi"})}, "foreign_manager", "warning", "failover off"),
        (setting(archive_command="pgbackrest --stanza=x archive-push %p"), "foreign_archive", "info", ""),
        ({"databases_bytes": 1 << 50}, "repository.room", "warning", "backup.repository"),
        ({"databases_bytes": None}, "repository.room", "unknown", "pg_monitor"),
        ({"settings": {}}, "foreign_manager", "unknown", "pg_read_all_settings"),
        ({"settings": {}}, "rewind", "unknown", "pg_read_all_settings"),
        ({"settings": {}}, "wal_level", "unknown", "pg_read_all_settings"),
    ],
)  # fmt: skip
def test_each_trouble_has_its_finding(change: dict[str, Any], check: str, severity: str, remedy: str) -> None:
    finding = found(replace(SERVER, **change))[check]
    assert finding.severity == severity, finding
    assert remedy in finding.remedy
    assert bool(finding.remedy) == (severity in ("warning", "blocker", "unknown"))


@pytest.mark.parametrize(
    ("change", "check", "severity"),
    [
        ({"client_major": None, "client_problem": "pg_dump 17 isn't there"}, "client_programs", "blocker"),
        ({"scratch_problem": "PostgreSQL 17 isn't installed"}, "restore.scratch", "warning"),
        ({"repository_problem": "can't be written"}, "repository", "blocker"),
        ({"restore_roots": {}}, "restore_roots", "info"),
        ({"unmeasured": {"disk": "remote_server", "host": "remote_server"}}, "sampling.host", "info"),
        ({"unmeasured": {"disk_pg_wal": "permission_denied"}, "volumes": ("data_directory",)}, "sampling.host", "unknown"),
        ({"volumes": ("data_directory", "pg_wal")}, "sampling.host", "ok"),
        ({"restore_roots": {"main": "isn't a directory"}}, "restore_roots", "warning"),
        ({"foreign_files": ("/etc/patroni.yml",)}, "foreign_manager", "warning"),
        ({"backups_enabled": False}, "grants.backup", "info"),
    ],
)
def test_each_trouble_of_the_host_has_its_finding(change: dict[str, Any], check: str, severity: str) -> None:
    assert found(host=replace(HOST, **change))[check].severity == severity


def test_an_unreachable_server_is_a_blocker_and_the_host_is_judged_all_the_same() -> None:
    findings = found(None, replace(HOST, client_major=None))
    assert findings["connection"].severity == "blocker"
    assert findings["connection"].remedy == "start it"
    assert findings["client_programs"].severity == "unknown"
    assert "restore_roots" in findings


def test_the_gravest_comes_first() -> None:
    severities = [
        finding.severity
        for finding in judge(Facts("n", HOST, replace(SERVER, memberships=frozenset(), databases_bytes=1 << 50)))
    ]
    order = ["blocker", "warning", "unknown", "info", "ok"]
    assert severities == sorted(severities, key=order.index)


def test_nothing_grants_more_than_asked() -> None:
    for major in (13, 14, 15, 16, 17, 18, 19):
        for purpose in PURPOSES:
            for statement in grants("r", major, [purpose]):
                assert " SUPERUSER" not in statement.sql
                assert "CREATEROLE" not in statement.sql
                assert "pg_write_all_data" not in statement.sql
                assert statement.why
    assert not any("REPLICATION" in s.sql for s in grants("r", 17, ["monitor", "backup"]))
    assert [s.sql for s in grants("r", 15, ["monitor"]) if not s.optional] == ["GRANT pg_monitor TO r"]


def test_hostile_role_names_stay_one_identifier() -> None:
    assert quoted("pgherd") == "pgherd"
    assert quoted('x"; DROP TABLE t; --') == '"x""; DROP TABLE t; --"'
    assert 'GRANT pg_monitor TO "Ops Team"' in script("Ops Team", 17, ["monitor"])


def test_facts_are_all_judged() -> None:
    """A fact that no finding depends on is dead weight: changing each to nothing must change something."""
    ignored = {"replication", "is_standby", "role_settings"}  # the last two only add info
    for field in fields(ServerSide):
        if field.name in ignored:
            continue
        empty: Any = {
            "version_num": 120000,
            "role": "x",
            "superuser": True,
            "bypass_rls": False,
            "memberships": frozenset(),
        }.get(field.name)
        host = replace(HOST)
        base = replace(
            SERVER,
            databases=(DatabaseRights("a", tables_with_rls=1),),
            databases_closed=("b",),
            application_names=frozenset({"Patroni"}),
        )
        if field.name in ("settings", "databases", "databases_closed", "application_names"):
            empty = type(getattr(base, field.name))()
        if field.name == "may_read_pg_authid":
            empty = False
        assert found(replace(base, **{field.name: empty}), host) != found(base, host), field.name

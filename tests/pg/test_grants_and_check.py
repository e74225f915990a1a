"""The printed GRANTs, run as printed, are enough for sampling and pg_dump; `check` agrees before and after."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner

from pgherd.agent.main import agent
from pgherd.runtime.process import run
from support.postgres import Server
from support.sampling import sampling
from support.waiting import wait_until

pytestmark = pytest.mark.pg


def cli(*argv: str) -> tuple[int, str]:
    result = CliRunner().invoke(agent, argv)
    return result.exit_code, result.stdout


def check(conninfo: str, *argv: str) -> tuple[int, dict[str, dict[str, Any]]]:
    status, output = cli("check", "--conninfo", conninfo, "--json", *argv)
    found: dict[str, dict[str, Any]] = {}
    for finding in json.loads(output)["findings"]:
        found.setdefault(finding["check"], finding)
    return status, found


@pytest.fixture
def shop(postgres: Server, database: str) -> str:
    """A database with what makes dumps fail: a private schema, row security, another owner's large object."""
    with psycopg.connect(postgres.conninfo(dbname=database), autocommit=True) as connection:
        connection.execute("CREATE SCHEMA private; CREATE TABLE private.orders (id serial, what text)")
        connection.execute("INSERT INTO private.orders (what) VALUES ('a'), ('b')")
        connection.execute(
            "ALTER TABLE private.orders ENABLE ROW LEVEL SECURITY; CREATE POLICY none ON private.orders USING (false)"
        )
        connection.execute("ALTER TABLE private.orders FORCE ROW LEVEL SECURITY")
    return database


@pytest.mark.parametrize("postgres", [15, 17, 18], indirect=True)
def test_printed_grants_are_enough_and_check_says_so(postgres: Server, shop: str, tmp_path: Path) -> None:
    role = f"agent_{os.getpid()}_{shop}"
    postgres.create_role(role)
    try:
        _, before = check(postgres.conninfo(role, shop))
        assert before["grants.monitor"]["severity"] == "blocker"
        assert before["grants.backup"]["severity"] == "blocker"
        assert before["grants.row_security"]["severity"] == "blocker"
        status, script = cli("sql", "--for", "monitor,backup", "--role", role, "--major", str(postgres.major), "--no-create")
        assert status == 0
        postgres.execute(script, dbname=shop)
        status, after = check(postgres.conninfo(role, shop))
        assert {finding["severity"] for name, finding in after.items() if name.startswith("grants.")} <= {
            "ok",
            "info",
            "warning",
        }
        assert status == 0, after

        async def work() -> None:
            async with sampling(tmp_path / "spool", postgres.conninfo(role, shop)) as bench:
                assert (await bench.cycle()).unknown() == {}

        asyncio.run(work())
        dump = tmp_path / "dump"
        argv: list[str | Path] = [postgres.binaries.program("pg_dump"), "-Fc", "-f", dump, "-d", postgres.conninfo(role, shop)]
        run(argv, timeout_s=60).require_success(warnings_allowed=False)
        assert dump.stat().st_size > 1000
    finally:
        postgres.execute(f'DROP OWNED BY "{role}"; DROP ROLE "{role}"', dbname=shop)


@pytest.mark.parametrize("postgres", [15, 17, 18], indirect=True)
def test_the_whole_script_runs_on_every_major(postgres: Server) -> None:
    role = f"everything_{postgres.major}"
    _, script = cli("sql", "--for", "failover,backup,monitor", "--role", role, "--major", str(postgres.major))
    uncommented = "\n".join(
        line.removeprefix("-- ") if line.startswith(("-- GRANT", "-- ALTER")) else line for line in script.splitlines()
    )
    try:
        postgres.execute(uncommented)
        assert not postgres.execute("SELECT rolsuper OR rolcreatedb OR rolcreaterole FROM pg_roles WHERE rolname = %s", [role])[
            0
        ][0]
    finally:
        postgres.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_large_objects_of_others_are_found_and_the_remedy_works(postgres: Server, database: str, tmp_path: Path) -> None:
    role = f"lob_{database}"
    postgres.create_role(role, member_of=["pg_monitor", "pg_read_all_data"])
    try:
        postgres.execute("SELECT lo_from_bytea(0, 'x')", dbname=database)
        _, before = check(postgres.conninfo(role, database))
        assert before["grants.large_objects"]["severity"] == "blocker"
        postgres.execute(before["grants.large_objects"]["remedy"])
        _, after = check(postgres.conninfo(role, database))
        assert "grants.large_objects" not in after
        argv: list[str | Path] = [
            postgres.binaries.program("pg_dump"),
            "-Fc",
            "-f",
            tmp_path / "dump",
            "-d",
            postgres.conninfo(role, database),
        ]
        run(argv, timeout_s=60).require_success(warnings_allowed=False)
    finally:
        postgres.execute(f'DROP OWNED BY "{role}"; DROP ROLE "{role}"', dbname=database)


def test_real_troubles_are_found(private_postgres: Server) -> None:
    server = private_postgres
    server.execute("SELECT pg_create_physical_replication_slot('forgotten', true)")
    server.set(synchronous_standby_names="*", archive_mode="on", archive_command="/bin/false")
    server.restart()
    server.execute("SET synchronous_commit = local; ALTER DATABASE template1 ALLOW_CONNECTIONS false")
    server.execute("SET synchronous_commit = local; CREATE TABLE t (); SELECT pg_switch_wal()")
    wait_until(lambda: server.execute("SELECT failed_count > 0 FROM pg_stat_archiver")[0][0], 20, "a failed archiving")
    status, found = check(server.conninfo())
    assert status == 6
    assert found["archiving"]["severity"] == "blocker"
    assert found["slots"]["severity"] == "warning"
    assert "template1" in found["databases.closed"]["message"]
    assert found["restore.scratch"]["severity"] == "ok"
    assert found["slots.bound"]["severity"] == "warning"
    assert found["synchronous_standby_names"]["severity"] == "warning"
    server.stop()
    status, found = check(server.conninfo())
    assert status == 6
    assert found["connection"]["severity"] == "blocker"
    assert "postgres.unreachable" in found["connection"]["message"]
    assert "failed: " in found["connection"]["message"], "which connection, and why"


def test_the_child_contract(postgres: Server, tmp_path: Path) -> None:
    config = tmp_path / "agent.toml"
    config.write_text(
        f'state_directory = "{tmp_path}"\n[[nodes]]\nalias = "n1"\ncluster = "c1"\nconninfo = "{postgres.conninfo()}"\n'
    )
    result = tmp_path / "result.json"
    argv = [
        sys.executable,
        "-m",
        "pgherd.agent.main",
        "--config",
        str(config),
        "check",
        "--node",
        "n1",
        "--ndjson",
        "--result-file",
        str(result),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [next(iter(line)) for line in lines][:-1] == ["progress"] * (len(lines) - 1)
    assert lines[-1] == json.loads(result.read_text())
    assert {"check", "severity", "message", "remedy"} == set(lines[-1]["result"]["findings"][0])
    failed = subprocess.run(
        [*argv[:-5], "--ndjson", "--result-file", str(result), "--node", "nobody"], capture_output=True, text=True, timeout=60
    )
    assert failed.returncode == 2
    assert json.loads(failed.stdout.splitlines()[-1])["error"]["code"] == "usage.invalid"
    assert json.loads(result.read_text())["error"]["code"] == "usage.invalid"


def test_a_password_in_an_argument_is_refused() -> None:
    status, output = cli("check", "--conninfo", "host=/nowhere password=hunter2")
    assert status == 2
    assert "hunter2" not in output

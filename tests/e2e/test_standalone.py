"""The agent on its own: scheduled backups and everything by hand, with no collector anywhere."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pgherd.agent.backup.outcomes import read_outcomes
from pgherd.proto.codes import Exit
from support.postgres import Server
from support.waiting import wait_until

pytestmark = [pytest.mark.pg, pytest.mark.slow]

CONFIG = """\
state_directory = "{home}/state"
[sampling]
interval = "500ms"
server_share_max = 1.0
[backup]
repository = "{home}/repository"
[[nodes]]
alias = "n1"
cluster = "c1"
conninfo = "{conninfo}"
bin_directory = "{bin_directory}"
"""


@pytest.fixture
def config(postgres: Server, database: str, home: Path) -> Path:
    """An agent's configuration for the session's server; `home` can be reached by a scratch server's user."""
    postgres.execute("CREATE TABLE t AS SELECT i, md5(i::text) AS note FROM generate_series(1, 1000) i", dbname=database)
    file = home / "agent.toml"
    text = CONFIG.format(home=home, conninfo=postgres.conninfo(), bin_directory=postgres.binaries.bin_directory)
    file.write_text(text)
    return file


def agent(config: Path, *arguments: str) -> Any:
    argv = [sys.executable, "-m", "pgherd.agent.main", "--config", str(config), "--json", *arguments]
    finished = subprocess.run(argv, capture_output=True, text=True, timeout=90)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


@pytest.fixture
def resident(config: Path) -> Iterator[subprocess.Popen[bytes]]:
    argv = [sys.executable, "-m", "pgherd.agent.main", "--config", str(config), "run", "--standalone"]
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as process:
        yield process
        process.terminate()  # it ends its children
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def test_a_scheduled_backup_is_taken_verified_and_can_be_restored(config: Path, resident: subprocess.Popen[bytes]) -> None:
    """A node that was never backed up is due at once; the hour that follows is the schedule's unit test's."""
    (backup,) = wait_until(lambda: agent(config, "backup", "ls"), 60, "the first scheduled backup")
    wait_until(lambda: agent(config, "backup", "ls")[0]["grade"] == "read back", 30, "its verification")
    restored = agent(config, "backup", "restore", "--node", "n1", "--backup", backup["name"])
    assert restored["grade"] == "content-equal"
    assert restored["rows_compared"] >= 1000
    (directory,) = (config.parent / "state" / "outcomes").iterdir()
    outcomes = read_outcomes(directory)  # what the resident's samples are made of, whoever ran the verb
    assert (outcomes.succeeded["run"].data_unix_ns, outcomes.succeeded["run"].grade) == (backup["started_unix_ns"], "read back")
    assert outcomes.succeeded["restore"].grade == "content-equal"
    assert outcomes.failed_unix_ns == {}
    # status.json is written every few seconds.
    status = wait_until(
        lambda: (
            (told := agent(config, "status"))["next_backup_unix_ns"]["n1"] > backup["started_unix_ns"] + 3_500_000_000_000
            and told
        ),
        30,
        "the next backup, in an hour",
    )
    assert status["connected"] is None
    assert status["nodes"][0]["condition"] == "up"
    assert status["spool"]["sampled_points"] > 0
    resident.send_signal(signal.SIGTERM)
    assert resident.wait(20) == 0


def test_a_second_agent_on_the_same_state_is_refused(config: Path, resident: subprocess.Popen[bytes]) -> None:
    wait_until((config.parent / "state" / "status.json").exists, 30, "the first agent")
    argv = [sys.executable, "-m", "pgherd.agent.main", "--config", str(config), "run", "--standalone"]
    second = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert second.returncode == Exit.FAILED
    assert "state.locked" in second.stderr
    assert resident.poll() is None


@pytest.mark.fault
@pytest.mark.parametrize(("line", "code"), [(b"garbage\n" * 3, "format.corrupt"), (None, "format.newer")])
def test_a_journal_that_cant_be_read_stops_commands_and_not_sampling(config: Path, line: bytes | None, code: str) -> None:
    directory = config.parent / "state" / "commands" / "5f0c1df0-3b0e-4f42-8d9b-0f8b1a4a7c11"
    directory.mkdir(parents=True, mode=0o700)
    if line is None:
        record = b'{"type":"opened","format":"pgherd.command_journal","version":2}'
        line = b'{"crc32":"%08x","record":%s}\n' % (zlib.crc32(record), record)
    (directory / "journal.jsonl").write_bytes(line)
    argv = [sys.executable, "-m", "pgherd.agent.main", "--config", str(config), "run", "--standalone"]
    with subprocess.Popen(argv, stderr=subprocess.PIPE) as process:
        try:
            wait_until(lambda: (config.parent / "state" / "status.json").exists() or process.poll() is not None, 30, "a status")
            assert process.poll() is None
            status = wait_until(lambda: (s := agent(config, "status"))["spool"]["sampled_points"] > 0 and s, 30, "samples")
        finally:
            process.terminate()
            _, errors = process.communicate(timeout=20)
    assert process.returncode == 0
    assert b"commands.disabled" in errors
    assert status["nodes"][0]["condition"] == "up"
    assert status["commands_disabled"]["code"] == code
    assert agent(config, "backup", "ls") == [], "the schedule goes through the same journal"
    assert (directory / "journal.jsonl").read_bytes() == line


def test_an_agent_that_never_joined_says_how_to(config: Path) -> None:
    argv = [sys.executable, "-m", "pgherd.agent.main", "--config", str(config), "run"]
    finished = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    assert finished.returncode == Exit.FAILED
    assert "pgherd-agent join" in finished.stderr
    assert "Traceback" not in finished.stderr

"""What the verbs record of backups and drills, and the samples that it becomes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pgherd.agent.backup.figures import BackupFigures, outcome_samples
from pgherd.agent.backup.outcomes import FORMAT, VERSION, Outcomes, OutcomeVerb, Success, read_outcomes, recording
from pgherd.agent.config import BackupConfig
from pgherd.agent.node import NodeStatus, Role
from pgherd.agent.telemetry.convert import Source
from pgherd.agent.telemetry.emit import Emitter
from pgherd.proto.errors import DeniedError, IntegrityError, PgherdError, PreconditionError, TransientError
from pgherd.runtime.clock import SystemClock
from support.sampling import decode
from support.spooling import open_spool

RUN: dict[str, Any] = {"started_unix_ns": 5_000_000_000, "stored_bytes": 77, "complete": True, "grade": "read back"}
RESTORE: dict[str, Any] = {"grade": "content-equal"}


def record(directory: Path, verb: OutcomeVerb, outcome: dict[str, Any] | PgherdError) -> None:
    try:
        with recording(directory, verb, SystemClock()) as succeeded:
            if isinstance(outcome, PgherdError):
                raise outcome
            succeeded(outcome)
    except PgherdError:
        assert isinstance(outcome, PgherdError)


def values(outcomes: Outcomes) -> dict[str, float]:
    return {sample.metric.name: sample.value for sample in outcome_samples(outcomes)}


def test_nothing_is_known_before_there_was_one(tmp_path: Path) -> None:
    assert values(read_outcomes(tmp_path / "none")) == {}


def test_a_backup_its_proof_and_a_failure_after_it(tmp_path: Path) -> None:
    record(tmp_path, "run", RUN)
    seen = values(read_outcomes(tmp_path))
    assert seen["pgherd_backup_last_success_timestamp_seconds"] == 5.0, "the age of the data, not of the file"
    assert (seen["pgherd_backup_last_size_bytes"], seen["pgherd_backup_last_complete"]) == (77, 1)
    assert "pgherd_backup_last_verified_timestamp_seconds" in seen
    assert "pgherd_backup_last_restored_timestamp_seconds" not in seen
    record(tmp_path, "restore", RESTORE)
    assert {"pgherd_backup_last_restored_timestamp_seconds", "pgherd_backup_restore_duration_seconds"} <= set(
        values(read_outcomes(tmp_path))
    )
    record(tmp_path, "run", TransientError("disk.full", "no room"))
    failed = outcome_samples(read_outcomes(tmp_path))
    (failure,) = [sample for sample in failed if sample.metric.name == "pgherd_backup_last_failure_timestamp_seconds"]
    assert failure.labels == {"verb": "run"}
    assert values(read_outcomes(tmp_path))["pgherd_backup_last_success_timestamp_seconds"] == 5.0, "what succeeded stays known"
    record(tmp_path, "run", {**RUN, "complete": False, "grade": "unproven"})
    seen = values(read_outcomes(tmp_path))
    assert "pgherd_backup_last_failure_timestamp_seconds" not in seen
    assert seen["pgherd_backup_last_complete"] == 0


@pytest.mark.parametrize("grade", ["unproven", "read back"])
def test_only_a_restore_that_proved_something_counts(grade: str) -> None:
    unproven = Outcomes({"restore": Success(1, 1.0, grade)}, {})
    assert "pgherd_backup_last_restored_timestamp_seconds" not in values(unproven)


def begun(directory: Path) -> subprocess.Popen[bytes]:
    """A process in the middle of a backup."""
    code = (
        "import sys, pathlib\n"
        "from pgherd.agent.backup.outcomes import recording\n"
        "from pgherd.runtime.clock import SystemClock\n"
        "with recording(pathlib.Path(sys.argv[1]), 'run', SystemClock()):\n"
        "    print('begun', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"begun\n"
    return child


FAILURE = "pgherd_backup_last_failure_timestamp_seconds"


def test_a_process_that_is_killed_leaves_a_failure(tmp_path: Path) -> None:
    """Told while it lies there, kept when the next run begins, over when that one has succeeded."""
    record(tmp_path, "run", RUN)
    first = begun(tmp_path)
    assert FAILURE not in values(read_outcomes(tmp_path)), "it still runs"
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=30)
    killed_s = values(read_outcomes(tmp_path))[FAILURE]
    assert killed_s > 0
    second = begun(tmp_path)
    assert values(read_outcomes(tmp_path))[FAILURE] == killed_s
    with contextlib.suppress(PreconditionError), recording(tmp_path, "run", SystemClock()):
        raise PreconditionError("state.locked", "another one runs")
    assert (tmp_path / "run.running").exists(), "the mark of another isn't removed"
    second.communicate(timeout=30)  # the end of its input: it ends by itself
    record(tmp_path, "run", RUN)
    assert FAILURE not in values(read_outcomes(tmp_path))
    assert not list(tmp_path.glob("*.running"))


def test_a_question_that_was_wrong_isn_t_a_failed_backup(tmp_path: Path) -> None:
    record(tmp_path, "restore", DeniedError("restore.outside_roots", "no"))
    assert read_outcomes(tmp_path).failed_unix_ns == {}
    record(tmp_path, "verify", IntegrityError("backup.corrupt", "a byte flipped"))
    assert set(read_outcomes(tmp_path).failed_unix_ns) == {"verify"}


def test_damaged_and_newer_records_are_as_if_they_weren_t_there(tmp_path: Path) -> None:
    record(tmp_path, "run", RUN)
    for content in ("{", json.dumps({"format": FORMAT, "version": VERSION + 1}), json.dumps({"format": FORMAT, "version": 1})):
        (tmp_path / "run.succeeded.json").write_text(content, encoding="utf-8")
        assert read_outcomes(tmp_path) == Outcomes({}, {})


def test_a_record_that_can_t_be_written_costs_no_backup(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    record(tmp_path / "file", "run", RUN)


@pytest.mark.parametrize(
    ("roles", "enabled"), [(["primary"], 1), (["standby"], 0), (["standby", "unknown"], 0), (["unknown"], 1)]
)
def test_a_standby_isn_t_backed_up_also_while_it_is_down(tmp_path: Path, roles: list[Role], enabled: int) -> None:
    async def work() -> float:
        spool = open_spool(tmp_path / "spool", size_max=1 << 20, segment_max=1 << 16)
        seen = list(roles)
        figures = BackupFigures(
            BackupConfig(),
            tmp_path,
            emitter=Emitter(Source("a", "id", "n1", "c1", "host:1"), spool),
            status=lambda: NodeStatus("id", "n1", "c1", "host:1", role=seen[0]),
            clock=SystemClock(),
        )
        value = -1.0
        for _ in roles:
            await figures.state()
            batch = spool.head()
            assert batch is not None
            value = decode(batch.payload).value("pgherd_backup_enabled")
            spool.release(batch, "acked")
            if len(seen) > 1:
                seen.pop(0)
        spool.close()
        return value

    assert asyncio.run(work()) == enabled

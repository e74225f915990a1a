"""What commands prove about backups: grades rise with proofs, and found damage takes them away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pgherd.collector.control.herd import Herd
from pgherd.collector.control.ledger import Ledger
from pgherd.collector.control.views import Views
from pgherd.proto.commands import BackupRun, BackupVerify, Event, Restore, Verb
from pgherd.proto.errors import IntegrityError, TransientError
from pgherd.storage.control.store import ControlStore
from support.control import ManualClock, add_node, enrol


class Proofs:
    """A node and what its commands ended with."""

    def __init__(self, store: ControlStore) -> None:
        clock = ManualClock()
        self._ledger = Ledger(store, clock)
        self._views = Views(store, Herd(store, clock, heartbeat_interval_s=5))
        self._agent = enrol(store)
        self._node = add_node(store, self._agent)

    def ended(self, verb: Verb, kind: str, body: dict[str, Any]) -> dict[str, Any]:
        command_id = self._ledger.submit(self._node, verb, actor="t", via="t").command_id
        self._ledger.record(self._agent, Event(command_id, 1, 5, kind, body))
        backups = self._views.backups().items
        assert len(backups) == 1
        return backups[0]


@pytest.fixture
def proofs(tmp_path: Path) -> Iterator[Proofs]:
    store = ControlStore.open(tmp_path / "control.db")
    made = Proofs(store)
    backup = {
        "name": "b1", "node_id": "", "system_identifier": "7", "started_unix_ns": 1, "finished_unix_ns": 2,
        "stored_bytes": 3, "databases": ["app"], "complete": True, "warnings": [], "grade": "unproven",
    }  # fmt: skip
    assert made.ended(BackupRun(), "succeeded", backup)["grade"] == "unproven"
    yield made
    store.close()


def restored(grade: str) -> dict[str, Any]:
    return {"backup": "b1", "grade": grade, "tables_compared": 1, "rows_compared": 2, "duration_s": 1.5, "directory": ""}


def verified(grade: str) -> dict[str, Any]:
    return {"backup": "b1", "grade": grade, "read_bytes": 3, "duration_s": 0.5}


def test_a_grade_rises_and_an_older_proof_takes_nothing_away(proofs: Proofs) -> None:
    assert proofs.ended(BackupVerify(), "succeeded", verified("read back"))["grade"] == "read back"
    after = proofs.ended(Restore("b1"), "succeeded", restored("content-equal"))
    assert (after["grade"], after["restore_duration_s"]) == ("content-equal", 1.5)
    assert proofs.ended(BackupVerify("b1"), "succeeded", verified("read back"))["grade"] == "content-equal"


def test_damage_takes_the_proof_away(proofs: Proofs) -> None:
    proofs.ended(Restore("b1"), "succeeded", restored("content-equal"))
    damage = IntegrityError("backup.corrupt", "part 3 differs").as_dict()
    after = proofs.ended(BackupVerify("b1"), "failed", damage)
    assert after["grade"] == "unproven"
    assert after["warnings"] == ["backup.corrupt: part 3 differs"]


def test_a_failure_that_says_nothing_about_the_backup_changes_nothing(proofs: Proofs) -> None:
    proofs.ended(BackupVerify(), "succeeded", verified("read back"))
    after = proofs.ended(Restore("b1"), "failed", TransientError("command.interrupted", "stopped").as_dict())
    assert (after["grade"], after["warnings"]) == ("read back", [])

"""When scheduled backups are due, and what a crash makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgherd.agent.schedule import LastRun, _read, due_unix_ns
from pgherd.proto.errors import IntegrityError
from pgherd.runtime.durable import publish_json

HOUR_S = 3600.0
NOW = 1_800_000_000_000_000_000
MOMENTS = st.integers(min_value=0, max_value=2 * NOW)


def test_a_node_without_a_backup_is_due_at_once() -> None:
    assert due_unix_ns(None, HOUR_S, NOW) == NOW


def test_after_a_success_the_interval_passes() -> None:
    assert due_unix_ns(LastRun(NOW, succeeded=True), HOUR_S, NOW) == NOW + int(HOUR_S * 1e9)


def test_after_a_failure_the_next_try_comes_sooner_but_not_at_once() -> None:
    assert due_unix_ns(LastRun(NOW, succeeded=False), HOUR_S, NOW) == NOW + int(600e9)
    assert due_unix_ns(LastRun(NOW, succeeded=False), 120.0, NOW) == NOW + int(60e9)
    assert due_unix_ns(LastRun(NOW, succeeded=False), 10.0, NOW) == NOW + int(10e9)


def test_missed_runs_are_made_up_for_by_one() -> None:
    """Due long ago is due now; the run that follows starts a fresh interval."""
    assert due_unix_ns(LastRun(NOW - int(100 * HOUR_S * 1e9), succeeded=True), HOUR_S, NOW) < NOW


@given(MOMENTS, MOMENTS, st.booleans(), st.floats(min_value=1, max_value=1e6))
def test_a_clock_that_was_set_back_never_silences_the_schedule(
    started: int, now: int, succeeded: bool, interval_s: float
) -> None:
    due = due_unix_ns(LastRun(started, succeeded=succeeded), interval_s, now)
    assert due <= now + int(interval_s * 1e9)


def test_what_is_on_disk_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    assert _read(path) == {}
    publish_json(path, {"format": "pgherd.schedule", "version": 1, "runs": {"n": {"started_unix_ns": 5, "succeeded": True}}})
    assert _read(path) == {"n": LastRun(5, succeeded=True)}


@pytest.mark.parametrize("content", ["", "{}", '{"format": "pgherd.schedule", "version": 1, "runs": {"n": 7}}'])
def test_a_damaged_file_makes_backups_sooner_not_never(tmp_path: Path, content: str) -> None:
    path = tmp_path / "schedule.json"
    path.write_text(content)
    assert _read(path) == {}


def test_a_newer_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    publish_json(path, {"format": "pgherd.schedule", "version": 2, "runs": {}})
    with pytest.raises(IntegrityError) as caught:
        _read(path)
    assert caught.value.code == "format.newer"

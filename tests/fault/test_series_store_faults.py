"""The series store against kill -9, a full disk and damaged files: acknowledged is kept, once; nothing is lost in silence."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pgherd.storage.series.store import SeriesStore
from support.series import BASE_MS, batch, layout, name_is, open_store, quiet, read_all

pytestmark = pytest.mark.fault

PROGRAM = Path(__file__).with_name("series_appender.py")
SERIES = 20


def start(directory: Path, first: int, mode: str, die_after: int = 0) -> subprocess.Popen[str]:
    argv = [sys.executable, str(PROGRAM), str(directory), str(first), mode, str(die_after)]
    with (directory / "child.log").open("ab") as log:
        return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, text=True)


def facts(lines: list[str]) -> list[dict[str, Any]]:
    """What the program said; a line torn by the kill isn't whole."""
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}\n")]


def stored_sequences(store: SeriesStore) -> dict[str, list[int]]:
    """Raw rows, before reading removes duplicates."""
    with store._database.read() as cursor:  # the test looks below the reader on purpose
        rows = cursor.execute("SELECT series_id, ts_ms, value FROM samples ORDER BY 1, 2").fetchnumpy()
    assert np.array_equal(rows["ts_ms"], rows["value"].astype(np.int64))
    return {str(i): rows["ts_ms"][rows["series_id"] == i].tolist() for i in range(SERIES)}


def test_kill_9_at_any_moment_keeps_what_was_acknowledged_once(tmp_path: Path) -> None:
    seed = int(os.environ.get("PGHERD_TEST_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"PGHERD_TEST_SEED={seed}")
    dice = random.Random(seed)
    acked: set[int] = set()
    high_water = 0
    for number in range(int(os.environ.get("PGHERD_TEST_ROUNDS", "6"))):
        # Start again a little below: what was sent but not acknowledged is sent again.
        # Every other time it dies in the call that acknowledges, else whenever the kill comes.
        die_after = dice.randrange(1, 200) if number % 2 else 0
        child = start(tmp_path, max(1, high_water - dice.randrange(60)), "run", die_after)
        assert child.stdout is not None
        lines: list[str] = []
        budget = dice.randrange(10, 400)
        while (die_after or len(lines) < budget) and (line := child.stdout.readline()):
            lines.append(line)
        child.kill()
        lines += child.stdout.readlines()
        child.stdout.close()
        assert child.wait(10) == -9, lines[-5:]
        round_acked = {fact["acked"] for fact in facts(lines) if "acked" in fact}
        assert round_acked, lines[-5:]
        acked |= round_acked
        store = open_store(tmp_path, quiet())
        high_water = store.shipments()[0].last_sequence
        rows = stored_sequences(store)
        state = store.shipments()[0]
        assert list(tmp_path.glob("*.damaged-*")) == [], f"seed {seed}"
        store.close(checkpoint=False)  # the log must be replayed again by the next round
        assert all(sequences == list(range(1, high_water + 1)) for sequences in rows.values()), f"seed {seed}"
        assert acked <= set(range(1, high_water + 1)), f"seed {seed}"
        assert (state.gaps, state.stored_points) == (0, high_water * SERIES)


@pytest.mark.parametrize("end", ["full", "full-die"])
def test_full_disk_acknowledges_nothing_and_recovers_alone(tmp_path: Path, end: str) -> None:
    child = start(tmp_path, 1, end)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == (0 if end == "full" else -9), (tmp_path / "child.log").read_text()
    told = {key: value for fact in facts(output.splitlines(keepends=True)) for key, value in fact.items()}
    assert told["refused"] == ["store.unavailable"] * 5
    assert told["series_read_while_full"] == SERIES
    assert told["writable"] is True
    if end == "full-die":
        assert told["checkpoints_failed"] > 0
        assert told["reopened"] > 0
    store = open_store(tmp_path)
    assert told["acked"] == list(range(1, len(told["acked"]) + 1))
    assert all(sequences == told["acked"] for sequences in stored_sequences(store).values())
    assert store.gauges().set_aside == 0
    store.close()


def crashed_store(directory: Path) -> tuple[Path, Path]:
    """A store whose last twenty commits are only in the log; checkpointed content: the metric `kept`."""
    store = open_store(directory, quiet())
    store.append(batch(layout(2, "kept"), BASE_MS, [1.0, 2.0], 1)).result(10)
    store.close()
    store = open_store(directory, quiet())
    for sequence in range(2, 22):
        store.append(batch(layout(2), BASE_MS + sequence, [1.0, 2.0], sequence)).result(10)
    path = directory / "series.duckdb"
    wal = path.with_name("series.duckdb.wal")
    file_bytes, wal_bytes = path.read_bytes(), wal.read_bytes()
    store.close()
    path.write_bytes(file_bytes)
    wal.write_bytes(wal_bytes)
    return path, wal


def flip(path: Path, at: int) -> bytes:
    damaged = bytearray(path.read_bytes())
    damaged[at] ^= 0x55
    path.write_bytes(damaged)
    return bytes(damaged)


@pytest.mark.parametrize("place", ["header", "salt", "first", "middle", "zeros after"])
def test_damaged_log_is_set_aside_loudly_and_the_store_opens(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, wal = crashed_store(tmp_path)
    size = wal.stat().st_size
    if place == "zeros after":
        wal.write_bytes(wal.read_bytes() + bytes(4096))
        damaged = wal.read_bytes()
    else:
        damaged = flip(wal, {"header": 0, "salt": 33, "first": 60, "middle": size - 40}[place])
    store = open_store(tmp_path, quiet())
    (aside,) = tmp_path.glob("series.duckdb.wal.damaged-*")
    assert aside.read_bytes() == damaged
    assert store.gauges().set_aside == 1
    assert "series.log_set_aside" in "".join(capsys.readouterr())
    assert list(read_all(store, "kept")) == [(("__name__", "kept"), ("i", "0")), (("__name__", "kept"), ("i", "1"))]
    assert read_all(store) == {}
    assert store.shipments()[0].last_sequence == 1  # samples and high-water mark went back together
    assert store.append(batch(layout(2), BASE_MS + 50, [1.0, 2.0], 22)).result(10).gap == 20
    store.close(checkpoint=False)  # the new log must be replayed
    store = open_store(tmp_path, quiet())
    assert len(store.select([name_is("m")], 0, 1 << 60)) == 2
    assert store.gauges().set_aside == 1  # until somebody looks
    store.close()


def test_torn_log_tail_loses_only_what_was_not_acknowledged(tmp_path: Path) -> None:
    _, wal = crashed_store(tmp_path)
    torn = wal.read_bytes()[:-10]
    wal.write_bytes(torn)
    store = open_store(tmp_path, quiet())
    assert store.shipments()[0].last_sequence == 20
    (aside,) = tmp_path.glob("series.duckdb.wal.torn-*")
    assert aside.read_bytes() == torn
    store.close()


def test_no_damaged_byte_of_the_log_loses_anything_in_silence(tmp_path: Path) -> None:
    """DuckDB alone drops the rest of the log without a word when an entry's length is hit: one byte in fifteen."""
    path, wal = crashed_store(tmp_path)
    file_bytes, wal_bytes = path.read_bytes(), wal.read_bytes()
    kinds = set()
    for at in [*random.Random(1).sample(range(len(wal_bytes)), 20), 2187, 4854]:
        for leftover in tmp_path.glob("series.duckdb*"):
            leftover.unlink()
        path.write_bytes(file_bytes)
        wal.write_bytes(wal_bytes)
        damaged = flip(wal, at)
        store = open_store(tmp_path, quiet())
        assert store.shipments()[0].last_sequence < 21
        (aside,) = store._database.set_aside()
        assert aside.read_bytes() == damaged, f"byte {at}"
        kinds.add("torn" if ".torn-" in aside.name else "damaged")
        store.close(checkpoint=False)
    assert kinds == {"torn", "damaged"}

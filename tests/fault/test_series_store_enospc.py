"""A truly full file system under the series store; needs the right to mount a tmpfs (root), skipped elsewhere."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgherd.proto.errors import TransientError
from support.disk import fill
from support.series import BASE_MS, batch, layout, name_is, open_store, quiet
from support.waiting import wait_until

pytestmark = pytest.mark.fault


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """16 MiB."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(tmp_path)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"can't mount a tmpfs: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_store_on_a_full_disk_serves_reads_refuses_writes_and_recovers_alone(small_disk: Path) -> None:
    store = open_store(small_disk, quiet(checkpoint_interval_s=0.1))
    made = layout(100)
    for sequence in range(1, 21):
        store.append(batch(made, BASE_MS + sequence, [1.0] * 100, sequence)).result(20)
    ballast = small_disk / "ballast"
    fill(ballast)
    sequence, refused = 21, 0
    while refused < 3:
        try:
            store.append(batch(made, BASE_MS + sequence, [1.0] * 100, sequence)).result(20)
            sequence += 1
        except TransientError as error:
            assert error.code == "store.unavailable"  # noqa: PT017
            refused += 1
    assert not store.gauges().is_writable
    failed = store.counters.checkpoints_failed
    wait_until(lambda: store.counters.checkpoints_failed > failed, 10, "a checkpoint to be skipped or to fail")
    assert len(wait_until(lambda: store.select([name_is("m")], 0, 1 << 60), 10, "reads on the full disk")) == 100
    ballast.unlink()
    done = store.counters.checkpoints
    for again in range(sequence, sequence + 5):  # the refused sequence again, as its sender would
        assert store.append(batch(made, BASE_MS + again, [1.0] * 100, again)).result(20).stored_points == 100
    assert store.gauges().is_writable
    wait_until(lambda: store.counters.checkpoints > done, 10, "checkpoints to go on")
    store.close()
    store = open_store(small_disk)
    (state,) = store.shipments()
    assert (state.last_sequence, state.gaps, state.stored_points) == (sequence + 4, 0, (sequence + 4) * 100)
    assert {len(window.times_ms) for window in store.select([name_is("m")], 0, 1 << 60)} == {sequence + 4}
    store.close()

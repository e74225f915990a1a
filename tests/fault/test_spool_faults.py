"""The spool on a full disk, under kill -9, with damaged segments."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.spooling import drain, is_balanced, open_spool

pytestmark = pytest.mark.fault

_APPENDER = """
import sys
from pathlib import Path
from pgherd.agent.config import SpoolConfig
from pgherd.runtime.queue.spool import Spool
from pgherd.runtime.clock import SystemClock
spool = Spool.open(Path(sys.argv[1]), SpoolConfig(size_max=1 << 22, segment_max=2000), SystemClock())
number = int(sys.argv[2])
while True:
    number += 1
    payload = number.to_bytes(8, "big") * (1 + number % 50)
    assert spool.append(payload, 1 + number % 7)
    print(number, flush=True)
    if number % 3 == 0:
        batch = spool.head()
        spool.release(batch, "acked")
"""


def test_kill_9_while_appending_keeps_every_reported_batch(tmp_path: Path) -> None:
    directory = tmp_path / "spool"
    reported, incarnations = 0, set()
    for kill_at in (3, 17, 40, 90):
        child = subprocess.Popen(
            [sys.executable, "-c", _APPENDER, str(directory), str(reported)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        for line in child.stdout:
            reported = int(line)
            if reported >= kill_at:
                child.send_signal(signal.SIGKILL)
                break
        rest = child.stdout.read().split()
        reported = int(rest[-1]) if rest else reported
        child.wait()
        child.stdout.close()
        spool = open_spool(directory)
        incarnations.add(spool.incarnation)
        counts = spool.status.counts
        least = sum(1 + n % 7 for n in range(1, reported + 1))
        assert counts.sampled_points - least in (0, 1 + (reported + 1) % 7), "at most the batch of the killed instant more"
        if counts.sampled_points > least:
            reported += 1
        assert counts.lost_points == counts.evicted_points == counts.refused_points == counts.corrupt_segments == 0
        assert is_balanced(spool)
        spool.close()
    spool = open_spool(directory)
    taken = drain(spool)
    assert [batch.sequence for batch in taken] == list(range(taken[0].sequence, reported + 1))
    for batch in taken:
        assert batch.payload == batch.sequence.to_bytes(8, "big") * (1 + batch.sequence % 50)
    assert spool.status.counts.acked_points == spool.status.counts.sampled_points
    assert len(incarnations) == 1
    spool.close()


_ON_A_FULL_DISK = """
import os, resource, sys
from pathlib import Path
from pgherd.runtime.logging import configure
from support.spooling import drain, is_balanced, open_spool
configure(level="debug")  # to stderr, a file on the same full disk
directory = Path(sys.argv[1])
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
def room(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
def on_disk(path):
    return sum(file.stat().st_size for file in path.glob("*.segment"))
spool = open_spool(directory / "several", segment_max=1300)
for _ in range(3):
    assert spool.append(os.urandom(500), 1)
assert len(list((directory / "several").glob("*.segment"))) == 2
room(max(directory.glob("several/*.segment")).stat().st_size + 200)
assert spool.append(os.urandom(500), 1)
assert spool.status.counts.evicted_points == 2
assert on_disk(directory / "several") == spool.status.size_bytes, "half a record stays nowhere"
assert [batch.sequence for batch in drain(spool)] == [3, 4]
room(hard)
spool.close()
spool = open_spool(directory, segment_max=1 << 20)
for _ in range(5):
    assert spool.append(os.urandom(500), 2)
room(spool.status.size_bytes + 200)
assert spool.append(os.urandom(500), 3), "the oldest segment makes room"
assert spool.status.counts.evicted_points == 10
room(300)
assert not spool.append(os.urandom(500), 4)
assert not spool.append(os.urandom(500), 4)
assert is_balanced(spool)
room(hard)
assert spool.status.counts.refused_points == 8
assert spool.append(b"room again", 1)
taken = drain(spool)
assert taken[-1].payload == b"room again"
assert spool.status.counts.pending_points == 0
spool.close()
spool = open_spool(directory)
assert spool.status.counts.refused_points == 8
assert spool.status.counts.corrupt_segments == 0, "a refused write left no torn record behind"
assert is_balanced(spool)
"""


def test_full_disk_sheds_its_own_oldest_then_the_new_and_never_raises(tmp_path: Path) -> None:
    """RLIMIT_FSIZE refuses growth of any file like a full disk does (EFBIG for ENOSPC), without root; the log too."""
    log = tmp_path / "log"
    log.write_bytes(bytes(4096))
    tests = str(Path(__file__).parents[1])
    with log.open("ab") as stderr:
        argv = [sys.executable, "-c", _ON_A_FULL_DISK, str(tmp_path / "spool")]
        done = subprocess.run(
            argv,
            stderr=stderr,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])},
            timeout=60,
        )
    assert done.returncode == 0, log.read_bytes()[4096:].decode()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_really_full_file_system(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(mount)], capture_output=True)
    if done.returncode != 0:
        pytest.skip("this container may not mount")
    try:
        spool = open_spool(mount / "spool", size_max=1 << 30, segment_max=20_000)
        for _ in range(100):
            spool.append(os.urandom(9000), 1)
        counts = spool.status.counts
        assert counts.evicted_points > 0
        assert is_balanced(spool)
        spool.close()
        spool = open_spool(mount / "spool", size_max=1 << 30, segment_max=20_000)  # opens on the full disk
        assert spool.status.counts == counts
        last = drain(spool)[-1]
        assert last.sequence == counts.last_sequence
        assert spool.status.counts.corrupt_segments == 0
        spool.close()
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_corrupt_segment_is_set_aside_counted_and_its_prefix_shipped(tmp_path: Path) -> None:
    directory = tmp_path / "spool"
    spool = open_spool(directory, segment_max=2000)
    for _ in range(9):
        spool.append(os.urandom(500), 10)
    spool.close()
    victim = sorted(directory.glob("*.segment"))[1]
    content = bytearray(victim.read_bytes())
    content[-100] ^= 0xFF  # in the last of its three records
    victim.write_bytes(content)
    spool = open_spool(directory, segment_max=2000)
    assert spool.status.counts.corrupt_segments == 1
    assert spool.status.counts.lost_points == 10
    assert (directory / "set-aside" / f"{victim.name}.corrupt").read_bytes() == bytes(content)
    spool.close()
    spool = open_spool(directory, segment_max=2000)
    assert spool.status.counts.corrupt_segments == 1, "the damage is counted once, not at every start"
    assert [batch.sequence for batch in drain(spool)] == [1, 2, 3, 4, 5, 7, 8, 9]
    assert is_balanced(spool)
    spool.close()


def test_damage_found_while_running_is_counted(tmp_path: Path) -> None:
    directory = tmp_path / "spool"
    spool = open_spool(directory, segment_max=2000)
    for _ in range(9):
        spool.append(os.urandom(500), 10)
    victim = sorted(directory.glob("*.segment"))[1]
    victim.write_bytes(victim.read_bytes()[:700])
    assert [batch.sequence for batch in drain(spool)] == [1, 2, 3, 4, 7, 8, 9]
    assert spool.status.counts.lost_points == 20
    assert spool.status.counts.corrupt_segments == 1
    assert is_balanced(spool)
    spool.close()

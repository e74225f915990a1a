"""Durable files under a full disk, kill -9 and strangers' formats."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pgherd.proto.errors import ConfigError, IntegrityError, PreconditionError, TransientError
from pgherd.runtime.durable import (
    exclusive_lock,
    is_locked,
    private_directory,
    publish,
    publish_json,
    read_json,
    read_secret,
    sweep_temporaries,
)

pytestmark = pytest.mark.fault


def test_publish_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "x"
    publish(path, b"one")
    publish(path, b"two")
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_create_only_never_replaces(tmp_path: Path) -> None:
    path = tmp_path / "x"
    publish(path, b"one", replace=False)
    with pytest.raises(FileExistsError):
        publish(path, b"two", replace=False)
    assert path.read_bytes() == b"one"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the kernel refuse bytes past the limit, as a full disk does."""
    path = tmp_path / "x"
    publish(path, b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(TransientError) as caught:
            publish(path, b"n" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.code == "disk.full"
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


KILLED_WRITER = """
import sys
from pathlib import Path
from pgherd.runtime.durable import publish
path = Path(sys.argv[1])
print("ready", flush=True)
for round in range(1_000_000):
    publish(path, (b"%d " % round) * 20_000)
"""


def test_kill_9_leaves_one_whole_version(tmp_path: Path) -> None:
    """Ten kills at arbitrary moments: the visible file is always one round's whole content."""
    path = tmp_path / "x"
    publish(path, b"0 " * 20_000)
    for delay_ms in range(5, 55, 5):
        with subprocess.Popen([sys.executable, "-c", KILLED_WRITER, str(path)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            try:
                writer.wait(delay_ms / 1000)
            except subprocess.TimeoutExpired:
                writer.kill()
        words = path.read_bytes().split()
        assert len(words) == 20_000
        assert len(set(words)) == 1
    sweep_temporaries(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_a_newer_format_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    publish_json(path, {"format": "pgherd.thing", "version": 2})
    assert read_json(path, format_name="pgherd.thing", newest_version=2)["version"] == 2
    with pytest.raises(IntegrityError) as caught:
        read_json(path, format_name="pgherd.thing", newest_version=1)
    assert caught.value.code == "format.newer"
    assert str(path) in caught.value.message


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "other", "version": 1}', '{"format": "pgherd.thing"}'])
def test_foreign_or_torn_documents_are_corrupt(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(IntegrityError) as caught:
        read_json(path, format_name="pgherd.thing", newest_version=1)
    assert caught.value.code == "format.corrupt"


LOCK_HOLDER = """
import sys
from pathlib import Path
from pgherd.runtime.durable import exclusive_lock
with exclusive_lock(Path(sys.argv[1]), "the test lock"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_locked(path)
    with subprocess.Popen(
        [sys.executable, "-c", LOCK_HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert is_locked(path)
        with pytest.raises(PreconditionError, match="the test lock") as caught, exclusive_lock(path, "the test lock"):
            pass
        assert caught.value.code == "state.locked"
        holder.kill()
        holder.wait()
        assert not is_locked(path)
        with exclusive_lock(path, "the test lock"):
            assert is_locked(path)


def test_a_lock_whose_file_is_removed_by_its_holder_keeps_everybody_else_out(tmp_path: Path) -> None:
    """Who opened the file just before its holder removed it gets the lock of a file that nobody else will find."""
    path = tmp_path / "lock"
    inside: list[int] = []
    together: list[int] = []
    held = 0

    def work(number: int) -> None:
        nonlocal held
        for _ in range(400):
            with contextlib.suppress(PreconditionError), exclusive_lock(path, "x"):
                inside.append(number)
                held += 1
                if len(inside) > 1:
                    together.append(number)
                os.sched_yield()
                inside.remove(number)
                path.unlink(missing_ok=True)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert held >= 6
    assert together == []


def test_secrets_that_others_may_read_are_refused(tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("hunter2\nsecond line")
    secret.chmod(0o644)
    with pytest.raises(ConfigError, match="readable by others"):
        read_secret(secret)
    secret.chmod(0o600)
    assert read_secret(secret) == "hunter2"
    secret.write_text("")
    with pytest.raises(ConfigError, match="empty"):
        read_secret(secret)
    with pytest.raises(ConfigError):
        read_secret(tmp_path / "absent")


def test_a_directory_that_others_may_write_is_refused(tmp_path: Path) -> None:
    made = private_directory(tmp_path / "a" / "b")
    assert made.stat().st_mode & 0o777 == 0o700
    made.chmod(0o777)
    with pytest.raises(ConfigError, match="writable by others"):
        private_directory(made)


def test_published_json_can_be_read_by_people(tmp_path: Path) -> None:
    publish_json(tmp_path / "x.json", {"b": 1, "a": [2]})
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == {"a": [2], "b": 1}
    assert text.index('"a"') < text.index('"b"')

"""The contract of object stores (storage/objects/port.py), run against every adapter."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from pgherd.proto.errors import InvariantError, PgherdError, PreconditionError
from pgherd.storage.objects.directory import DirectoryStore
from pgherd.storage.objects.port import CHUNK_BYTES, ObjectInfo, ObjectStore, check_key, create_bytes, read_all


@pytest.fixture(params=["directory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    return DirectoryStore(tmp_path / "repo")


def test_an_object_is_never_overwritten(store: ObjectStore) -> None:
    create_bytes(store, "a/b", b"first")
    with pytest.raises(PreconditionError) as caught:
        create_bytes(store, "a/b", b"second")
    assert caught.value.code == "object.exists"
    assert read_all(store, "a/b") == b"first"


def test_the_slower_of_two_writers_fails_at_the_end(store: ObjectStore) -> None:
    def race() -> None:
        with store.create("a/raced") as slow:
            slow.write(b"slow")
            create_bytes(store, "a/raced", b"fast")

    with pytest.raises(PreconditionError) as caught:
        race()
    assert caught.value.code == "object.exists"
    assert read_all(store, "a/raced") == b"fast"


def test_an_object_is_invisible_until_it_is_whole(store: ObjectStore) -> None:
    def fail() -> None:
        with store.create("a/b") as writer:
            writer.write(b"half")
            assert list(store.list()) == []
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert list(store.list()) == []
    with pytest.raises(PreconditionError) as caught:
        read_all(store, "a/b")
    assert caught.value.code == "object.not_found"


def test_streams_and_ranges(store: ObjectStore) -> None:
    content = os.urandom(2 * CHUNK_BYTES + 5)
    with store.create("big") as writer:
        writer.write(content[:7])
        writer.write(content[7:])
    assert b"".join(store.read("big")) == content
    assert b"".join(store.read("big", CHUNK_BYTES - 1, 10)) == content[CHUNK_BYTES - 1 : CHUNK_BYTES + 9]
    assert b"".join(store.read("big", len(content) - 3, 10)) == content[-3:]
    assert b"".join(store.read("big", 0, 0)) == b""


def test_listing_and_deleting(store: ObjectStore) -> None:
    for key in ("a/2", "a/1/x", "ab/1", "b"):
        create_bytes(store, key, key.encode())
    assert [info.key for info in store.list()] == ["a/1/x", "a/2", "ab/1", "b"]
    assert list(store.list("a")) == [ObjectInfo("a/1/x", 5), ObjectInfo("a/2", 3)]
    assert list(store.list("nothing")) == []
    store.delete("a/1/x")
    store.delete("a/1/x")
    assert [info.key for info in store.list("a")] == ["a/2"]


@pytest.mark.parametrize("key", ["", "../x", "a/../b", "/a", "a//b", ".hidden", "a/.lock", "a b", "a\nb", "a/"])
def test_keys_can_go_nowhere_else(key: str) -> None:
    with pytest.raises(InvariantError):
        check_key(key)


def test_files_are_private(tmp_path: Path) -> None:
    create_bytes(DirectoryStore(tmp_path / "repo"), "a/b", b"x")
    assert stat.S_IMODE((tmp_path / "repo" / "a" / "b").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "repo" / "a").stat().st_mode) == 0o700
    assert list((tmp_path / "repo" / "a").iterdir()) == [tmp_path / "repo" / "a" / "b"]


@pytest.mark.fault
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    """A process with a file size limit stands in for a full disk: the write fails in the middle."""
    import resource
    import signal

    store = DirectoryStore(tmp_path / "repo")
    create_bytes(store, "a/small", b"x")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(PgherdError) as caught:
            create_bytes(store, "a/large", b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.code == "disk.full"
    assert [path.name for path in (tmp_path / "repo" / "a").iterdir()] == ["small"]

"""The port of a backup repository: a flat set of immutable objects under slash-separated keys.

What every adapter promises (tests/contract/test_objects.py runs against each):
 - Create-only: an object is never overwritten; a second `create` of a key fails with object.exists.
 - All or nothing: an object is visible only once it is whole and durable; a writer that fails or whose
   process dies leaves nothing visible.
 - Streams: writing and reading need memory for one chunk only.
 - Listing is complete and sorted by key; deleting is idempotent.
There is no rename, no append and no modification time, because object stores have none to rely on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from pgherd.proto.errors import InvariantError

CHUNK_BYTES = 1 << 20
_KEY_RE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=@+-]*(/[A-Za-z0-9_][A-Za-z0-9_.=@+-]*)*")


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object: its key and how many bytes it holds."""

    key: str
    size_bytes: int


class ObjectWriter(Protocol):
    """The open end of an object that isn't visible yet."""

    def write(self, data: bytes) -> None:
        """Append. Raises TransientError disk.full | disk.io | peer.unreachable."""
        ...


class ObjectStore(Protocol):
    """A repository of objects. Errors besides those named: TransientError disk.* or peer.unreachable."""

    def create(self, key: str) -> AbstractContextManager[ObjectWriter]:
        """Write a new object; it appears, durable, when the block ends without an exception.

        Raises PreconditionError object.exists when the key is taken (at the start or at the end).
        """
        ...

    def read(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        """The object's bytes from `start`, in chunks. Raises PreconditionError object.not_found at the first chunk."""
        ...

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Objects whose key starts with `prefix` (whole path components), sorted by key."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens when there is none."""
        ...


def check_key(key: str) -> str:
    """Return `key` when every component is harmless: no leading dot, no `..`, no empty one."""
    if _KEY_RE.fullmatch(key) is None:
        raise InvariantError("invariant.broken", f"not an object key: {key[:100]!r}")
    return key


def read_all(store: ObjectStore, key: str, size_bytes_max: int = 64 << 20) -> bytes:
    """A small object as a whole. Raises InvariantError when it is larger than `size_bytes_max`."""
    content = bytearray()
    for chunk in store.read(key):
        content += chunk
        if len(content) > size_bytes_max:
            raise InvariantError("invariant.broken", f"{key} is larger than {size_bytes_max} bytes")
    return bytes(content)


def create_bytes(store: ObjectStore, key: str, content: bytes) -> None:
    """A small object from memory. Raises PreconditionError object.exists."""
    with store.create(key) as writer:
        writer.write(content)

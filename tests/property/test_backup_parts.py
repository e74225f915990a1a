"""Parts: what goes in comes out, and nothing else ever does; digests of bags."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgherd.agent.backup.parts import PartWriter, plain_chunks
from pgherd.postgres.fingerprint import EMPTY, Digest
from pgherd.proto.errors import IntegrityError, PreconditionError
from pgherd.storage.manifest import Part
from pgherd.storage.objects.port import ObjectInfo

COMPRESSIONS = st.sampled_from(["zstd", "gzip", "none"])


class _Writer:
    def __init__(self) -> None:
        self.content = bytearray()

    def write(self, data: bytes) -> None:
        self.content += data


class MemoryStore:
    """An object store of one process, in chunks of an odd size."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    @contextmanager
    def create(self, key: str) -> Iterator[_Writer]:
        writer = _Writer()
        yield writer
        self.objects[key] = bytes(writer.content)

    def read(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        if key not in self.objects:
            raise PreconditionError("object.not_found", key)
        content = self.objects[key]
        for position in range(0, len(content), 17):
            yield content[position : position + 17]

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return iter(())

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)


def _stored(pieces: list[bytes], compression: str) -> tuple[MemoryStore, Part]:
    store = MemoryStore()
    with store.create("b/p") as writer:
        sink = PartWriter(writer, compression, 3)
        for piece in pieces:
            sink.write(piece)
        part = sink.finish("p", "database")
    return store, part


@given(st.lists(st.binary(max_size=200), max_size=20), COMPRESSIONS)
def test_what_goes_in_comes_out(pieces: list[bytes], compression: str) -> None:
    store, part = _stored(pieces, compression)
    assert b"".join(plain_chunks(store, "b/", part)) == b"".join(pieces)
    assert part.stored_bytes == len(store.objects["b/p"])


@given(st.binary(min_size=1, max_size=300), COMPRESSIONS, st.data())
def test_no_damage_passes(content: bytes, compression: str, data: st.DataObject) -> None:
    store, part = _stored([content], compression)
    stored = bytearray(store.objects["b/p"])
    kind = data.draw(st.sampled_from(["flip", "cut", "append", "lose"]))
    position = data.draw(st.integers(0, len(stored) - 1))
    match kind:
        case "flip":
            stored[position] ^= 1 << data.draw(st.integers(0, 7))
        case "cut":
            del stored[position:]
        case "append":
            stored += b"x"
    store.objects["b/p"] = bytes(stored)
    if kind == "lose":
        store.delete("b/p")
    with pytest.raises(IntegrityError) as caught:
        list(plain_chunks(store, "b/", part))
    assert caught.value.code == "backup.corrupt"


_DIGESTS = st.builds(Digest, st.integers(0, 1 << 40), st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1))


@given(st.lists(_DIGESTS, max_size=8), st.randoms())
def test_digests_add_up_in_any_order(digests: list[Digest], random: object) -> None:
    shuffled = list(digests)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    total, other = EMPTY, EMPTY
    for one, two in zip(digests, shuffled, strict=True):
        total, other = total + one, other + two
    assert total == other
    assert Digest.from_json(total.to_json()) == total
    assert all((a + b) == (b + a) for a, b in pairwise(digests))

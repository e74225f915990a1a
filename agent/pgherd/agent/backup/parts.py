"""Streams in and out of a backup's parts: compression and both SHA-256s on the way, bounded memory."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Protocol, cast

import zstandard

from pgherd.proto.errors import IntegrityError, PreconditionError
from pgherd.storage.manifest import Part
from pgherd.storage.objects.port import CHUNK_BYTES, ObjectStore, ObjectWriter

SUFFIXES = {"zstd": ".zst", "gzip": ".gz", "none": ""}
_GZIP_WBITS = 31  # zlib's way to ask for a gzip container


class _Compressor(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self) -> bytes: ...


class _Uncompressed:
    def compress(self, data: bytes, /) -> bytes:
        return data

    def flush(self) -> bytes:
        return b""


def _compressor(compression: str, level: int) -> _Compressor:
    match compression:
        case "zstd":
            return cast(_Compressor, zstandard.ZstdCompressor(level=level, write_checksum=True).compressobj())
        case "gzip":
            return cast(_Compressor, zlib.compressobj(min(max(level, 1), 9), zlib.DEFLATED, _GZIP_WBITS))
        case _:
            return _Uncompressed()


class PartWriter:
    """Takes plain bytes, stores compressed ones, and knows both checksums at the end."""

    def __init__(self, writer: ObjectWriter, compression: str, level: int) -> None:
        self._writer = writer
        self._compression = compression
        self._compressor = _compressor(compression, level)
        self._plain_sha256, self._stored_sha256 = hashlib.sha256(), hashlib.sha256()
        self.plain_bytes = self.stored_bytes = 0

    def write(self, data: bytes) -> None:
        """Append plain bytes. Raises TransientError disk.full | disk.io."""
        self._plain_sha256.update(data)
        self.plain_bytes += len(data)
        self._store(self._compressor.compress(data))

    def _store(self, data: bytes) -> None:
        if data:
            self._stored_sha256.update(data)
            self.stored_bytes += len(data)
            self._writer.write(data)

    def finish(self, name: str, role: str) -> Part:
        """Flush and describe the part. Call once, before the object is published."""
        self._store(self._compressor.flush())
        return Part(
            name=name,
            role=role,
            compression=self._compression,
            stored_bytes=self.stored_bytes,
            stored_sha256=self._stored_sha256.hexdigest(),
            plain_bytes=self.plain_bytes,
            plain_sha256=self._plain_sha256.hexdigest(),
        )


class _HashedSource:
    """A file-like view of a stored object that hashes what passes; only `read`."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""
        self.sha256 = hashlib.sha256()
        self.count = 0

    def read(self, size: int = -1) -> bytes:
        if not self._rest:
            self._rest = next(self._chunks, b"")
            self.sha256.update(self._rest)
            self.count += len(self._rest)
        if size < 0:
            size = len(self._rest)
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken

    def drain(self) -> None:
        while self.read():
            pass


def _decompressed(compression: str, source: _HashedSource) -> Iterator[bytes]:
    stream: IO[bytes]
    match compression:
        case "zstd":
            stream = cast(IO[bytes], zstandard.ZstdDecompressor().stream_reader(source, read_size=CHUNK_BYTES))  # type: ignore[arg-type]
        case "gzip":
            stream = cast(IO[bytes], gzip.GzipFile(fileobj=source, mode="rb"))  # type: ignore[call-overload]
        case _:
            stream = cast(IO[bytes], source)
    while chunk := stream.read(CHUNK_BYTES):
        yield chunk


def plain_chunks(
    store: ObjectStore, prefix: str, part: Part, on_stored_bytes: Callable[[int], None] = lambda count: None
) -> Iterator[bytes]:
    """A part's plain bytes, checked: whoever reads to the end has read what was written, or got an error.

    Raises IntegrityError backup.corrupt when the part is missing, longer, shorter or changed; at the
    latest after the last chunk, so act on the bytes only where that can be undone.
    """
    source = _HashedSource(store.read(prefix + part.name))
    plain_sha256, plain_bytes = hashlib.sha256(), 0
    try:
        for chunk in _decompressed(part.compression, source):
            plain_sha256.update(chunk)
            plain_bytes += len(chunk)
            on_stored_bytes(source.count)
            yield chunk
        source.drain()
    except (zstandard.ZstdError, zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise _corrupt(part, f"can't be decompressed: {error}") from error
    except PreconditionError as error:
        if error.code != "object.not_found":
            raise
        raise _corrupt(part, "is missing") from error
    on_stored_bytes(source.count)
    if source.count != part.stored_bytes or source.sha256.hexdigest() != part.stored_sha256:
        raise _corrupt(part, "doesn't match the SHA-256 of its stored bytes")
    if plain_bytes != part.plain_bytes or plain_sha256.hexdigest() != part.plain_sha256:
        raise _corrupt(part, "doesn't match the SHA-256 of its plain bytes")


def _corrupt(part: Part, how: str) -> IntegrityError:
    return IntegrityError(
        "backup.corrupt",
        f"part {part.name} {how}",
        hint="restore an older backup, take a new one now, check the disk",
        part=part.name,
    )

"""A backup repository in a directory of a local or mounted file system.

A key is a path below the root (directories 0700, files 0600). An object is written beside its final
place, fsynced, linked to its name (which fails if that is taken) and the directory fsynced.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from pgherd.proto.errors import PreconditionError
from pgherd.runtime.durable import fsync_directory, private_directory, storage_error
from pgherd.storage.objects.port import CHUNK_BYTES, ObjectInfo, check_key

_TMP_PREFIX = ".tmp-"  # what runtime.durable.sweep_temporaries removes


class _FileWriter:
    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self._path = path

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            raise storage_error(error, self._path, "writing") from error


class DirectoryStore:
    """ObjectStore on a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    @contextlib.contextmanager
    def create(self, key: str) -> Iterator[_FileWriter]:
        path = self._path(key)
        if path.exists():
            raise _exists(key)
        self._make_directories(path.parent)
        tmp = path.with_name(f"{_TMP_PREFIX}{path.name}-{secrets.token_hex(4)}")
        try:
            fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                yield _FileWriter(fd, path)
                os.fsync(fd)
            finally:
                os.close(fd)
            os.link(tmp, path)
            tmp.unlink()
            fsync_directory(path.parent)
        except FileExistsError as error:
            raise _exists(key) from error
        except OSError as error:
            raise storage_error(error, path, "writing") from error
        finally:
            with contextlib.suppress(OSError):
                tmp.unlink()

    def _make_directories(self, directory: Path) -> None:
        if directory.exists():
            return
        if directory != self.root:
            self._make_directories(directory.parent)
        private_directory(directory)
        with contextlib.suppress(PermissionError):  # a root made for us inside somebody else's directory
            fsync_directory(directory.parent)

    def read(self, key: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        path = self._path(key)
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(start)
                left = length
                while left is None or left > 0:
                    chunk = file.read(CHUNK_BYTES if left is None else min(left, CHUNK_BYTES))
                    if not chunk:
                        return
                    if left is not None:
                        left -= len(chunk)
                    yield chunk
        except FileNotFoundError as error:
            raise PreconditionError("object.not_found", f"{path} doesn't exist", path=str(path)) from error
        except OSError as error:
            raise storage_error(error, path, "reading") from error

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        top = self._path(prefix) if prefix else self.root
        if top.is_file():
            yield ObjectInfo(prefix, top.stat().st_size)
            return
        found = []
        for directory, names, files in os.walk(top, onerror=_raise_unless_missing):
            names[:] = [name for name in names if not name.startswith(".")]
            for name in files:
                path = Path(directory, name)
                if not name.startswith("."):
                    with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                        found.append(ObjectInfo(path.relative_to(self.root).as_posix(), path.stat().st_size))
        yield from sorted(found, key=lambda info: info.key)

    def delete(self, key: str) -> None:
        path = self._path(key)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(error, path, "deleting") from error
        parent = path.parent
        while parent != self.root and parent.is_relative_to(self.root):  # directories aren't objects: none stays empty
            try:
                parent.rmdir()
            except OSError:
                return
            parent = parent.parent


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise storage_error(error, Path(error.filename or "."), "listing") from error


def _exists(key: str) -> PreconditionError:
    return PreconditionError("object.exists", f"{key} exists already and objects are never overwritten", key=key)

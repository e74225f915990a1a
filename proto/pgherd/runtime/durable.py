"""Files that are either wholly there or not there: tmp + fsync + rename + fsync of the directory.

Everything that outlives a process goes through here. A crash at any point leaves the old file or the
new one, plus at most a `.tmp-` sibling that `sweep_temporaries` removes at the next start.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

from pgherd.proto.errors import ConfigError, IntegrityError, PgherdError, PreconditionError, TransientError

_TMP_PREFIX = ".tmp-"


def storage_error(error: OSError, path: Path, action: str) -> PgherdError:
    """Name an OSError: a full disk is not the same page at 3 a.m. as a missing right."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return TransientError(
            "disk.full",
            f"no room left while {action} {path}",
            hint=f"free space on the file system of {path}; pgherd goes on by itself",
            path=str(path),
        )
    return TransientError("disk.io", f"{error.strerror or error} while {action} {path}", path=str(path), errno=error.errno or 0)


def fsync_directory(directory: Path) -> None:
    """Make renames and unlinks inside `directory` survive a power cut."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def publish(path: Path, content: bytes, *, mode: int = 0o600, replace: bool = True) -> None:
    """Write `content` to `path` durably and atomically.

    With `replace=False` the file is created only if absent (FileExistsError otherwise): the create-only
    rule of manifests. Raises TransientError disk.full | disk.io; then nothing is visible at `path`.
    """
    tmp = path.with_name(f"{_TMP_PREFIX}{path.name}-{os.getpid()}")
    try:
        fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode)
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        if replace:
            tmp.rename(path)
        else:
            os.link(tmp, path)
            tmp.unlink()
        fsync_directory(path.parent)
    except FileExistsError:
        with contextlib.suppress(FileNotFoundError):
            tmp.unlink()
        raise
    except OSError as error:
        with contextlib.suppress(OSError):
            tmp.unlink()
        raise storage_error(error, path, "writing") from error


def publish_json(path: Path, document: object, *, mode: int = 0o600, replace: bool = True) -> None:
    """`publish` a JSON document, sorted and indented so that people can read and diff it."""
    publish(path, (json.dumps(document, indent=2, sort_keys=True) + "\n").encode(), mode=mode, replace=replace)


def read_json(path: Path, *, format_name: str, newest_version: int) -> dict[str, object]:
    """Read a JSON object that carries `format` and `version`.

    Raises FileNotFoundError; IntegrityError format.corrupt when it isn't such an object, format.newer
    when its version is above `newest_version`.
    """
    try:
        document = json.loads(path.read_bytes())
    except ValueError as error:
        raise IntegrityError(
            "format.corrupt", f"{path} isn't valid JSON", hint=f"move {path} aside and look at it", path=str(path)
        ) from error
    if not isinstance(document, dict) or document.get("format") != format_name or not isinstance(document.get("version"), int):
        raise IntegrityError("format.corrupt", f"{path} isn't a {format_name} document", path=str(path))
    if document["version"] > newest_version:
        raise newer_format(path, document["version"], newest_version)
    return document


def newer_format(path: Path, version: int, newest_version: int) -> IntegrityError:
    """The one refusal of a file that a newer pgherd wrote."""
    return IntegrityError(
        "format.newer",
        f"{path} has format version {version}; this pgherd reads up to {newest_version}",
        hint="run the pgherd version that wrote it, or a newer one",
        path=str(path),
        version=version,
        newest_version=newest_version,
    )


def sweep_temporaries(directory: Path) -> int:
    """Remove what crashes left behind in `directory`; returns how many files."""
    count = 0
    for leftover in directory.glob(f"{_TMP_PREFIX}*"):
        leftover.unlink(missing_ok=True)
        count += 1
    return count


@contextlib.contextmanager
def exclusive_lock(path: Path, what: str) -> Iterator[int]:
    """Hold an exclusive lock (flock) on `path` while inside; yields the file descriptor.

    The lock ends with the process, however it dies. Raises PreconditionError state.locked at once when
    another process holds it, TransientError disk.io | disk.full when the file can't be made.
    """
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise storage_error(error, path, "locking") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            raise PreconditionError(
                "state.locked",
                f"another process holds {what}",
                hint=f"see who has {path} open (fuser {path}), or wait for it to end",
                path=str(path),
            ) from error
        if _is_at(path, fd):
            break
        os.close(fd)  # its former holder removed the file meanwhile: that lock keeps nobody out
    try:
        yield fd
    finally:
        os.close(fd)


def _is_at(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False


def is_locked(path: Path) -> bool:
    """Whether some live process holds `exclusive_lock(path)`."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def private_directory(path: Path) -> Path:
    """Create `path` (0700) or check that nobody else can write into it.

    Raises ConfigError config.invalid when others may write, TransientError disk.io | disk.full.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = path.stat().st_mode
    except OSError as error:
        raise storage_error(error, path, "creating") from error
    if mode & 0o022:
        raise ConfigError("config.invalid", f"{path} is writable by others", hint=f"chmod go-w {path}", path=str(path))
    return path


def read_secret(path: Path) -> str:
    """The first line of a secret file; refuses one that others may read.

    Raises ConfigError config.secret_unreadable.
    """
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="utf-8").split("\n", 1)[0].rstrip("\r")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "config.secret_unreadable", f"can't read the secret file {path}", hint="check path and owner", path=str(path)
        ) from error
    if mode & 0o077:
        raise ConfigError("config.secret_unreadable", f"{path} is readable by others", hint=f"chmod 600 {path}", path=str(path))
    if not text:
        raise ConfigError(
            "config.secret_unreadable", f"{path} is empty", hint="write the secret into its first line", path=str(path)
        )
    return text

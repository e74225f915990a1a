"""Whether a control store's file is what it should be, before anything is built on it.

SQLite says nothing when a file is empty (it is a new database), when it belongs to another program (tables of ours would be
added to it), when pages are damaged that nobody touches yet, and when a log holds a damaged frame (it drops that and every commit
behind it). Identities, revocations, commands and alert clocks must not be lost like that: what is found here stops the start.

Source: SQLite docs, "Write-Ahead Log File Format" (checksum algorithm), "PRAGMA quick_check".
"""

from __future__ import annotations

import contextlib
import sqlite3
import struct
from pathlib import Path
from urllib.parse import quote

from pgherd.proto.errors import IntegrityError, TransientError

_WAL_HEADER_BYTES, _FRAME_HEADER_BYTES = 32, 24
_WAL_MAGIC_BIG_ENDIAN, _WAL_MAGIC_LITTLE_ENDIAN = 0x377F0683, 0x377F0682


def corrupt(path: Path, what: str) -> IntegrityError:
    """What is wrong with the store, and what to do."""
    return IntegrityError(
        "format.corrupt",
        f"{path} {what}",
        hint=f"nothing was changed. Keep {path.name} and {path.name}-wal, restore your last copy of them, start again"
        " (docs/runbooks/damaged-store.md says what is lost without a copy)",
        path=str(path),
    )


def require_healthy_files(path: Path) -> None:
    """Judge the files before SQLite opens them. Raises IntegrityError format.corrupt, OSError."""
    if path.stat().st_size == 0:
        raise corrupt(path, "is empty: its content was lost")
    log = path.with_name(path.name + "-wal")
    if log.exists() and (dropped := commits_behind_damage(log.read_bytes())) > 1:
        raise corrupt(path, f"has a damaged log: {dropped} commits behind the damage would be dropped without a word")


def require_healthy_content(path: Path, named: Path) -> None:
    """Ask SQLite itself, and whether the tables are ours; `named` is the store's name in errors.

    On a connection that may not write: setting our journal mode would change somebody else's file, and closing the last one
    would move a log that is evidence into it. Raises IntegrityError format.corrupt, TransientError disk.io.
    """
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=15)) as connection:
            (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    except sqlite3.OperationalError as error:
        raise TransientError("disk.io", f"can't open {named}: {error}", path=str(named)) from error
    except sqlite3.DatabaseError as error:
        raise corrupt(named, f"isn't a healthy SQLite database: {error}") from error
    if verdict != "ok":
        raise corrupt(named, f"isn't a healthy SQLite database: {verdict}")
    if tables and "alembic_version" not in tables:
        raise corrupt(named, f"is the database of another program (it has a table {tables[0]!r})")


def commits_behind_damage(log: bytes) -> int:
    """How many commits of the log's present generation stand behind its first bad frame.

    None in a healthy log. One may be a transaction that a power cut tore before it was acknowledged: its frames reach the disk
    in any order. More than one can only be damage, since each commit is synced before the next begins.
    """
    if len(log) < _WAL_HEADER_BYTES:
        return 0
    magic, _format, page_bytes, _sequence = struct.unpack_from(">4I", log, 0)
    if magic not in (_WAL_MAGIC_BIG_ENDIAN, _WAL_MAGIC_LITTLE_ENDIAN) or not 512 <= page_bytes <= 65536:
        return 0 if not any(log) else 2  # a header that isn't one: everything behind it is dropped
    order = ">" if magic == _WAL_MAGIC_BIG_ENDIAN else "<"
    salts = log[16:24]
    sums = _checksum(order, log[:24], (0, 0))
    if sums != struct.unpack_from(">2I", log, 24):
        return 2  # it is synced before the first frame
    is_good, lost = True, 0
    step = _FRAME_HEADER_BYTES + page_bytes
    for at in range(_WAL_HEADER_BYTES, len(log) - step + 1, step):
        if log[at + 8 : at + 16] != salts:
            if is_good:
                return 0  # left over from an earlier generation
            continue
        commits = struct.unpack_from(">I", log, at + 4)[0] != 0
        if is_good:
            sums = _checksum(order, log[at : at + 8] + log[at + _FRAME_HEADER_BYTES : at + step], sums)
            is_good = sums == struct.unpack_from(">2I", log, at + 16)
        if not is_good:
            lost += commits
    return lost


def _checksum(order: str, data: bytes, sums: tuple[int, int]) -> tuple[int, int]:
    first, second = sums
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for even, odd in zip(words[::2], words[1::2], strict=True):
        first = (first + even + second) & 0xFFFFFFFF
        second = (second + odd + first) & 0xFFFFFFFF
    return first, second

"""Telling a damaged DuckDB file from a disk that is full, a file that is locked and a log that is damaged.

Setting a whole store aside is a drastic answer, so it is given only to what DuckDB 1.5 was seen to say about bytes that were
flipped, cut off or overwritten (tests/fault/test_series_store_faults.py flips them); whatever else it says is told, not acted on.
"""

from __future__ import annotations

from pathlib import Path

import duckdb

from pgherd.proto.errors import IntegrityError

_MAGIC_AT, _MAGIC = 8, b"DUCK"
_WORDS_OF_DAMAGE = ("Corrupt database file", "not a valid DuckDB database file", "Could not read enough bytes from file")


class DamagedFileError(IntegrityError):
    """The store's own file is damaged: it may be set aside."""


def is_file_damage(error: BaseException | None) -> bool:
    """Whether DuckDB says that bytes of the database file (not of its log) are wrong or missing."""
    if not isinstance(error, duckdb.Error) or '.wal"' in str(error):
        return False
    return isinstance(error, duckdb.SerializationException) or any(words in str(error) for words in _WORDS_OF_DAMAGE)


def require_duckdb_file(path: Path) -> None:
    """A file that is there begins as DuckDB's do; anything else DuckDB would try to read with an extension, or overwrite.

    Raises DamagedFileError format.corrupt, OSError.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_MAGIC_AT + len(_MAGIC))
    except FileNotFoundError:
        return
    if head[_MAGIC_AT:] != _MAGIC:
        raise DamagedFileError("format.corrupt", f"{path} doesn't begin as a DuckDB file does", path=str(path))

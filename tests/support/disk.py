"""Filling a disk."""

from __future__ import annotations

import errno
from pathlib import Path


def fill(path: Path) -> None:
    """Write to `path` until nothing fits any more."""
    with path.open("ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise

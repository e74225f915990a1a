"""Opening a libpq connection without blocking the loop, and naming why a server refused one."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, cast

import psycopg
from psycopg import pq


class ConnectFailed(psycopg.OperationalError):
    """A connection attempt that the server (with its SQLSTATE) or the system ("" ) refused."""

    def __init__(self, message: str, state: str, needs_password: bool) -> None:
        super().__init__(message)
        self.state = state
        self.needs_password = needs_password


async def dial(conninfo: str) -> pq.abc.PGconn:
    """Open a libpq connection without blocking the loop and without a deadline: the caller waits or leaves it.

    Raises ConnectFailed.
    """
    link: pq.abc.PGconn = await asyncio.to_thread(pq.PGconn.connect_start, conninfo.encode())
    try:
        if link.status != pq.ConnStatus.BAD:
            _set_verbosity(link, _VERBOSE)
        while link.status != pq.ConnStatus.BAD:
            match link.connect_poll():
                case pq.PollingStatus.OK:
                    _set_verbosity(link, _DEFAULT)
                    link.nonblocking = 1
                    return link
                case pq.PollingStatus.READING:
                    await _ready(link.socket, write=False)
                case pq.PollingStatus.WRITING:
                    await _ready(link.socket, write=True)
                case _:
                    break
        raise ConnectFailed(*told(link.get_error_message("utf-8")), bool(link.needs_password))
    except BaseException:
        link.finish()
        raise


# libpq hides the SQLSTATE of a refused connection, and its text is in the server's language. A verbose message holds it:
# "FATAL:  28P01: password authentication failed …" and a last line with the place in the server's source. (A protocol
# trace holds it too, but psycopg leaks its stream: 4.5 KiB a connection.)
_DEFAULT: Final = 1
_VERBOSE: Final = 2
_STATE_RE: Final = re.compile(r":  ([0-9A-Z]{5}): ")
_PLACE_RE: Final = re.compile(r"\n[^\n:]+:\s+\w+, \w+\.\w+:\d+\s*$")


def told(message: str) -> tuple[str, str]:
    """(text, SQLSTATE or "") of a libpq message, verbose or not."""
    found = _STATE_RE.search(message)
    if found is None:
        return message.strip(), ""
    return _PLACE_RE.sub("", _STATE_RE.sub(":  ", message, count=1)).strip(), found[1]


@lru_cache(maxsize=1)
def _libpq() -> ctypes.CDLL | None:
    """The libpq that psycopg has loaded, for what it doesn't offer; None when it can't be told which."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
        path = next(line.split(maxsplit=5)[5] for line in lines if "/libpq" in line)
        library = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        library.PQsetErrorVerbosity.argtypes = [ctypes.c_void_p, ctypes.c_int]
        return library
    return None


def _set_verbosity(link: pq.abc.PGconn, verbosity: int) -> None:
    library = _libpq()
    if library is not None:
        library.PQsetErrorVerbosity(cast(Any, link).pgconn_ptr, verbosity)  # there, but not in the protocol


async def _ready(fd: int, *, write: bool) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    add, remove = (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)
    add(fd, ready.set)
    try:
        await ready.wait()
    finally:
        remove(fd)

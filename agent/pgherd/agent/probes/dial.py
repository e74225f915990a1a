"""Opening a libpq connection without blocking the loop, and naming why a server refused one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import uuid
from typing import Final

import psycopg
from psycopg import pq

_SQLSTATE_RE: Final = re.compile(rb'ErrorResponse\b[^\n]*? C "([0-9A-Z]{5})"')


class ConnectFailed(psycopg.OperationalError):
    """A connection attempt that the server (with its SQLSTATE) or the system ("" ) refused."""

    def __init__(self, message: str, state: str, needs_password: bool) -> None:
        super().__init__(message)
        self.state = state
        self.needs_password = needs_password


async def dial(conninfo: str) -> pq.abc.PGconn:
    """Open a libpq connection without blocking the loop and without a deadline: the caller waits or leaves it.

    libpq hides the SQLSTATE of a refused connection and its text is in the server's language, so the
    protocol trace of the attempt is kept in memory and read for it (libpq >= 14; older: text alone).
    Raises ConnectFailed.
    """
    link: pq.abc.PGconn = await asyncio.to_thread(pq.PGconn.connect_start, conninfo.encode())
    trace_fd = os.memfd_create(f"pgherd-{uuid.uuid4()}")
    try:
        if link.status != pq.ConnStatus.BAD:
            with contextlib.suppress(psycopg.NotSupportedError):
                link.trace(trace_fd)
        while link.status != pq.ConnStatus.BAD:
            match link.connect_poll():
                case pq.PollingStatus.OK:
                    link.untrace()
                    link.nonblocking = 1
                    return link
                case pq.PollingStatus.READING:
                    await _ready(link.socket, write=False)
                case pq.PollingStatus.WRITING:
                    await _ready(link.socket, write=True)
                case _:
                    break
        message = link.get_error_message("utf-8").strip()
        needs_password = bool(link.needs_password)
        link.untrace()
        found = _SQLSTATE_RE.findall(os.pread(trace_fd, 1 << 16, 0))
        raise ConnectFailed(message, found[-1].decode() if found else "", needs_password)
    except BaseException:
        link.finish()
        raise
    finally:
        os.close(trace_fd)


async def _ready(fd: int, *, write: bool) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    add, remove = (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)
    add(fd, ready.set)
    try:
        await ready.wait()
    finally:
        remove(fd)

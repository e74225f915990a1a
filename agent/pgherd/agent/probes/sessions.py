"""How many sessions an agent has at one server, those counted that it gave up and the server hasn't ended yet.

A backend that hangs in the kernel (a dead volume) hears neither its statement timeout nor our goodbye. All connections
of a node share one `Sessions`, so that none of them opens a third beside two that are in use, pending or hanging.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from typing import Final

import psycopg
from psycopg import pq

SESSIONS_MAX: Final = 2  # of an agent at one server

_DRAINED_MAX = 64  # reads of one abandoned session at one look: what it still has to say, so that it can end
_UNHEARD_MS = 30_000  # a peer that acknowledges nothing for so long is gone with its host
_GONE_POLL_S = 0.02


class Sessions:
    """One node's sessions: who has or asks for one, and the sockets of those that were given up."""

    def __init__(self) -> None:
        self._users: set[object] = set()
        self._abandoned: list[socket.socket] = []

    def take(self, user: object) -> bool:
        """Whether `user` may have a session: it has one already, or there is room. Kept until `leave` or `abandon`."""
        if user not in self._users:
            if len(self._users) + self.abandoned >= SESSIONS_MAX:
                return False
            self._users.add(user)
        return True

    def leave(self, user: object) -> None:
        """Its session has ended, or was never opened."""
        self._users.discard(user)

    def abandon(self, user: object, link: pq.abc.PGconn) -> None:
        """Close `user`'s session without a word; it counts until the server has ended it."""
        end = _shut_down(link)
        link.finish()
        if end is not None:
            self._abandoned.append(end)
        self.leave(user)

    @property
    def abandoned(self) -> int:
        """How many sessions that were given up the server hasn't ended yet."""
        ended = [end for end in self._abandoned if _has_ended(end)]
        for end in ended:
            self._abandoned.remove(end)
            end.close()
        return len(self._abandoned)

    async def abandoned_end(self, timeout_s: float) -> bool:
        """Wait until no abandoned session is left; False when one still is after `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.abandoned:  # noqa: ASYNC110 - what it still says must be taken, at each look
                    await asyncio.sleep(_GONE_POLL_S)
        return not self._abandoned

    def forget(self) -> None:
        """Nobody will open a session any more: stop waiting for the abandoned ones."""
        while self._abandoned:
            self._abandoned.pop().close()


def _shut_down(link: pq.abc.PGconn) -> socket.socket | None:
    """Say nothing more on a connection; the descriptor that tells when the server has ended its side (see `_has_ended`)."""
    try:
        end = socket.socket(fileno=os.dup(link.socket))
    except (OSError, psycopg.Error):
        return None
    try:
        end.setblocking(False)
        if end.family in (socket.AF_INET, socket.AF_INET6):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNHEARD_MS)
        end.shutdown(socket.SHUT_WR)
    except OSError:  # it had ended already
        end.close()
        return None
    return end


def _has_ended(end: socket.socket) -> bool:
    """Whether the other side of an abandoned connection is gone; takes what it still says, for it might wait for us."""
    try:
        for _ in range(_DRAINED_MAX):
            if not end.recv(65536):
                return True
    except BlockingIOError:
        return False
    except OSError:
        return True
    return False

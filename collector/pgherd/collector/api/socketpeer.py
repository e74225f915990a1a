"""Who is at the other end of the UNIX socket: the kernel's word (SO_PEERCRED), handed to the application.

Serve with `uvicorn.Config(..., http=PeerCredentialProtocol, ws="none")`, TCP and UNIX sockets alike; on a
UNIX socket `scope["state"]["pgherd_peer_uid"]` is the connecting process's user. Nothing in a request can
set it.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any

from pgherd.collector.api.serving import TimedProtocol

PEER_UID = "pgherd_peer_uid"
_UCRED = struct.Struct("3i")  # pid, uid, gid: unix(7)


class PeerCredentialProtocol(TimedProtocol):
    """HTTP/1.1 that knows its local peers."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        state: dict[str, Any] = {key: value for key, value in self.app_state.items() if key != PEER_UID}
        uid = peer_uid(transport.get_extra_info("socket"))
        if uid is not None:
            state[PEER_UID] = uid
        self.app_state = state
        super().connection_made(transport)


def peer_uid(connection: Any) -> int | None:
    """The user of the process that connected a UNIX socket, None for any other socket."""
    if connection is None or connection.family != socket.AF_UNIX:
        return None
    _pid, uid, _gid = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return int(uid)

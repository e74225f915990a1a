"""A TCP link between two programs that a test can cut or make deaf: a real proxy on loopback."""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType

_CHUNK = 65_536


class Link:
    """Forwards connections from its own port to `target_port`, both on 127.0.0.1. Use as a context manager.

    `cut` closes everything and refuses what comes. `deaf` keeps every connection open and moves no byte, as a peer that
    vanished behind a firewall: whoever sends fills the kernel's buffers and hears nothing, and who dials gets nowhere.
    """

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._open = threading.Event()  # bytes move
        self._open.set()
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._parked: list[socket.socket] = []  # dialled while the link was deaf
        self._refuses = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, name="link", daemon=True)

    def __enter__(self) -> Link:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.cut()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._listener.close()
        self._thread.join(10)

    def cut(self) -> None:
        """Reset what is open; close what comes at once."""
        with self._lock:
            self._refuses = True
            sockets, self._sockets = self._sockets, set()
        self._release()
        for one in sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._open.set()

    def deaf(self) -> None:
        """Move no byte from now on; nobody is told."""
        self._open.clear()

    def mend(self) -> None:
        """Forward again."""
        with self._lock:
            self._refuses = False
        self._open.set()
        self._release()

    def _release(self) -> None:
        with self._lock:
            parked, self._parked = self._parked, []
        for one in parked:
            one.close()  # it dials again

    @property
    def connections(self) -> int:
        """Connections that stand now."""
        with self._lock:
            return len(self._sockets) // 2

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                refuses = self._refuses
                if not self._open.is_set():
                    self._parked.append(near)
                    continue
            try:
                far = None if refuses else socket.create_connection(("127.0.0.1", self._target_port), timeout=5)
            except OSError:
                far = None
            if far is None:
                near.close()
                continue
            far.settimeout(None)
            with self._lock:
                self._sockets |= {near, far}
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(_CHUNK):
                self._open.wait()
                sink.sendall(data)
        except OSError:
            pass
        finally:
            self._open.wait()  # an end isn't news either while the link is deaf
            with self._lock:
                self._sockets -= {source, sink}
            for one in (source, sink):
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            source.close()

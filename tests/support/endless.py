"""A receiver whose answers don't end: it fills them as fast as they are read, or drips them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_SENT_MAX_BYTES = 256 * 1024 * 1024


@dataclass
class Endless:
    """`sent_bytes` grows with what its callers took; `drip_s` is the pause before each further byte, 0 for a flood."""

    status: int = 200
    drip_s: float = 0.0
    sent_bytes: int = 0
    port: int = 0
    ended: threading.Event = field(default_factory=threading.Event)


@contextlib.contextmanager
def endless(status: int = 200, drip_s: float = 0.0) -> Iterator[Endless]:
    """Serves on loopback until the block is left."""
    state = Endless(status, drip_s)
    piece = b"x" if drip_s else b"x" * 65_536

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def do_GET(self) -> None:
            self.send_response(state.status)
            self.end_headers()
            with contextlib.suppress(OSError):
                while state.sent_bytes < _SENT_MAX_BYTES and not state.ended.wait(state.drip_s):
                    self.wfile.write(piece)
                    state.sent_bytes += len(piece)

        def log_message(self, *_arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.ended.set()
        server.shutdown()
        server.server_close()
        thread.join(10)

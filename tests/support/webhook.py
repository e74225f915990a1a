"""A webhook receiver: a real HTTP server on a thread that remembers what it was told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Call:
    key: str
    payload: Any
    status: int  # what we answered
    path: str = ""

    @property
    def told(self) -> str:
        """ "firing High"."""
        return f"{self.payload['status']} {self.payload['groupLabels']['alertname']}"

    @property
    def instance(self) -> str:
        return str(self.payload["commonLabels"]["instance"])


class Webhook:
    """`answer` chooses the status of each POST; calls arrive in `calls`."""

    def __init__(self, port: int = 0, answer: Callable[[dict[str, Any]], int] = lambda _payload: 200) -> None:
        self.calls: list[Call] = []
        self.answer = answer
        self.headers: dict[str, str] = {}  # of every answer
        self.got: Any = []  # what a GET answers
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status = outer.answer(payload)
                outer.calls.append(Call(self.headers["Idempotency-Key"], payload, status, self.path))
                self.send_response(status)
                for name, value in {**outer.headers, "Content-Length": "0"}.items():
                    self.send_header(name, value)
                self.end_headers()

            def do_GET(self) -> None:
                body = json.dumps(outer.got).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    @property
    def accepted(self) -> list[Call]:
        return [call for call in self.calls if call.status < 300]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


@contextmanager
def webhook(port: int = 0, answer: Callable[[dict[str, Any]], int] = lambda _payload: 200) -> Iterator[Webhook]:
    server = Webhook(port, answer)
    try:
        yield server
    finally:
        server.close()

"""A remote write receiver on a thread: decodes what it is sent, answers as it is told, remembers what it took."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import cramjam

from pgherd.proto.remote.v1 import remote_pb2 as pb

Answer = tuple[int, dict[str, str]]
TAKE: Answer = (204, {})


class RemoteReceiver:
    """`judge(request, headers)` chooses the answer; samples of requests that it takes are kept."""

    def __init__(self, port: int = 0) -> None:
        self.judge: Callable[[pb.WriteRequest, Mapping[str, str]], Answer] = lambda _request, _headers: TAKE
        self.samples: dict[str, list[tuple[int, float]]] = {}  # name → samples, in order of arrival
        self.answers: list[int] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.headers["Content-Encoding"] == "snappy"
                assert self.headers["X-Prometheus-Remote-Write-Version"] == "0.1.0"
                request = pb.WriteRequest.FromString(bytes(cramjam.snappy.decompress_raw(body)))
                status, headers = outer.judge(request, dict(self.headers))
                outer.answers.append(status)
                if status < 300:
                    outer.take(request)
                self.send_response(status)
                for name, value in {"Content-Length": "0", **headers}.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, *_arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def take(self, request: pb.WriteRequest) -> None:
        for series in request.timeseries:
            name = next(label.value for label in series.labels if label.name == "__name__")
            self.samples.setdefault(name, []).extend((one.timestamp, one.value) for one in series.samples)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api/v1/write"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


@contextmanager
def remote_receiver(port: int = 0) -> Iterator[RemoteReceiver]:
    receiver = RemoteReceiver(port)
    try:
        yield receiver
    finally:
        receiver.close()

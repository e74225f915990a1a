"""OTLP/HTTP on a port of its own: POST /v1/metrics over HTTPS with a client certificate, protobuf or JSON.

What any OTLP exporter can do unmodified: OTEL_EXPORTER_OTLP_CERTIFICATE, _CLIENT_KEY and _CLIENT_CERTIFICATE name the
three files that `pgherd clients issue` makes. Who sends is judged for each request, not for each connection: a
certificate that was revoked or has expired since is refused at once.

Answers by OTLP's specification ("OTLP/HTTP Response"): 200 with the response message; 429 and 503 with Retry-After,
which may be repeated; 400, 401, 403, 413, 415, which may not; every refusal is a google.rpc.Status in the encoding of the request.
"""

from __future__ import annotations

import asyncio
import json
import math
import ssl
import zlib
from collections.abc import Awaitable, Callable
from functools import partial

import uvicorn
from google.protobuf import json_format
from google.protobuf.message import Message as ProtobufMessage
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pgherd.collector.api.serving import OwnedServer, TimedProtocol
from pgherd.collector.ingest.admit import Peer
from pgherd.collector.ingest.service import Cost, MetricsService
from pgherd.proto.errors import PeerError, PgherdError

PATH = "/v1/metrics"
_PEER_CERTIFICATE = "pgherd_peer_certificate"
_PROTOBUF, _JSON = "application/x-protobuf", "application/json"
_JSON_OBJECTS_MAX = 200_000  # each costs 6 µs: four megabytes of empty ones would take 9 s
_INFLATION_MAX = 1032  # deflate's, by its format
_INFLATABLE = {"gzip", "deflate"}  # zlib tells the two apart by their headers

Admit = Callable[[bytes | None], Awaitable[Peer]]


class CertificateProtocol(TimedProtocol):
    """HTTP/1.1 over TLS that hands on the certificate which the handshake verified, in PEM."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        tls: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        der = tls.getpeercert(binary_form=True) if tls is not None else None
        pem = ssl.DER_cert_to_PEM_cert(der).encode("ascii") if der else None
        self.app_state = {**self.app_state, _PEER_CERTIFICATE: pem}
        super().connection_made(transport)


def otlp_app(service: MetricsService, admit: Admit, *, request_bytes_max: int) -> ASGIApp:
    """The application. `admit` judges a certificate: it raises DeniedError, TransientError store.unavailable."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        encoding = headers.get("content-type", "").partition(";")[0].strip().lower()
        reply = _Reply(service, send, _JSON if encoding == _JSON else _PROTOBUF)
        if scope["path"] != PATH:
            await reply.refuse_unrouted(404, "this port serves POST /v1/metrics only")
            return
        if scope["method"] != "POST":
            await reply.refuse_unrouted(405, "POST metrics here")
            return
        try:
            peer = await admit(scope.get("state", {}).get(_PEER_CERTIFICATE))
            body = await _body(receive, headers, request_bytes_max)
            if encoding not in (_PROTOBUF, _JSON):
                raise PeerError("ingest.unsupported", f"content type {encoding or '(none)'}; {_PROTOBUF} and {_JSON} are taken")
            unpack = partial(
                plain, compression=headers.get("content-encoding", ""), encoding=encoding, bytes_max=request_bytes_max
            )
            await reply.answer(await service.accept(body, peer, None, unpack))
        except _HungUpError:
            return
        except PgherdError as error:
            await reply.refuse(error)

    return app


def otlp_server(app: ASGIApp, context: ssl.SSLContext) -> OwnedServer:
    """The HTTPS server; `context` must require a client certificate."""
    config = uvicorn.Config(
        app, http=CertificateProtocol, ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
        proxy_headers=False, timeout_keep_alive=75, timeout_graceful_shutdown=3, h11_max_incomplete_event_size=16 * 1024,
        ssl_context_factory=lambda _config, _default: context,
    )  # fmt: skip
    return OwnedServer(config)


class _HungUpError(Exception):
    """The caller left in the middle of its request."""


async def _body(receive: Receive, headers: dict[str, str], bytes_max: int) -> bytes:
    """The body as it is on the wire. Raises PeerError ingest.too_large before it holds more than the bound."""
    stated = headers.get("content-length", "0")
    chunks, size = [], int(stated) if stated.isdigit() else 0
    if size > bytes_max:
        raise _too_large(bytes_max)
    size = 0
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            raise _HungUpError
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > bytes_max:
            raise _too_large(bytes_max)
        if not message.get("more_body", False):
            return b"".join(chunks)


def plain(body: bytes, cost: Cost, *, compression: str, encoding: str, bytes_max: int) -> bytes:
    """The request as protobuf, inflated up to the bound and no further. Raises PeerError ingest.*, with `cost` as it was till then."""
    compression = compression.strip().lower()
    if compression in _INFLATABLE:
        body = _inflated(body, cost, bytes_max)
    elif compression not in ("", "identity"):
        raise PeerError("ingest.unsupported", f"content encoding {compression}; gzip, deflate and none are taken")
    if encoding == _PROTOBUF:
        return body
    objects = body.count(b"{")
    if objects > _JSON_OBJECTS_MAX:
        raise PeerError("ingest.too_large", f"the request has more than {_JSON_OBJECTS_MAX} objects in JSON")
    cost.objects = objects
    try:
        document = json.loads(body)
        if not isinstance(document, dict):
            raise ValueError("not an object")
        json.dumps(document, ensure_ascii=False).encode()  # a lone surrogate is a SystemError inside protobuf
        request = json_format.ParseDict(document, ExportMetricsServiceRequest(), ignore_unknown_fields=True)
    except (json_format.ParseError, ValueError, RecursionError) as error:
        raise PeerError("ingest.malformed", "the request isn't an ExportMetricsServiceRequest in JSON") from error
    encoded: bytes = request.SerializeToString()
    return encoded


def _inflated(body: bytes, cost: Cost, bytes_max: int) -> bytes:
    inflater = zlib.decompressobj(wbits=47)
    try:
        plain = inflater.decompress(body, bytes_max + 1)
    except zlib.error as error:
        cost.size_bytes = min(bytes_max, _INFLATION_MAX * len(body))  # what came out before the damage isn't told
        raise PeerError("ingest.malformed", "the request's compression is damaged") from error
    cost.size_bytes = len(plain)
    if len(plain) > bytes_max:
        raise _too_large(bytes_max)
    if not inflater.eof or inflater.unused_data:
        raise PeerError("ingest.malformed", "the request's compression is damaged")
    return plain


def _too_large(bytes_max: int) -> PeerError:
    return PeerError("ingest.too_large", f"the request has more than {bytes_max} bytes")


class _Reply:
    """How a request ends, in the encoding it came in."""

    def __init__(self, service: MetricsService, send: Send, encoding: str) -> None:
        self._service, self._send, self._encoding = service, send, encoding

    async def answer(self, encoded: bytes) -> None:
        await self._write(200, ExportMetricsServiceResponse.FromString(encoded))

    async def refuse(self, error: PgherdError) -> None:
        headers = {}
        if error.retryable:
            headers["retry-after"] = str(max(1, math.ceil(self._service.retry_after_s(error))))
        await self._write(error.info.http_status, self._service.status_of(error), headers)

    async def refuse_unrouted(self, status: int, message: str) -> None:
        await self._write(status, Status(message=message), {"allow": "POST"} if status == 405 else {})

    async def _write(self, status: int, message: ProtobufMessage, more: dict[str, str] | None = None) -> None:
        if self._encoding == _JSON:
            body = json_format.MessageToJson(message, indent=None).encode()
        else:
            body = message.SerializeToString()
        headers = {"content-type": self._encoding, "content-length": str(len(body)), **(more or {})}
        if status >= 400:
            headers["connection"] = "close"  # what of the body wasn't read would be taken for the next request
        pairs = [(name.encode("ascii"), value.encode("ascii")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})
        await self._send({"type": "http.response.body", "body": body})

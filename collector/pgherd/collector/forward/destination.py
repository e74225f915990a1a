"""One request to one receiver, and what its answer means for the samples in it.

    2xx, OK                              sent; a partial success' rejected points are counted as failed
    429, 5xx; OTLP's retryable codes     keep, come again: after Retry-After or RetryInfo when it says
    401, 403, 404, 407, UNAUTHENTICATED, PERMISSION_DENIED, UNIMPLEMENTED
                                         keep, come again: that is a wrong key or a wrong URL, and can be mended
    any other                            refused for ever: set aside and counted, the next one goes

Sources: Prometheus remote write specification 1.0 ("Retries & Backoff"); OTLP specification ("OTLP/HTTP Response").
"""

from __future__ import annotations

import asyncio
import email.utils
import gzip
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias
from urllib.parse import urlsplit

import cramjam
import grpc
import grpc.aio
import httpx
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse

from pgherd.collector.answers import UNPACKED, read_at_most
from pgherd.collector.config import OtlpForwardConfig, RemoteWriteConfig
from pgherd.collector.forward.otlp import export_request
from pgherd.collector.ingest.service import SERVICE
from pgherd.proto.clock import Clock
from pgherd.proto.errors import ConfigError
from pgherd.runtime.durable import read_secret

DestinationConfig: TypeAlias = RemoteWriteConfig | OtlpForwardConfig
Verdict = Literal["sent", "retry", "refused"]

_RETRY_AFTER_MAX_S = 300.0
_ANSWER_BYTES_MAX = 64 * 1024  # a partial success, or an error's first line
_TO_BE_MENDED = frozenset({401, 403, 404, 405, 407, 408, 429})
_POISON = frozenset({grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION})
_DETAILS_KEY = "grpc-status-details-bin"


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a request."""

    verdict: Verdict
    why: str = ""
    retry_after_s: float | None = None
    rejected_points: int = 0


class Destination(Protocol):
    """A receiver."""

    async def send(self, request: bytes) -> Answer:
        """Send an encoded WriteRequest once."""
        ...

    async def close(self) -> None:
        """Let go of its connections."""
        ...


def destination_of(config: DestinationConfig, clock: Clock) -> Destination:
    """Raises ConfigError config.invalid | config.secret_unreadable."""
    headers = {name: _header(config.name, path) for name, path in config.header_files.items()}
    match config:
        case RemoteWriteConfig():
            return RemoteWrite(config.url, _client(config, headers), clock, config.timeout)
        case OtlpForwardConfig(protocol="grpc"):
            return OtlpGrpc(config, headers)
        case _:
            return OtlpHttp(config.endpoint, config.service_name, _client(config, headers), clock, config.timeout)


def _header(destination: str, path: Path) -> str:
    """A secret that can stand in a header: HTTP and gRPC libraries show in their errors what can't."""
    value = read_secret(path)
    if not (value.isascii() and value.isprintable()) or value != value.strip():
        raise ConfigError(
            "config.secret_unreadable", f"forward {destination}: the first line of {path} can't be a header", key="forward"
        )
    return value


def _client(config: DestinationConfig, headers: Mapping[str, str]) -> httpx.AsyncClient:
    url = config.url if isinstance(config, RemoteWriteConfig) else config.endpoint
    try:
        is_address = url.startswith(("http://", "https://")) and bool(httpx.URL(url).host)
    except httpx.InvalidURL:
        is_address = False
    if not is_address:
        raise ConfigError("config.invalid", f"forward {config.name}: {url} isn't an http address", key="forward")
    return httpx.AsyncClient(
        headers={"user-agent": f"pgherd/{version('pgherd')}", **headers},
        timeout=config.timeout, verify=_tls(config), trust_env=False, limits=httpx.Limits(max_connections=2),
    )  # fmt: skip


def _tls(config: DestinationConfig) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=str(config.ca_file) if config.ca_file else None)
        if config.certificate_file and config.key_file:
            context.load_cert_chain(config.certificate_file, config.key_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            "config.secret_unreadable", f"forward {config.name}: can't load its certificates: {error}", key="forward"
        ) from error
    return context


class _Http:
    """A POST and what its status means."""

    def __init__(self, url: str, client: httpx.AsyncClient, clock: Clock, timeout_s: float) -> None:
        self._url, self._client, self._clock, self._timeout_s = url, client, clock, timeout_s

    async def close(self) -> None:
        await self._client.aclose()

    async def _post(self, body: bytes, headers: Mapping[str, str]) -> tuple[Answer, bytes]:
        try:
            # httpx bounds each read, of a receiver that drips its answer the number of them isn't.
            async with (
                asyncio.timeout(self._timeout_s),
                self._client.stream("POST", self._url, content=body, headers={**headers, **UNPACKED}) as answer,
            ):
                content = await read_at_most(answer, _ANSWER_BYTES_MAX)
        except (httpx.HTTPError, TimeoutError) as error:
            return Answer("retry", f"{type(error).__name__}: {error}"), b""
        if answer.is_success:
            return Answer("sent"), content
        why = f"{answer.status_code}: {content[:800].decode(errors='replace')[:200]}"
        if answer.status_code >= 500 or answer.status_code in _TO_BE_MENDED or answer.is_redirect:
            return Answer("retry", why, self._retry_after_s(answer.headers.get("retry-after", ""))), b""
        return Answer("refused", why), b""

    def _retry_after_s(self, text: str) -> float | None:
        """Seconds, or the time until a date; at most five minutes."""
        if text.isdecimal():
            return min(float(text[:6]), _RETRY_AFTER_MAX_S)
        try:
            unix_s = email.utils.parsedate_to_datetime(text).timestamp()
        except (ValueError, OverflowError):
            return None
        return min(max(0.0, unix_s - self._clock.wall_unix_ns() / 1e9), _RETRY_AFTER_MAX_S)


class RemoteWrite(_Http):
    """Prometheus remote write 1.0."""

    async def send(self, request: bytes) -> Answer:
        """See Destination."""
        headers = {
            "content-type": "application/x-protobuf", "content-encoding": "snappy",
            "x-prometheus-remote-write-version": "0.1.0",
        }  # fmt: skip
        body = await asyncio.to_thread(cramjam.snappy.compress_raw, request)
        answer, _ = await self._post(bytes(body), headers)
        return answer


class OtlpHttp(_Http):
    """OTLP/HTTP with protobuf."""

    def __init__(self, url: str, service_name: str, client: httpx.AsyncClient, clock: Clock, timeout_s: float) -> None:
        super().__init__(url, client, clock, timeout_s)
        self._service_name = service_name

    async def send(self, request: bytes) -> Answer:
        """See Destination."""
        body = await asyncio.to_thread(lambda: gzip.compress(_translated(request, self._service_name), 1))
        answer, content = await self._post(body, {"content-type": "application/x-protobuf", "content-encoding": "gzip"})
        return _partly(content) if answer.verdict == "sent" else answer


class OtlpGrpc:
    """OTLP/gRPC."""

    def __init__(self, config: OtlpForwardConfig, headers: Mapping[str, str]) -> None:
        self._service_name, self._timeout_s = config.service_name, config.timeout
        self._metadata = tuple((name.lower(), value) for name, value in headers.items())
        where = urlsplit(config.endpoint)
        if where.scheme not in ("http", "https") or not where.hostname or not where.port:
            raise ConfigError(
                "config.invalid", f"forward {config.name}: {config.endpoint} isn't like https://host:port", key="forward.otlp"
            )
        self._target = where.netloc
        self._credentials = _channel_credentials(config) if where.scheme == "https" else None
        self._channel: grpc.aio.Channel | None = None

    async def close(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close(None)

    def _dialled(self) -> grpc.aio.Channel:
        """Made in the loop that uses it: a channel belongs to one."""
        if self._channel is None:
            credentials = self._credentials
            self._channel = (
                grpc.aio.secure_channel(self._target, credentials)
                if credentials is not None
                else grpc.aio.insecure_channel(self._target)
            )
        return self._channel

    async def send(self, request: bytes) -> Answer:
        """See Destination."""
        call: Any = self._dialled().unary_unary(f"/{SERVICE}/Export", None, None)
        body = await asyncio.to_thread(_translated, request, self._service_name)
        try:
            content = await call(body, timeout=self._timeout_s, metadata=self._metadata, compression=grpc.Compression.Gzip)
        except grpc.aio.AioRpcError as error:
            delay_s = _retry_delay_s(error)
            why = f"{error.code().name}: {(error.details() or '')[:200]}"
            is_too_large = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and delay_s is None
            return Answer("refused" if error.code() in _POISON or is_too_large else "retry", why, delay_s)
        return _partly(content)


def _translated(request: bytes, service_name: str) -> bytes:
    """As OTLP. A megabyte takes 70 ms: not in the event loop."""
    encoded: bytes = export_request(request, service_name).SerializeToString()
    return encoded


def _channel_credentials(config: OtlpForwardConfig) -> grpc.ChannelCredentials:
    def content(path: Path | None) -> bytes | None:
        return path.read_bytes() if path is not None else None

    try:
        return grpc.ssl_channel_credentials(content(config.ca_file), content(config.key_file), content(config.certificate_file))
    except OSError as error:
        raise ConfigError(
            "config.secret_unreadable", f"forward {config.name}: can't read its certificates: {error}", key="forward.otlp"
        ) from error


def _partly(content: bytes) -> Answer:
    """A success, with what it says was left out."""
    try:
        partial = ExportMetricsServiceResponse.FromString(content).partial_success
    except DecodeError:
        return Answer("sent")
    return Answer("sent", partial.error_message[:200], rejected_points=max(0, partial.rejected_data_points))


def _retry_delay_s(error: grpc.aio.AioRpcError) -> float | None:
    trailing: Any = error.trailing_metadata()
    try:
        for key, value in trailing or ():
            if key == _DETAILS_KEY:
                for detail in Status.FromString(value).details:
                    info = RetryInfo()
                    if detail.Unpack(info):
                        return float(min(max(0.0, info.retry_delay.ToMilliseconds() / 1000), _RETRY_AFTER_MAX_S))
    except DecodeError:  # whatever a stranger put there: no reason to end
        return None
    return None

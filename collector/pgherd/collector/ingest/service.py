"""OTLP MetricsService/Export: one request from bytes to a durable answer.

The handler takes raw bytes; decoding runs in two threads of its own; the answer is sent after the store's commit.
How errors leave, by OTLP's specification (docs/specification.md, "Failures" and "OTLP/gRPC Throttling"):
malformed → INVALID_ARGUMENT; too large → RESOURCE_EXHAUSTED without RetryInfo (never repeat it); overload, full disk,
shutdown → UNAVAILABLE with RetryInfo; points that can't be taken → OK with partial_success (never repeat them).
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
import grpc.aio
import numpy as np
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from numpy.typing import NDArray
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse

from pgherd.collector.ingest.admit import (
    AGENT_KIND,
    AdmitLimits,
    Owns,
    Peer,
    Reason,
    admit_times,
    check_claims,
    describe,
    points_among,
)
from pgherd.collector.ingest.otlp import Decoded
from pgherd.collector.ingest.shape import ShapeCache
from pgherd.proto.clock import Clock
from pgherd.proto.errors import PeerError, PgherdError, TransientError
from pgherd.runtime.logging import get_logger
from pgherd.storage.series.batch import Batch, Receipt, Shipment

SERVICE = "opentelemetry.proto.collector.metrics.v1.MetricsService"
INCARNATION_KEY, SEQUENCE_KEY = "pgherd-incarnation", "pgherd-sequence"
_DETAILS_KEY = "grpc-status-details-bin"

log = get_logger(__name__)


class Appender(Protocol):
    """The series store's writing side."""

    def append(self, batch: Batch) -> Future[Receipt]:
        """See pgherd.storage.series.store.SeriesStore.append."""
        ...


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """Bounds of the service itself. Overflow of requests in flight: ingest.overloaded."""

    limits: AdmitLimits = field(default_factory=AdmitLimits)
    in_flight_max: int = 256
    decoders: int = 2
    commit_timeout_s: float = 20.0
    retry_delay_s: float = 2.0
    shape_cache_bytes: int = 64 * 1024 * 1024


@dataclass(slots=True)
class IngestCounters:
    """Self-metrics: monotonic since start, written on the event loop only."""

    requests: int = 0
    request_bytes: int = 0
    points_accepted: int = 0
    points_rejected: Counter[Reason] = field(default_factory=Counter)
    requests_repeated: int = 0
    gaps: int = 0
    deltas_repeated: int = 0
    requests_refused: Counter[str] = field(default_factory=Counter)  # by error code
    in_flight: int = 0  # a gauge


class MetricsService:
    """The servicer; `handler()` goes into the grpc.aio server, behind the identity interceptor."""

    def __init__(
        self, store: Appender, *, current_peer: Callable[[Any], Peer], owns: Owns, clock: Clock, settings: ServiceSettings
    ) -> None:
        """`current_peer(context)` is the verified caller (raises DeniedError); `owns(agent_id, node_id)` is asked per request."""
        self._store = store
        self._current_peer = current_peer
        self._owns = owns
        self._clock = clock
        self._settings = settings
        self._decoders = ThreadPoolExecutor(settings.decoders, thread_name_prefix="otlp-decode")
        self.shapes = ShapeCache(settings.limits, settings.shape_cache_bytes)
        self.counters = IngestCounters()

    def handler(self) -> grpc.GenericRpcHandler[bytes, bytes]:
        """The generic handler of the service: bytes in, bytes out."""
        export = grpc.unary_unary_rpc_method_handler(self.export)
        return grpc.method_handlers_generic_handler(SERVICE, {"Export": export})

    def close(self) -> None:
        """Stop the decoding threads; call after the server has stopped."""
        self._decoders.shutdown(wait=True)

    async def export(self, body: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        """One Export call."""
        self.counters.requests += 1
        self.counters.request_bytes += len(body)
        self.counters.in_flight += 1
        try:
            return await self._export(body, context)
        except PgherdError as error:
            self.counters.requests_refused[error.code] += 1
            await self._abort(context, error)
            raise  # abort always raises
        finally:
            self.counters.in_flight -= 1

    async def _export(self, body: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        settings = self._settings
        peer = self._current_peer(context)
        if len(body) > settings.limits.request_bytes_max:
            raise PeerError(
                "ingest.too_large", f"the request has {len(body)} bytes; at most {settings.limits.request_bytes_max}"
            )
        if self.counters.in_flight > settings.in_flight_max:
            raise TransientError("ingest.overloaded", "too many requests in flight", in_flight=self.counters.in_flight)
        shipment = shipment_of(peer, context.invocation_metadata())
        loop = asyncio.get_running_loop()
        taken = await loop.run_in_executor(self._decoders, self._admit, body, peer, shipment)
        receipt = await self._durable(taken.batch)
        rejected = taken.rejected
        if receipt.refused is not None:
            rejected[Reason.SERIES_MAX] += points_among(taken.ordinals[receipt.refused])
        self._count(receipt, rejected)
        return answer(rejected, receipt.deltas_repeated)

    def _admit(self, body: bytes, peer: Peer, shipment: Shipment | None) -> Admitted:
        decoded = self.shapes.decode(body, peer)
        check_claims(peer, decoded.claims, self._owns)
        return admitted(decoded, shipment, self._clock.wall_unix_ns(), self._settings.limits)

    async def _durable(self, batch: Batch) -> Receipt:
        if not batch.points and batch.shipment is None:
            return Receipt(stored_points=0)
        future = asyncio.wrap_future(self._store.append(batch))
        try:
            # Shielded: the commit goes on when the caller gives up; a repeat is told apart by its sequence.
            return await asyncio.wait_for(asyncio.shield(future), self._settings.commit_timeout_s)
        except TimeoutError as error:
            future.add_done_callback(_forget)
            raise TransientError(
                "ingest.overloaded", f"the series store didn't commit within {self._settings.commit_timeout_s} s"
            ) from error

    def _count(self, receipt: Receipt, rejected: Counter[Reason]) -> None:
        if receipt.repeated:
            self.counters.requests_repeated += 1
            return
        self.counters.points_accepted += receipt.stored_points
        self.counters.points_rejected.update(rejected)
        self.counters.gaps += receipt.gap
        self.counters.deltas_repeated += receipt.deltas_repeated

    async def _abort(self, context: grpc.aio.ServicerContext[bytes, bytes], error: PgherdError) -> None:
        code = getattr(grpc.StatusCode, error.info.grpc_status)
        message = f"{error.code}: {error.message}"
        details = [_packed(ErrorInfo(reason=error.code, domain="pgherd"))]
        if error.retryable:
            retry = RetryInfo()
            retry.retry_delay.FromMilliseconds(int(self._settings.retry_delay_s * 1000))
            details.append(_packed(retry))
        status = Status(code=code.value[0], message=message, details=details)
        log.info("ingest.refused", code=error.code, reason=error.message)
        await context.abort(code, message, trailing_metadata=((_DETAILS_KEY, status.SerializeToString()),))


def shipment_of(peer: Peer, metadata: Any) -> Shipment | None:
    """Incarnation and sequence of an agent's request; None for foreign clients, whose retries can't be told apart.

    Raises PeerError ingest.malformed.
    """
    if peer.kind != AGENT_KIND:
        return None
    facts = {str(key): value for key, value in metadata or ()}
    incarnation, sequence = facts.get(INCARNATION_KEY), facts.get(SEQUENCE_KEY)
    try:
        if not isinstance(incarnation, str) or not isinstance(sequence, str) or not (sequence.isascii() and sequence.isdigit()):
            raise ValueError("missing or not text")
        return Shipment(peer.id, str(uuid.UUID(incarnation)), int(sequence[:20]))
    except ValueError as error:
        raise PeerError(
            "ingest.malformed", f"an agent's request needs {INCARNATION_KEY} (a UUID) and {SEQUENCE_KEY} (from 1) as metadata"
        ) from error


@dataclass(frozen=True, slots=True, eq=False)
class Admitted:
    """The samples as the store takes them, the data point each is from, and what was rejected."""

    batch: Batch
    ordinals: NDArray[np.int32]
    rejected: Counter[Reason]


def admitted(decoded: Decoded, shipment: Shipment | None, now_unix_ns: int, limits: AdmitLimits) -> Admitted:
    """What of a decoded request goes to the store."""
    kept, rejected = admit_times(decoded.times_ns, decoded.ordinals, now_unix_ns, limits)
    rejected.update(decoded.rejected)
    series, times, values, ordinals = decoded.series, decoded.times_ns, decoded.values, decoded.ordinals
    if kept is not None:
        series, times, values, ordinals = series[kept], times[kept], values[kept], ordinals[kept]
    batch = Batch(decoded.layout, series, (times // 1_000_000).astype("int64"), values, shipment)
    return Admitted(batch, ordinals, rejected)


def answer(rejected: Counter[Reason], deltas_repeated: int = 0) -> bytes:
    """The encoded response: empty, or partial success; a repeated increase is only worth a warning."""
    response = ExportMetricsServiceResponse()
    words = [describe(rejected)] if rejected.total() else []
    if deltas_repeated:
        words.append(f"{deltas_repeated} increases no later than what was stored, taken for repeats")
    if words:
        response.partial_success.rejected_data_points = rejected.total()
        response.partial_success.error_message = "; ".join(words)
    encoded: bytes = response.SerializeToString()
    return encoded


def _packed(message: Any) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed


def _forget(future: asyncio.Future[Receipt]) -> None:
    """Take the late outcome, so that an error in it isn't reported as never retrieved."""
    if not future.cancelled():
        future.exception()

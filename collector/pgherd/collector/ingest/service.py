"""OTLP MetricsService/Export: one request from bytes to a durable answer.

`accept` takes raw bytes and a verified sender, whatever brought them; decoding runs in two threads of its own, one request
of a sender at a time; the answer is given after the store's commit. How errors leave, by OTLP's specification
(docs/specification.md, "Failures" and "OTLP/gRPC Throttling"): malformed → INVALID_ARGUMENT; too large →
RESOURCE_EXHAUSTED without RetryInfo (never repeat it); over its quota, overload, full disk, shutdown → UNAVAILABLE with
RetryInfo; points that can't be taken → OK with partial_success (never repeat them).

An agent names the sequence of its request, and may join several requests of consecutive sequences into one: protobuf
messages are joined by putting their bytes one after the other, and `pgherd-lengths` says where each ends. Each part
is stored under its own sequence, so what of them has been stored before is told apart one by one.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol
from weakref import WeakValueDictionary

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
from pgherd.collector.ingest.quota import Quota, Quotas
from pgherd.collector.ingest.shape import ShapeCache
from pgherd.proto.clock import Clock
from pgherd.proto.errors import PeerError, PgherdError, TransientError
from pgherd.proto.steps import UnsteppedClock
from pgherd.runtime.logging import get_logger
from pgherd.storage.series.batch import Batch, Receipt, Shipment

SERVICE = "opentelemetry.proto.collector.metrics.v1.MetricsService"
INCARNATION_KEY, SEQUENCE_KEY, LENGTHS_KEY = "pgherd-incarnation", "pgherd-sequence", "pgherd-lengths"
PARTS_MAX = 256
_HELD_BACK_MAX = 4  # of one sender: their bodies stay in memory meanwhile
_DETAILS_KEY = "grpc-status-details-bin"

log = get_logger(__name__)


@dataclass(slots=True)
class Cost:
    """What unpacking a request has taken so far, for the sender's quota: the bytes it held when inflated, and its objects in JSON."""

    size_bytes: int = 0
    objects: int = 0


Unpack = Callable[[bytes, Cost], bytes]


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
    quota: Quota = field(default_factory=Quota)
    hold_back_s: float = 1.0
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
        self._steady, self._steadying = UnsteppedClock(clock), threading.Lock()
        self._settings = settings
        self._decoders = ThreadPoolExecutor(settings.decoders, thread_name_prefix="otlp-decode")
        self._quotas = Quotas(settings.quota)
        self._held_back: Counter[str] = Counter()
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
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
        """One Export call over gRPC."""
        try:
            return await self.accept(body, self._current_peer(context), context.invocation_metadata())
        except PgherdError as error:
            status = self.status_of(error)
            await context.abort(
                getattr(grpc.StatusCode, error.info.grpc_status),
                status.message,
                trailing_metadata=((_DETAILS_KEY, status.SerializeToString()),),
            )
            raise  # abort always raises

    async def accept(
        self, body: bytes, peer: Peer, metadata: Iterable[tuple[str, Any]] | None, unpack: Unpack | None = None
    ) -> bytes:
        """One request of a verified sender; returns the encoded answer once all that is taken of it is durable.

        `unpack` makes the request of the bytes on the wire. It runs where requests are decoded: within the sender's quota
        and in its turn, for four kilobytes of gzip may cost seconds.

        Raises PeerError ingest.malformed | ingest.too_large, DeniedError identity.mismatch, TransientError
        ingest.quota | ingest.overloaded | store.unavailable.
        """
        self.counters.requests += 1
        self.counters.request_bytes += len(body)
        try:
            return await self._accept(body, peer, metadata, unpack)
        except PgherdError as error:
            self._count_refusal(error, peer)
            raise

    async def _accept(
        self, body: bytes, peer: Peer, metadata: Iterable[tuple[str, Any]] | None, unpack: Unpack | None
    ) -> bytes:
        settings, sender = self._settings, sender_of(peer)
        try:
            self._quotas.enter(sender, len(body), self._clock.mono_s())
        except TransientError:
            await self._hold_back(sender)
            raise
        self.counters.in_flight += 1  # not before: refusals that are held back would fill it, at everybody's cost
        try:
            if len(body) > settings.limits.request_bytes_max:
                raise PeerError(
                    "ingest.too_large", f"the request has {len(body)} bytes; at most {settings.limits.request_bytes_max}"
                )
            if self.counters.in_flight > settings.in_flight_max:
                raise TransientError("ingest.overloaded", "too many requests in flight", in_flight=self.counters.in_flight)
            async with self._turns.setdefault(sender, asyncio.Lock()):  # one of two decoders at most
                cost = Cost()
                if unpack is not None:
                    body = await self._unpacked(body, sender, unpack, cost)
                parts = parts_of(body, peer, metadata)
                taken = await asyncio.get_running_loop().run_in_executor(self._decoders, self._admit, parts, peer)
                points = sum(one.batch.points + one.rejected.total() for one in taken)
                self._quotas.spend(sender, max(0, points - cost.objects))  # a point in JSON is objects that were paid for
                durable = [self._durable(one.batch) for one in taken]
            receipts = await self._all_durable(durable)
        finally:
            self.counters.in_flight -= 1
            self._quotas.leave(sender)
        rejected: Counter[Reason] = Counter()
        for one, receipt in zip(taken, receipts, strict=True):
            if receipt.refused is not None:
                reason = Reason.SERIES_SHARE if receipt.over_share else Reason.SERIES_MAX
                one.rejected[reason] += points_among(one.ordinals[receipt.refused])
            self._count(receipt, one.rejected)
            rejected.update(one.rejected)
        return answer(rejected, sum(receipt.deltas_repeated for receipt in receipts))

    async def _unpacked(self, body: bytes, sender: str, unpack: Unpack, cost: Cost) -> bytes:
        """The request out of its wire form, at the sender's cost; also when it turns out to be none."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._decoders, unpack, body, cost)
        finally:
            self._quotas.spend(sender, cost.objects, max(0, cost.size_bytes - len(body)))

    async def _hold_back(self, sender: str) -> None:
        """Let one that is over its quota wait for its refusal: who doesn't heed the delay would ask thousands of times a second."""
        if self._held_back[sender] >= _HELD_BACK_MAX:
            return
        self._held_back[sender] += 1
        try:
            await asyncio.sleep(self._settings.hold_back_s)
        finally:
            self._held_back[sender] -= 1
            if not self._held_back[sender]:
                del self._held_back[sender]

    def _nows_unix_ns(self) -> tuple[int, int]:
        with self._steadying:
            return self._clock.wall_unix_ns(), self._steady.wall_unix_ns()

    def _admit(self, parts: Sequence[Part], peer: Peer) -> list[Admitted]:
        taken = []
        for part in parts:
            decoded = self.shapes.decode(part.body, peer)
            check_claims(peer, decoded.claims, self._owns)
            made = admitted(decoded, part.shipment, self._nows_unix_ns(), self._settings.limits)
            taken.append(replace(made, batch=replace(made.batch, owner=sender_of(peer))))
        return taken

    def _durable(self, batch: Batch) -> Future[Receipt]:
        """In the store's queue, in the order of the sender's sequences."""
        if batch.points or batch.shipment is not None:
            return self._store.append(batch)
        nothing: Future[Receipt] = Future()
        nothing.set_result(Receipt(stored_points=0))
        return nothing

    async def _all_durable(self, futures: Sequence[Future[Receipt]]) -> list[Receipt]:
        waiting = asyncio.gather(*map(asyncio.wrap_future, futures))
        try:
            # Shielded: the commit goes on when the caller gives up; a repeat is told apart by its sequence.
            return await asyncio.wait_for(asyncio.shield(waiting), self._settings.commit_timeout_s)
        except TimeoutError as error:
            waiting.add_done_callback(_forget)
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

    def _count_refusal(self, error: PgherdError, peer: Peer) -> None:
        refused = self.counters.requests_refused
        refused[error.code] += 1
        if refused[error.code] in (1, 10, 100) or refused[error.code] % 1000 == 0:  # who hammers doesn't fill the disk
            log.info("ingest.refused", code=error.code, reason=error.message, sender=sender_of(peer), times=refused[error.code])

    def status_of(self, error: PgherdError) -> Status:
        """A refusal as google.rpc.Status: its code, ErrorInfo, and RetryInfo when it may be repeated."""
        code = getattr(grpc.StatusCode, error.info.grpc_status)
        details = [_packed(ErrorInfo(reason=error.code, domain="pgherd"))]
        if error.retryable:
            retry = RetryInfo()
            retry.retry_delay.FromMilliseconds(int(self.retry_after_s(error) * 1000))
            details.append(_packed(retry))
        return Status(code=code.value[0], message=f"{error.code}: {error.message}", details=details)

    def retry_after_s(self, error: PgherdError) -> float:
        """When a retryable refusal may be repeated."""
        stated = error.context.get("retry_after_s")
        return float(stated) if isinstance(stated, int) else self._settings.retry_delay_s


@dataclass(frozen=True, slots=True)
class Part:
    """One sequence's share of a request; foreign clients have no sequence."""

    body: bytes
    shipment: Shipment | None


def sender_of(peer: Peer) -> str:
    """Whose quota and whose series."""
    return f"{peer.kind}:{peer.id}"


def parts_of(body: bytes, peer: Peer, metadata: Iterable[tuple[str, Any]] | None) -> list[Part]:
    """A request taken apart: one part per sequence. Raises PeerError ingest.malformed."""
    shipment = shipment_of(peer, metadata)
    lengths = {str(key): value for key, value in metadata or ()}.get(LENGTHS_KEY)
    if shipment is None or lengths is None:
        return [Part(body, shipment)]
    try:
        sizes = [int(size) for size in str(lengths)[: PARTS_MAX * 9].split(",")]
    except ValueError as error:
        raise PeerError("ingest.malformed", f"{LENGTHS_KEY} isn't a list of numbers") from error
    if not 0 < len(sizes) <= PARTS_MAX or min(sizes) < 0 or sum(sizes) != len(body):
        raise PeerError("ingest.malformed", f"{LENGTHS_KEY} doesn't cut {len(body)} bytes into 1 to {PARTS_MAX} parts")
    ends = list(itertools.accumulate(sizes))
    return [
        Part(body[end - size : end], replace(shipment, sequence=shipment.sequence + number))
        for number, (size, end) in enumerate(zip(sizes, ends, strict=True))
    ]


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


def admitted(decoded: Decoded, shipment: Shipment | None, nows_unix_ns: tuple[int, ...], limits: AdmitLimits) -> Admitted:
    """What of a decoded request goes to the store."""
    kept, rejected = admit_times(decoded.times_ns, decoded.ordinals, nows_unix_ns, limits)
    rejected.update(decoded.rejected)
    series, times, values, ordinals = decoded.series, decoded.times_ns, decoded.values, decoded.ordinals
    if kept is not None:
        series, times, values, ordinals = series[kept], times[kept], values[kept], ordinals[kept]
    batch = Batch(decoded.layout, series, (times // 1_000_000).astype("int64"), values, shipment, origins=ordinals)
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


def _forget(future: asyncio.Future[list[Receipt]]) -> None:
    """Take the late outcome, so that an error in it isn't reported as never retrieved."""
    if not future.cancelled():
        future.exception()

"""The shipper: spooled batches to the collector, one request at a time, dropped only after the ack.

What waited through an outage goes in groups: OTLP requests are joined by putting their bytes one after the other, and
`pgherd-lengths` tells the collector where each ends, so that every batch keeps its own sequence and is stored once, whatever of a
group had arrived before. A group that is refused for ever is sent again one by one, to find the batch that it is about.

What the collector's answer means (OTLP specification, "OTLP/gRPC response"; our ingest codes):

    OK                                                   acked; rejected points inside are counted, not retried
    INVALID_ARGUMENT                                     poison: this batch never gets in; set aside, go on
    RESOURCE_EXHAUSTED without RetryInfo                 too large, or overload that a proxy or gRPC itself reports: keep,
                                                         retry; poison for a batch alone in its request that is large, or
                                                         that was refused so `exhausted_max` times in a row
    UNAUTHENTICATED, PERMISSION_DENIED                   keep, retry slowly on a new channel (renewed certificate)
    anything else                                        keep, retry with backoff and jitter, RetryInfo honoured

A batch that isn't OTLP when it must be read (see `with_agent_id`) is poison, too. A wrong server at that address answers UNIMPLEMENTED
for everything, so UNIMPLEMENTED is retried like an outage.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import grpc
import grpc.aio
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse

from pgherd.agent.telemetry.convert import with_agent_id
from pgherd.proto.clock import Clock
from pgherd.proto.errors import PgherdError
from pgherd.runtime.logging import get_logger
from pgherd.runtime.queue.spool import Batch, Spool

METHOD: Final = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
INCARNATION_KEY: Final = "pgherd-incarnation"
SEQUENCE_KEY: Final = "pgherd-sequence"
LENGTHS_KEY: Final = "pgherd-lengths"

_log = get_logger(__name__)

ChannelFactory = Callable[[], grpc.aio.Channel]
Verdict = Literal["acked", "poison", "exhausted", "retry", "denied"]


@dataclass(frozen=True, slots=True)
class ShipSettings:
    """How patient the shipper is."""

    deadline_s: float = 15.0
    backoff_min_s: float = 0.5
    backoff_max_s: float = 30.0
    denied_retry_s: float = 60.0
    group_batches_max: int = 256  # the collector takes no more
    group_bytes_max: int = 1024 * 1024
    large_bytes: int = 1024 * 1024  # a batch of more that exhausts a resource is itself too large
    exhausted_max: int = 5  # refusals in a row of one smaller batch
    idle_poll_s: float = 30.0  # wakes anyway, in case a wake-up was missed


@dataclass(frozen=True, slots=True)
class ShipStatus:
    """Cumulative since this process started, and how the last attempt ended."""

    attempts: int = 0
    failures: int = 0
    rejected_points: int = 0  # inside acknowledged batches, by the collector's word
    last_acked_unix_ns: int = 0
    last_error: str = ""  # gRPC status name, "" after a success


class Shipper:
    """Moves batches from a spool to the collector until it is cancelled."""

    def __init__(
        self,
        spool: Spool,
        channel_factory: ChannelFactory,
        clock: Clock,
        settings: ShipSettings | None = None,
        jitter: Callable[[], float] = random.random,
        agent_id: str = "",
    ) -> None:
        """`agent_id` is who ships now: a batch that was spooled under another identity is sent under this one."""
        self._agent_id = agent_id
        self._spool = spool
        self._channel_factory = channel_factory
        self._clock = clock
        self._settings = settings or ShipSettings()
        self._jitter = jitter
        self._news = asyncio.Event()
        self._hurry = asyncio.Event()
        self._channel: grpc.aio.Channel | None = None
        self._failures_in_row = 0
        self._exhausted: tuple[int, int] = (0, 0)  # a sequence, how often in a row it was refused alone
        self._width = self._settings.group_batches_max
        self._suspect_until = 0  # sequences up to this one go alone: one of them is refused
        self.status = ShipStatus()

    def notify(self) -> None:
        """Something was appended (call from the event loop)."""
        self._news.set()

    def hurry(self) -> None:
        """Try again now instead of waiting out a pause: the collector is there again, or we are about to stop."""
        self._failures_in_row = 0
        self._hurry.set()

    async def reconnect(self) -> None:
        """Use a new channel from the next batch on: the certificate was renewed."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close(grace=None)
        self._news.set()

    async def run(self) -> None:
        """Ship until cancelled. Never raises for the collector's sake; closes its channel at the end."""
        try:
            while True:
                self._news.clear()
                pause_s = await self.ship_next()
                if pause_s is None:  # nothing waits
                    pause_s = self._settings.idle_poll_s
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._news.wait(), pause_s)
                elif pause_s > 0:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._hurry.wait(), pause_s)
                self._hurry.clear()
        finally:
            await self.reconnect()

    async def ship_next(self) -> float | None:
        """Send the oldest batches once. Returns seconds to wait before the next, None when nothing waits."""
        batches = await asyncio.to_thread(self._spool.heads, self._width, self._settings.group_bytes_max)
        if not batches:
            return None
        if batches[0].sequence <= self._suspect_until:
            batches = batches[:1]
        verdict, pause_s, why = await self._send(batches)
        if exhausted := verdict == "exhausted":
            verdict = self._weigh(batches)
        match verdict:
            case "acked":
                await asyncio.to_thread(self._spool.release_all, batches, "acked")
                self._failures_in_row = 0
                self._width = min(2 * self._width, self._settings.group_batches_max)
                return 0.0
            case "poison" if len(batches) > 1:
                self._suspect_until = batches[-1].sequence
                return 0.0
            case "poison":
                _log.error("ship.refused", sequence=batches[0].sequence, points=batches[0].points, why=why)
                await asyncio.to_thread(self._spool.release_all, batches, "poisoned")
                if not exhausted:  # else the next ones may meet the same lack: patience stays, so that few are lost
                    self._failures_in_row = 0
                return 0.0
            case "denied":
                _log.error("ship.denied", why=why, hint="join again, or look whether this agent was revoked")
                await self.reconnect()
                return self._settings.denied_retry_s
            case "retry" | "exhausted":
                self._failures_in_row += 1
                self._width = max(1, self._width // 2)  # a smaller group has a better chance on a bad link
                if self._failures_in_row in (1, 10, 100) or self._failures_in_row % 1000 == 0:
                    _log.warning("ship.delayed", why=why, failures_in_row=self._failures_in_row)
                return pause_s if pause_s is not None else self._backoff_s()

    def _weigh(self, batches: Sequence[Batch]) -> Verdict:
        """Whether a lack of resources is about this batch, which then never gets in, or about the moment."""
        if len(batches) > 1:
            self._suspect_until = batches[0].sequence  # alone it tells
            return "retry"
        (batch,) = batches
        times = self._exhausted[1] + 1 if self._exhausted[0] == batch.sequence else 1
        self._exhausted = (batch.sequence, times)
        return "poison" if len(batch.payload) > self._settings.large_bytes or times >= self._settings.exhausted_max else "retry"

    def _backoff_s(self) -> float:
        doublings = min(self._failures_in_row - 1, 16)
        full = min(self._settings.backoff_max_s, self._settings.backoff_min_s * float(2**doublings))
        return full * (0.5 + 0.5 * self._jitter())

    async def _send(self, batches: Sequence[Batch]) -> tuple[Verdict, float | None, str]:
        if self._channel is None:
            try:
                self._channel = self._channel_factory()
            except PgherdError as error:  # an identity that can't be read now: sampling goes on without it
                return "denied", None, f"{error.code}: {error.message}"
        call = self._channel.unary_unary(METHOD, request_serializer=None, response_deserializer=None)
        status = self.status
        attempts = status.attempts + 1
        try:
            parts = [with_agent_id(batch.payload, self._agent_id) if self._agent_id else batch.payload for batch in batches]
        except ValueError as error:
            return "poison", None, str(error)
        metadata = [(INCARNATION_KEY, batches[0].incarnation), (SEQUENCE_KEY, str(batches[0].sequence))]
        if len(parts) > 1:
            metadata.append((LENGTHS_KEY, ",".join(str(len(part)) for part in parts)))
        try:
            answer = await call(
                b"".join(parts),
                timeout=self._settings.deadline_s,
                metadata=tuple(metadata),
                compression=grpc.Compression.Gzip,
            )
            rejected = _rejected_points(answer)
        except grpc.aio.AioRpcError as error:
            name = error.code().name
            self.status = ShipStatus(attempts, status.failures + 1, status.rejected_points, status.last_acked_unix_ns, name)
            pause_s = retry_delay_s(error)
            return judge(error.code(), pause_s is not None), pause_s, f"{name}: {error.details() or ''}"[:300]
        except ValueError as error:  # the answer isn't OTLP
            self.status = ShipStatus(
                attempts, status.failures + 1, status.rejected_points, status.last_acked_unix_ns, "MALFORMED_ANSWER"
            )
            return "retry", None, str(error)
        if rejected:
            _log.warning("ship.partly_rejected", sequence=batches[0].sequence, rejected_points=rejected)
        self.status = ShipStatus(attempts, status.failures, status.rejected_points + rejected, self._clock.wall_unix_ns(), "")
        return "acked", None, ""


def judge(code: grpc.StatusCode, has_retry_info: bool) -> Verdict:
    """What a failed Export means for its batch (see the module's table). Pure."""
    match code:
        case grpc.StatusCode.INVALID_ARGUMENT:
            return "poison"
        case grpc.StatusCode.RESOURCE_EXHAUSTED if not has_retry_info:
            return "exhausted"
        case grpc.StatusCode.UNAUTHENTICATED | grpc.StatusCode.PERMISSION_DENIED:
            return "denied"
        case _:
            return "retry"


def _rejected_points(answer: bytes) -> int:
    try:
        response: Any = ExportMetricsServiceResponse.FromString(answer)
    except Exception as error:
        raise ValueError("the collector's answer isn't an ExportMetricsServiceResponse") from error
    return int(response.partial_success.rejected_data_points)


def retry_delay_s(error: grpc.aio.AioRpcError) -> float | None:
    """The RetryInfo delay of a failed call, at most five minutes; None when it carries none."""
    from google.rpc import error_details_pb2, status_pb2

    trailing: Any = error.trailing_metadata()
    for key, value in trailing or ():
        if key == "grpc-status-details-bin":
            details = status_pb2.Status.FromString(value)
            for detail in details.details:
                info = error_details_pb2.RetryInfo()
                if detail.Unpack(info):
                    delay_s = float(info.retry_delay.seconds) + float(info.retry_delay.nanos) / 1e9
                    return min(300.0, max(0.0, delay_s))
    return None

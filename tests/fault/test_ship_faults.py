"""The shipper against a collector that answers everything there is to answer, over real gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)

from pgherd.agent.telemetry.convert import Source, encode, series_of
from pgherd.agent.telemetry.ship import METHOD, Shipper, ShipSettings, judge
from pgherd.proto.errors import IntegrityError
from pgherd.proto.samples import Metric, MetricKind, Sample
from pgherd.runtime.clock import SystemClock
from support.sampling import until
from support.spooling import open_spool

pytestmark = pytest.mark.fault

GROUPS = ShipSettings(deadline_s=1.0, backoff_min_s=0.02, backoff_max_s=0.1, denied_retry_s=0.05, idle_poll_s=5.0)
SETTINGS = replace(GROUPS, group_batches_max=1)
OK = ExportMetricsServiceResponse().SerializeToString()


class Collector:
    """Answers Export by a script, then OK; remembers what came."""

    def __init__(self) -> None:
        self.script: list[Callable[[Any], Any]] = []
        self.received: list[tuple[dict[str, str], bytes]] = []  # one by one, however they were joined
        self.requests = 0
        self.poison = b"\0poison"
        self.concurrent = self.concurrent_max = 0

    async def export(self, request: bytes, context: Any) -> bytes:
        self.concurrent += 1
        self.concurrent_max = max(self.concurrent, self.concurrent_max)
        try:
            metadata = {key: value for key, value in context.invocation_metadata() if key.startswith("pgherd-")}
            self.requests += 1
            lengths = [int(size) for size in metadata.pop("pgherd-lengths", str(len(request))).split(",")]
            assert sum(lengths) == len(request)
            ends = itertools.accumulate(lengths)
            parts = [request[end - size : end] for size, end in zip(lengths, ends, strict=True)]
            if any(self.poison in part for part in parts):
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "poison")
            for number, part in enumerate(parts):
                sequence = str(int(metadata["pgherd-sequence"]) + number)
                self.received.append((metadata | {"pgherd-sequence": sequence}, part))
            if self.script:
                answer = await self.script.pop(0)(context)
                if answer is not None:
                    return bytes(answer)
            return OK
        finally:
            self.concurrent -= 1

    @property
    def sequences(self) -> list[int]:
        return [int(metadata["pgherd-sequence"]) for metadata, _ in self.received]


def fail(code: grpc.StatusCode, retry_after_s: float | None = None) -> Callable[[Any], Any]:
    async def answer(context: Any) -> None:
        if retry_after_s is None:
            await context.abort(code, "scripted")
            return
        info = error_details_pb2.RetryInfo()
        info.retry_delay.FromNanoseconds(int(retry_after_s * 1e9))
        packed = any_pb2.Any()
        packed.Pack(info)
        details = status_pb2.Status(code=code.value[0], message="scripted", details=[packed])
        await context.abort(code, "scripted", (("grpc-status-details-bin", details.SerializeToString()),))

    return answer


async def never(context: Any) -> None:
    await asyncio.sleep(60)


async def partial(context: Any) -> bytes:
    response = ExportMetricsServiceResponse()
    response.partial_success.rejected_data_points = 2
    return bytes(response.SerializeToString())


async def garbage(context: Any) -> bytes:
    return b"\xff\xff\xff\xff"


@contextlib.asynccontextmanager
async def serving(collector: Collector, port: int = 0) -> AsyncIterator[int]:
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(collector.export)
    service, _, method = METHOD[1:].rpartition("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


def ship(
    directory: Path, script: list[Callable[[Any], Any]], batches: int = 3, dials_failing: int = 0
) -> tuple[Any, Collector, int]:
    """Ship `batches` batches of 10 points through the script; (counts, collector, channels opened)."""

    async def work() -> tuple[Any, Collector, int]:
        collector, channels = Collector(), 0
        collector.script = script
        spool = open_spool(directory)
        for n in range(batches):
            spool.append(b"batch %d" % n * 100, 10)
        async with serving(collector) as port:

            def channel() -> grpc.aio.Channel:
                nonlocal channels
                channels += 1
                if channels <= dials_failing:
                    raise IntegrityError("format.corrupt", "identity.json can't be read")
                return grpc.aio.insecure_channel(f"127.0.0.1:{port}")

            shipper = Shipper(spool, channel, SystemClock(), SETTINGS)
            task = asyncio.create_task(shipper.run())
            await until(lambda: spool.status.pending_batches == 0, 20, "an empty spool")
            spool.append(b"woken", 10)
            shipper.notify()
            await until(lambda: spool.status.pending_batches == 0, 4, "the wake-up: idle_poll_s is longer")
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        counts = spool.status.counts
        spool.close()
        assert collector.concurrent_max == 1
        return (counts, shipper.status), collector, channels

    return asyncio.run(work())


def test_all_arrive_once_in_order_with_their_names(tmp_path: Path) -> None:
    (counts, status), collector, channels = ship(tmp_path / "spool", [])
    assert collector.sequences == [1, 2, 3, 4]
    assert collector.received[0][1] == b"batch 0" * 100
    assert len({metadata["pgherd-incarnation"] for metadata, _ in collector.received}) == 1
    assert counts.acked_points == counts.sampled_points == 40
    assert status.failures == 0
    assert channels == 1


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNIMPLEMENTED])
def test_outages_are_waited_out(tmp_path: Path, code: grpc.StatusCode) -> None:
    (counts, status), collector, _ = ship(tmp_path / "spool", [fail(code), fail(code), never, garbage])
    assert collector.sequences == [1, 1, 1, 1, 1, 2, 3, 4]
    assert counts.acked_points == 40
    assert counts.dropped_points == 0
    assert status.failures == 4


def test_retry_info_is_honoured(tmp_path: Path) -> None:
    async def work() -> float | None:
        collector = Collector()
        collector.script = [fail(grpc.StatusCode.UNAVAILABLE, 7.25)]
        spool = open_spool(tmp_path / "spool")
        spool.append(b"x", 1)
        async with serving(collector) as port:
            shipper = Shipper(spool, lambda: grpc.aio.insecure_channel(f"127.0.0.1:{port}"), SystemClock(), SETTINGS)
            pause_s = await shipper.ship_next()
            await shipper.reconnect()
        spool.close()
        return pause_s

    assert asyncio.run(work()) == 7.25


def test_poison_is_set_aside_counted_and_does_not_block(tmp_path: Path) -> None:
    (counts, _), collector, _ = ship(tmp_path / "spool", [fail(grpc.StatusCode.INVALID_ARGUMENT)])
    assert collector.sequences == [1, 2, 3, 4]
    assert counts.poisoned_points == 10
    assert counts.acked_points == 30
    assert (tmp_path / "spool" / "set-aside" / "refused-1.otlp").exists()


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED])
def test_a_refused_identity_keeps_everything_and_dials_anew(tmp_path: Path, code: grpc.StatusCode) -> None:
    (counts, _), collector, channels = ship(tmp_path / "spool", [fail(code), fail(code)])
    assert collector.sequences == [1, 1, 1, 2, 3, 4]
    assert counts.acked_points == 40
    assert channels == 3, "a renewed certificate needs a new channel"


def test_an_identity_that_cant_be_read_for_a_while_ends_nothing(tmp_path: Path) -> None:
    """The resident's parts fail together: a shipper that raises would take the sampling with it."""
    (counts, _), collector, channels = ship(tmp_path / "spool", [], dials_failing=2)
    assert collector.sequences == [1, 2, 3, 4]
    assert (counts.acked_points, channels) == (40, 3)


def test_partial_success_is_acknowledged_and_counted(tmp_path: Path) -> None:
    (counts, status), collector, _ = ship(tmp_path / "spool", [partial])
    assert collector.sequences == [1, 2, 3, 4]
    assert counts.acked_points == 40
    assert status.rejected_points == 2


def test_overload_with_retry_info_is_no_poison() -> None:
    assert judge(grpc.StatusCode.RESOURCE_EXHAUSTED, True) == "retry"
    assert judge(grpc.StatusCode.RESOURCE_EXHAUSTED, False) == "exhausted"


def test_overload_that_a_proxy_reports_costs_no_batch(tmp_path: Path) -> None:
    (counts, status), collector, _ = ship(tmp_path / "spool", [fail(grpc.StatusCode.RESOURCE_EXHAUSTED)] * 4)
    assert collector.sequences == [1, 1, 1, 1, 1, 2, 3, 4]
    assert (counts.acked_points, counts.poisoned_points, status.failures) == (40, 0, 4)


def test_a_batch_that_exhausts_a_resource_again_and_again_is_poison(tmp_path: Path) -> None:
    (counts, _), collector, _ = ship(tmp_path / "spool", [fail(grpc.StatusCode.RESOURCE_EXHAUSTED)] * 5)
    assert collector.sequences == [1, 1, 1, 1, 1, 2, 3, 4]
    assert (counts.acked_points, counts.poisoned_points) == (30, 10)
    assert (tmp_path / "spool" / "set-aside" / "refused-1.otlp").exists()


def ship_some(
    directory: Path, payloads: list[bytes], script: list[Callable[[Any], Any]], agent_id: str = ""
) -> tuple[Any, Any]:
    """Ship in groups until nothing waits; (counts, collector)."""

    async def work() -> tuple[Any, Any]:
        collector = Collector()
        collector.script = script
        spool = open_spool(directory, size_max=1 << 24)
        for payload in payloads:
            spool.append(payload, 10)
        async with serving(collector) as port:
            dial = lambda: grpc.aio.insecure_channel(f"127.0.0.1:{port}")  # noqa: E731
            shipper = Shipper(spool, dial, SystemClock(), GROUPS, agent_id=agent_id)
            while (pause_s := await shipper.ship_next()) is not None:
                assert pause_s <= GROUPS.backoff_max_s
            await shipper.reconnect()
        counts = spool.status.counts
        spool.close()
        return counts, collector

    return asyncio.run(work())


def test_a_large_batch_that_is_too_much_is_poison_at_once_but_never_for_its_group_s_sake(tmp_path: Path) -> None:
    large = b"0" * (GROUPS.large_bytes + 1)
    too_much = fail(grpc.StatusCode.RESOURCE_EXHAUSTED)
    counts, collector = ship_some(tmp_path / "spool", [large, b"small 2", b"small 3"], [too_much])
    assert collector.sequences == [1, 2, 3]
    assert (counts.acked_points, counts.poisoned_points) == (20, 10)
    counts, collector = ship_some(tmp_path / "group", [b"small 1", b"small 2", b"small 3"], [too_much])
    assert collector.sequences == [1, 2, 3, 1, 2, 3]
    assert (counts.acked_points, counts.poisoned_points) == (30, 0)


def test_a_spooled_batch_that_isnt_otlp_is_set_aside_and_the_others_go(tmp_path: Path) -> None:
    """It can't be put under the new identity; a shipper that ends there would leave all that follows on the disk."""
    samples = series_of([Sample(Metric("pg_up", MetricKind.GAUGE, "h"), {}, 1.0)])
    whole = encode(Source("former", "node-id", "n1", "c1", "h:1"), samples, [], 5)
    counts, collector = ship_some(tmp_path / "spool", [whole, b"\xff\xff\xff\xff", whole], [], agent_id="now")
    assert collector.sequences == [1, 3]
    assert (counts.acked_points, counts.poisoned_points) == (20, 10)
    assert (tmp_path / "spool" / "set-aside" / "refused-2.otlp").exists()


def test_a_lost_ack_ships_the_same_sequence_again_after_a_restart(tmp_path: Path) -> None:
    async def work() -> None:
        collector = Collector()
        spool = open_spool(tmp_path / "spool")
        spool.append(b"only", 5)
        async with serving(collector) as port:
            batch = spool.head()
            assert batch is not None
            shipper = Shipper(spool, lambda: grpc.aio.insecure_channel(f"127.0.0.1:{port}"), SystemClock(), SETTINGS)
            await shipper._send([batch])  # stored there; the agent dies before it notes the ack
            spool.close()
            spool = open_spool(tmp_path / "spool")
            again = Shipper(spool, lambda: grpc.aio.insecure_channel(f"127.0.0.1:{port}"), SystemClock(), SETTINGS)
            assert await again.ship_next() == 0.0
            await shipper.reconnect()
            await again.reconnect()
        assert collector.sequences == [1, 1]
        assert collector.received[0] == collector.received[1]
        assert spool.status.counts.acked_points == 5
        spool.close()

    asyncio.run(work())


@pytest.mark.parametrize("former", ["11111111-1111-1111-1111-111111111111", ""])
def test_what_a_former_identity_spooled_is_shipped_under_the_new_one(tmp_path: Path, former: str) -> None:
    """Revoked and joined again, or standalone and then joined: else the head of the queue is refused for ever."""
    now = "22222222-2222-2222-2222-222222222222"
    samples = series_of([Sample(Metric("pg_up", MetricKind.GAUGE, "h"), {}, 1.0)])

    async def work() -> list[str]:
        collector = Collector()
        spool = open_spool(tmp_path / "spool")
        spool.append(encode(Source(former, "node-id", "n1", "c1", "h:1"), samples, [], 5), 1)
        spool.append(encode(Source(now, "node-id", "n1", "c1", "h:1"), samples, [], 6), 1)
        async with serving(collector) as port:
            dial = lambda: grpc.aio.insecure_channel(f"127.0.0.1:{port}")  # noqa: E731
            shipper = Shipper(spool, dial, SystemClock(), SETTINGS, agent_id=now)
            while await shipper.ship_next() is not None:
                pass
            await shipper.reconnect()
        spool.close()
        requests = [ExportMetricsServiceRequest.FromString(body) for _, body in collector.received]
        return [
            attribute.value.string_value
            for request in requests
            for attribute in request.resource_metrics[0].resource.attributes
            if attribute.key == "pgherd.agent.id"
        ]

    assert asyncio.run(work()) == [now, now]


def test_a_hurry_ends_a_pause(tmp_path: Path) -> None:
    """The collector is there again: what waits goes now, not when the back-off is over."""
    patient = ShipSettings(deadline_s=1.0, backoff_min_s=300.0, backoff_max_s=600.0)

    async def work() -> int:
        collector = Collector()
        collector.script = [fail(grpc.StatusCode.UNAVAILABLE)]
        spool = open_spool(tmp_path / "spool")
        spool.append(b"batch", 1)
        async with serving(collector) as port:
            shipper = Shipper(spool, lambda: grpc.aio.insecure_channel(f"127.0.0.1:{port}"), SystemClock(), patient)
            task = asyncio.create_task(shipper.run())
            await until(lambda: shipper.status.failures == 1, 10, "the first failure")
            await asyncio.sleep(0)
            shipper.hurry()
            await until(lambda: spool.status.pending_batches == 0, 10, "the batch to go")
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        spool.close()
        return len(collector.received)

    assert asyncio.run(work()) == 2


def test_a_backlog_goes_in_groups_in_order_and_one_refused_batch_costs_only_itself(tmp_path: Path) -> None:
    async def work() -> tuple[Collector, Any]:
        collector = Collector()
        collector.poison = b"batch 333 "
        collector.script = [fail(grpc.StatusCode.UNAVAILABLE), never, garbage]
        spool = open_spool(tmp_path / "spool", segment_max=4096)
        for n in range(1, 601):
            spool.append(b"batch %d " % n * 20, 10)
        async with serving(collector) as port:
            shipper = Shipper(spool, lambda: grpc.aio.insecure_channel(f"127.0.0.1:{port}"), SystemClock(), GROUPS)
            task = asyncio.create_task(shipper.run())
            await until(lambda: spool.status.pending_batches == 0, 30, "an empty spool")
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        counts = spool.status.counts
        spool.close()
        return collector, counts

    collector, counts = asyncio.run(work())
    first = {sequence: place for place, sequence in reversed(list(enumerate(collector.sequences)))}
    assert sorted(first) == [n for n in range(1, 601) if n != 333]
    assert list(first.values()) == sorted(first.values(), reverse=True), "the order stays"
    assert (counts.acked_points, counts.poisoned_points, counts.acked_batches) == (5990, 10, 599)
    assert (tmp_path / "spool" / "set-aside" / "refused-333.otlp").exists()
    assert collector.requests < 300

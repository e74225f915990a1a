"""MetricsService over a real gRPC connection and a real store: every way a request can end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)

from pgherd.collector.ingest.admit import AdmitLimits, Reason
from pgherd.collector.ingest.quota import Quota
from pgherd.collector.ingest.service import SERVICE, Appender, MetricsService, ServiceSettings
from pgherd.proto.errors import TransientError
from pgherd.storage.series.batch import Batch, Receipt
from pgherd.storage.series.store import SeriesStore
from support.otlp import AGENT, INCARNATION, NODE, histogram, metric, resource, simple
from support.series import HandClock, name_is, open_store, quiet

pytestmark = pytest.mark.fault

OTHER = "11111111-2222-4333-8444-555555555555"


@dataclass(frozen=True)
class Caller:
    kind: str = "agent"
    id: str = AGENT


@dataclass
class Wire:
    """A running service and a client of it; `caller` is who the identity gate says is calling."""

    service: MetricsService
    channel: Any
    clock: HandClock
    caller: Caller = field(default_factory=Caller)
    owned: set[tuple[str, str]] = field(default_factory=lambda: {(AGENT, NODE)})

    async def export(self, body: bytes, sequence: int | None = 1, incarnation: str = INCARNATION) -> Any:
        metadata = () if sequence is None else (("pgherd-incarnation", incarnation), ("pgherd-sequence", str(sequence)))
        answer = await self.channel.unary_unary(f"/{SERVICE}/Export")(body, timeout=10, metadata=metadata)
        return ExportMetricsServiceResponse.FromString(answer).partial_success

    async def refusal(self, body: bytes, **sent: Any) -> tuple[grpc.StatusCode, str, float | None]:
        """Status, our error code and the retry delay of a call that must fail."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.export(body, **sent)
        error = caught.value
        trailing: Any = error.trailing_metadata()
        status = Status.FromString(trailing["grpc-status-details-bin"])
        assert status.code == error.code().value[0]
        info, retry = ErrorInfo(), RetryInfo()
        delay = None
        for detail in status.details:
            detail.Unpack(info)
            if detail.Unpack(retry):
                delay = retry.retry_delay.ToMilliseconds() / 1000
        return error.code(), info.reason, delay

    def now_ns(self) -> int:
        return self.clock.wall_unix_ns()


@asynccontextmanager
async def serving(store: Appender, settings: ServiceSettings) -> AsyncIterator[Wire]:
    clock = HandClock()
    service = MetricsService(
        store,
        current_peer=lambda _context: wire.caller,
        owns=lambda agent_id, said: (agent_id, said.node_id) in wire.owned,
        clock=clock,
        settings=settings,
    )
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 8 * 1024 * 1024)])
    server.add_generic_rpc_handlers((service.handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
    wire = Wire(service, channel, clock)
    try:
        yield wire
    finally:
        await channel.close(None)
        await server.stop(1.0)
        service.close()


def run(store: Appender, body: Callable[[Wire], Awaitable[None]], **settings: Any) -> None:
    async def main() -> None:
        async with serving(store, ServiceSettings(**settings)) as wire:
            await body(wire)

    asyncio.run(main())


@pytest.fixture
def store(tmp_path: Path) -> Any:
    made = open_store(tmp_path, quiet())
    yield made
    made.close()


def sequence_of(store: SeriesStore) -> tuple[int, int, int]:
    (state,) = store.shipments()
    return state.last_sequence, state.gaps, state.stored_points


def test_acknowledged_is_stored_once_and_gaps_are_counted(store: SeriesStore) -> None:
    async def body(wire: Wire) -> None:
        for sequence in (1, 2, 2, 1, 5):
            wire.clock.unix_ms += 1000
            success = await wire.export(simple([1.0, 2.0], wire.now_ns()), sequence)
            assert success.rejected_data_points == 0
        assert (wire.service.counters.requests_repeated, wire.service.counters.gaps) == (2, 2)
        assert wire.service.counters.points_accepted == 6
        assert wire.service.shapes.hits > 0  # the fast path took part

    run(store, body)
    assert sequence_of(store) == (5, 2, 6)
    assert [len(window.times_ms) for window in store.select([name_is("pg_stat_x")], 0, 1 << 60)] == [3, 3]


def test_a_histogram_counts_as_its_sender_counts_it(store: SeriesStore) -> None:
    """One data point is many samples here; the agent's books and ours must agree all the same, on both decoding paths."""

    async def body(wire: Wire) -> None:
        for sequence in (1, 2, 2):
            wire.clock.unix_ms += 1000
            request = ExportMetricsServiceRequest.FromString(simple([1.0, 2.0], wire.now_ns()))
            histogram(request.resource_metrics[0], "h", [0.1, 1.0], [3, 2, 1], time_ns=wire.now_ns())
            await wire.export(request.SerializeToString(), sequence)
        assert wire.service.shapes.hits > 0

    run(store, body)
    assert sequence_of(store) == (2, 0, 2 * 3)
    assert store.counters.points_stored > 2 * 3


def test_joined_requests_are_stored_under_their_own_sequences(store: SeriesStore) -> None:
    """Whatever of a group had arrived before, and however groups are cut after a restart."""

    async def body(wire: Wire) -> None:
        def parts(first: int, last: int) -> tuple[bytes, str]:
            made = [simple([float(n)] * n, wire.now_ns() + n * 1_000_000_000) for n in range(first, last + 1)]
            return b"".join(made), ",".join(str(len(part)) for part in made)

        async def ship(first: int, last: int) -> None:
            joined, lengths = parts(first, last)
            metadata = (
                ("pgherd-incarnation", INCARNATION), ("pgherd-sequence", str(first)), ("pgherd-lengths", lengths),
            )  # fmt: skip
            await wire.channel.unary_unary(f"/{SERVICE}/Export")(joined, timeout=10, metadata=metadata)

        for first, last in ((1, 3), (2, 5), (1, 5), (4, 4), (7, 8)):
            await ship(first, last)
        assert sequence_of(store) == (8, 1, 1 + 2 + 3 + 4 + 5 + 7 + 8)
        assert wire.service.counters.requests_repeated == 2 + 5 + 1
        good, _ = parts(9, 9)
        for lengths in ("", "x", str(len(good) + 1), f"{len(good) + 1},-1", ",".join(["0"] * 256 + [str(len(good))])):
            metadata = (("pgherd-incarnation", INCARNATION), ("pgherd-sequence", "9"), ("pgherd-lengths", lengths))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await wire.channel.unary_unary(f"/{SERVICE}/Export")(good, timeout=10, metadata=metadata)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    run(store, body)
    assert sequence_of(store)[0] == 8


def test_partial_success_names_what_was_left_out(store: SeriesStore) -> None:
    async def body(wire: Wire) -> None:
        request = ExportMetricsServiceRequest()
        made = resource(request)
        metric(made, "good", [({}, 1.0)], time_ns=wire.now_ns())
        metric(made, "late", [({}, 1.0)], time_ns=1)
        made.scope_metrics.add().metrics.add(name="h").histogram.data_points.add(count=1)
        success = await wire.export(request.SerializeToString(), 1)
        assert success.rejected_data_points == 2
        assert Reason.PAST in success.error_message
        assert Reason.TEMPORALITY in success.error_message
        success = await wire.export(simple([1.0], 1), 2)  # nothing left: still acknowledged
        assert success.rejected_data_points == 1
        assert wire.service.counters.points_rejected == {Reason.PAST: 2, Reason.TEMPORALITY: 1}

    run(store, body)
    assert sequence_of(store) == (2, 0, 1)


def test_malformed_and_oversized_requests_are_never_to_be_repeated(store: SeriesStore) -> None:
    limits = AdmitLimits(request_bytes_max=1000, points_max=5)

    async def body(wire: Wire) -> None:
        good = simple([1.0], wire.now_ns())
        invalid = (grpc.StatusCode.INVALID_ARGUMENT, "ingest.malformed", None)
        for malformed in (b"\xff", good[:-3], b"\x0a\x05abc"):
            assert await wire.refusal(malformed) == invalid
        assert await wire.refusal(good, sequence=None) == invalid
        assert await wire.refusal(good, sequence=0) == invalid
        assert await wire.refusal(good, incarnation="x") == invalid
        too_large = (grpc.StatusCode.RESOURCE_EXHAUSTED, "ingest.too_large", None)
        assert await wire.refusal(good + bytes(1000)) == too_large
        assert await wire.refusal(simple([1.0] * 6, wire.now_ns())) == too_large
        with pytest.raises(grpc.aio.AioRpcError) as caught:  # above gRPC's own limit: refused before it is read whole
            await wire.export(bytes(9 * 1024 * 1024))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await wire.export(good, 1)).rejected_data_points == 0  # and the service lives on

    run(store, body, limits=limits)
    assert sequence_of(store) == (1, 0, 1)


def test_nobody_ships_for_another(store: SeriesStore) -> None:
    denied = (grpc.StatusCode.PERMISSION_DENIED, "identity.mismatch", None)

    async def body(wire: Wire) -> None:
        now = wire.now_ns()
        wire.caller = Caller("agent", OTHER)
        assert await wire.refusal(simple([1.0], now)) == denied
        assert await wire.refusal(simple([1.0], now, agent=OTHER)) == denied  # own name, another's node
        assert await wire.refusal(simple([1.0], now, agent="")) == denied
        wire.caller = Caller("client", OTHER)
        assert await wire.refusal(simple([1.0], now)) == denied
        wire.caller = Caller()
        two = simple([1.0], now) + simple([1.0], now, agent=OTHER)  # concatenation merges: the second resource is foreign
        assert await wire.refusal(two) == denied
        await wire.export(simple([1.0], now), 1)
        wire.caller = Caller("agent", OTHER)
        for _ in range(3):  # also when the layout is known from its owner
            assert await wire.refusal(simple([2.0], now)) == denied

    run(store, body)
    assert sequence_of(store) == (1, 0, 1)


def test_a_node_taken_away_is_noticed_on_the_fast_path(store: SeriesStore) -> None:
    async def body(wire: Wire) -> None:
        for sequence in (1, 2, 3):
            await wire.export(simple([float(sequence)], wire.now_ns()), sequence)
        assert wire.service.shapes.hits == 1
        wire.owned.clear()
        assert (await wire.refusal(simple([4.0], wire.now_ns()), sequence=4))[1] == "identity.mismatch"
        assert wire.service.shapes.hits == 2

    run(store, body)
    assert sequence_of(store) == (3, 0, 3)


def test_foreign_client_needs_no_sequence(store: SeriesStore) -> None:
    async def body(wire: Wire) -> None:
        wire.caller = Caller("client", OTHER)
        request = ExportMetricsServiceRequest()
        metric(
            resource(request, agent="", node="", service_name="shop"), "app.requests", [({}, 3)],
            time_ns=wire.now_ns(), scope="app", counter=True,
        )  # fmt: skip
        for _ in range(2):
            assert (await wire.export(request.SerializeToString(), None)).rejected_data_points == 0

    run(store, body)
    (window,) = store.select([name_is("app_requests_total")], 0, 1 << 60)
    assert window.values.tolist() == [3.0]  # sent twice, read once
    assert window.labels["job"] == "shop"
    assert store.shipments() == []


class Stuck:
    """A store whose writer never answers."""

    def __init__(self) -> None:
        self.futures: list[Future[Receipt]] = []

    def append(self, batch: Batch) -> Future[Receipt]:
        self.futures.append(Future())
        return self.futures[-1]


class Refusing:
    """A store that is full, or whose disk is."""

    def __init__(self, code: str, *, late: bool) -> None:
        self._error, self._late = TransientError(code, "no"), late

    def append(self, batch: Batch) -> Future[Receipt]:
        if not self._late:
            raise self._error
        future: Future[Receipt] = Future()
        future.set_exception(self._error)
        return future


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("code", ["ingest.overloaded", "store.unavailable"])
def test_overload_and_full_disk_ask_for_a_retry(code: str, late: bool) -> None:
    async def body(wire: Wire) -> None:
        assert await wire.refusal(simple([1.0], wire.now_ns())) == (grpc.StatusCode.UNAVAILABLE, code, 3.0)
        assert wire.service.counters.requests_refused == {code: 1}
        assert wire.service.counters.points_accepted == 0

    run(Refusing(code, late=late), body, retry_delay_s=3.0)


def test_hung_writer_is_not_waited_for_and_requests_in_flight_are_bounded() -> None:
    stuck = Stuck()

    async def body(wire: Wire) -> None:
        began = time.monotonic()
        one, two = await asyncio.gather(
            wire.refusal(simple([1.0], wire.now_ns()), sequence=1), wire.refusal(simple([1.0], wire.now_ns()), sequence=2)
        )
        assert one == two == (grpc.StatusCode.UNAVAILABLE, "ingest.overloaded", 2.0)
        assert time.monotonic() - began < 5
        assert len(stuck.futures) == 1  # the other was over in_flight_max
        assert wire.service.counters.in_flight == 0
        stuck.futures[0].set_exception(TransientError("store.unavailable", "too late for anybody"))

    run(stuck, body, commit_timeout_s=0.3, in_flight_max=1)


def test_full_queue_of_a_real_store_refuses_without_losing_what_it_took(tmp_path: Path) -> None:
    made = open_store(tmp_path, quiet(queue_points_max=50))

    async def body(wire: Wire) -> None:
        async def ship(sequence: int) -> bool:
            try:
                await wire.export(simple([1.0] * 40, wire.now_ns()), 1, incarnation=f"00000000-0000-4000-8000-{sequence:012d}")
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.UNAVAILABLE  # noqa: PT017
                return False
            return True

        taken = await asyncio.gather(*(ship(n) for n in range(100)))
        assert any(taken)
        assert {state.stored_points for state in made.shipments()} == {40}
        assert len(made.shipments()) == sum(taken) == 100 - wire.service.counters.requests_refused["ingest.overloaded"]

    run(made, body, quota=Quota(in_flight_max=1000))
    made.close()

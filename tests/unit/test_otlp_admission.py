"""What of an OTLP request becomes which series, and who may send it."""

from __future__ import annotations

import asyncio
import gzip
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from pgherd.collector.ingest import otlp
from pgherd.collector.ingest.admit import AdmitLimits, Claim, Reason, Said, admit_times, check_claims
from pgherd.collector.ingest.http import plain
from pgherd.collector.ingest.names import label_name, metric_name
from pgherd.collector.ingest.quota import Quota
from pgherd.collector.ingest.service import Appender, Cost, MetricsService, ServiceSettings, admitted, shipment_of
from pgherd.proto.errors import DeniedError, PeerError, PgherdError, TransientError
from pgherd.proto.samples import STALE_NAN_BITS, Metric, MetricKind
from pgherd.runtime.clock import SystemClock
from support.otlp import AGENT, INCARNATION, NODE, histogram, metric, resource
from support.sampling import until

NOW_NS = 1_795_000_000_000_000_000
LIMITS = AdmitLimits()


@dataclass(frozen=True)
class Caller:
    kind: str
    id: str


SAID = Said(NODE, "shop", "db1", "db1:5432")


def owns(agent_id: str, said: Said) -> bool:
    return (agent_id, said) == (AGENT, SAID)


def test_our_agents_names_and_origin_labels_are_kept() -> None:
    request = ExportMetricsServiceRequest()
    made = resource(request)
    metric(made, "pg_stat_database_xact_commit", [({"datname": "app", "job": "spoofed"}, 5)], time_ns=NOW_NS, counter=True)
    metric(made, "pg_up", [({}, 1.0), ({"gone": "x"}, None)], time_ns=NOW_NS)
    decoded = otlp.decode(request.SerializeToString(), "agent", LIMITS)
    origin = {"job": "pgherd", "instance": "db1:5432", "cluster": "shop", "node": "db1"}
    assert [dict(labels) for labels in decoded.layout.labels] == [
        {**origin, "__name__": "pg_stat_database_xact_commit", "datname": "app", "exported_job": "spoofed"},
        {**origin, "__name__": "pg_up"},
        {**origin, "__name__": "pg_up", "gone": "x"},
    ]
    assert decoded.values.tolist()[:2] == [5.0, 1.0]
    assert decoded.values.view(np.uint64)[2] == STALE_NAN_BITS
    assert decoded.claims == {Claim(AGENT, SAID, "pgherd")}
    name = "pg_stat_database_xact_commit"
    assert decoded.layout.metrics[0] == Metric(name, MetricKind.COUNTER, f"help of {name}", "")


def test_foreign_names_are_translated() -> None:
    request = ExportMetricsServiceRequest()
    made = resource(request, agent="", node="", service_name="shop-api", service_namespace="prod")
    points = [({"http.method": "GET", "http_method": "x", "_hidden": "1", "9lives": "2", "node": "spoofed"}, 1.5)]
    metric(made, "http.server.duration", points, time_ns=NOW_NS, scope="io.otel", counter=True, unit="ms")
    (labels,) = otlp.decode(request.SerializeToString(), "client", LIMITS).layout.labels
    assert dict(labels) == {
        "__name__": "http_server_duration_milliseconds_total", "job": "prod/shop-api", "instance": "db1:5432",
        "http_method": "GET;x", "key_hidden": "1", "key_9lives": "2", "exported_node": "spoofed",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "unit", "kind", "expected"),
    [
        ("system.memory.usage", "By", "", "system_memory_usage_bytes"),
        ("requests", "{request}", "counter", "requests_total"),
        ("requests.total.count", "1", "counter", "requests_count_total"),
        ("cpu.utilization", "1", "gauge", "cpu_utilization_ratio"),
        ("disk.speed", "MBy/s", "gauge", "disk_speed_megabytes_per_second"),
        ("uptime_seconds", "s", "gauge", "uptime_seconds"),
        ("2xx", "", "counter", "_2xx_total"),
        ("weird//name..x", "widgets", "gauge", "weird_name_x_widgets"),
        ("é", "", "gauge", ""),
    ],
)
def test_metric_names(name: str, unit: str, kind: str, expected: str) -> None:
    assert metric_name(name, unit, is_counter=kind == "counter", is_gauge=kind == "gauge") == expected


def test_label_names() -> None:
    assert [label_name(key) for key in ("a.b", "1a", "__name__", "é", "")] == ["a_b", "key_1a", "key__name__", "", ""]


def test_what_cannot_be_taken_is_rejected_with_its_reason() -> None:
    request = ExportMetricsServiceRequest()
    made = resource(request)
    metric(made, "ok", [({}, 1.0)], time_ns=NOW_NS)
    delta = metric(made, "delta", [({}, 1.0), ({"x": "y"}, 2.0)], time_ns=NOW_NS, counter=True)
    delta.sum.aggregation_temporality, delta.sum.is_monotonic = 1, False
    metric(made, "not a name", [({}, 1.0)], time_ns=NOW_NS)
    metric(made, "labels", [({"bad-label": "x"}, 1.0), ({"__x": "1"}, 1.0), ({"x": "y" * 5000}, 1.0)], time_ns=NOW_NS)
    metric(made, "many", [({f"l{i}": "x" for i in range(80)}, 1.0)], time_ns=NOW_NS)
    made.scope_metrics.add().metrics.add(name="h").histogram.data_points.add(count=1)
    made.scope_metrics.add().metrics.add(name="e").exponential_histogram.data_points.add(count=1)
    for bounds, counts in (
        ([1.0], [1]),
        ([2.0, 1.0], [1, 1, 1]),
        ([float("nan")], [1, 1]),
        ([float("inf")], [1, 1]),
        ([], [0] * 600),
    ):
        histogram(made, "h", bounds, counts, time_ns=NOW_NS)
    exponential = made.scope_metrics.add().metrics.add(name="e").exponential_histogram
    exponential.aggregation_temporality = 2
    exponential.data_points.add(count=1, scale=21, time_unix_nano=NOW_NS)
    histogram(made, "late_h", [1.0], [1, 1], time_ns=1)  # five samples, one point
    metric(made, "empty", [({}, 1.0)], time_ns=NOW_NS).gauge.data_points[0].ClearField("as_double")
    metric(made, "late", [({}, 1.0)], time_ns=NOW_NS - 8 * 86400 * 10**9)
    metric(made, "early", [({}, 1.0)], time_ns=NOW_NS + 601 * 10**9)
    metric(made, "timeless", [({}, 1.0)], time_ns=0)
    decoded = otlp.decode(request.SerializeToString(), "agent", LIMITS)
    taken = admitted(decoded, None, (NOW_NS,), LIMITS)
    assert taken.rejected == {
        Reason.DELTA: 2, Reason.NAME: 1, Reason.LABELS: 4, Reason.TEMPORALITY: 2, Reason.BUCKETS: 6, Reason.NO_VALUE: 1,
        Reason.PAST: 3, Reason.FUTURE: 1,
    }  # fmt: skip
    assert (taken.batch.points, taken.batch.times_ms.tolist()) == (1, [NOW_NS // 1_000_000])


def test_time_bounds_are_closed_and_survive_extremes() -> None:
    limits = AdmitLimits(future_max_s=1.0, past_max_s=1.0)
    times = np.array([NOW_NS - 10**9, NOW_NS + 10**9, NOW_NS - 10**9 - 1, NOW_NS + 10**9 + 1, 0, (1 << 64) - 1], np.uint64)
    kept, rejected = admit_times(times, np.arange(len(times), dtype=np.int32), (NOW_NS,), limits)
    assert kept is not None
    assert kept.tolist() == [True, True, False, False, False, False]
    assert rejected == {Reason.PAST: 2, Reason.FUTURE: 2}
    assert admit_times(times[:2], np.arange(2, dtype=np.int32), (NOW_NS,), limits)[0] is None


def test_too_many_points_are_refused_whole() -> None:
    request = ExportMetricsServiceRequest()
    metric(resource(request), "x", [({}, 1.0)] * 11, time_ns=NOW_NS)
    with pytest.raises(PeerError) as caught:
        otlp.decode(request.SerializeToString(), "agent", AdmitLimits(points_max=10))
    assert caught.value.code == "ingest.too_large"


OTHER = "11111111-2222-4333-8444-555555555555"


@pytest.mark.parametrize(
    ("caller", "claim", "allowed"),
    [
        (Caller("agent", AGENT), Claim(AGENT, SAID, "pgherd"), True),
        (Caller("agent", AGENT), Claim(AGENT, Said(""), "pgherd"), True),  # about itself
        (Caller("agent", AGENT), Claim(OTHER, SAID, "pgherd"), False),
        (Caller("agent", AGENT), Claim("", SAID, "pgherd"), False),
        (Caller("agent", AGENT), Claim("", Said(""), ""), False),
        (Caller("agent", AGENT), Claim(AGENT, Said(OTHER), "pgherd"), False),
        (Caller("agent", AGENT), Claim(AGENT, Said(NODE, "shop", "db2", "db1:5432"), "pgherd"), False),
        (Caller("agent", AGENT), Claim(AGENT, Said(NODE, "shop", "db1", "db2:5432"), "pgherd"), False),
        (Caller("agent", AGENT), Claim(AGENT, Said("", instance="db2:5432"), "pgherd"), False),
        (Caller("agent", OTHER), Claim(OTHER, SAID, "pgherd"), False),
        (Caller("client", OTHER), Claim("", Said(""), "shop"), True),
        (Caller("client", AGENT), Claim(AGENT, Said(""), "shop"), False),
        (Caller("client", OTHER), Claim("", SAID, "shop"), False),
        (Caller("client", OTHER), Claim("", Said(""), "pgherd"), False),
    ],
)
def test_who_may_speak_for_whom(caller: Caller, claim: Claim, allowed: bool) -> None:
    if allowed:
        check_claims(caller, [claim], owns)
        return
    with pytest.raises(DeniedError) as caught:
        check_claims(
            caller, [Claim(caller.id, Said(""), "x") if caller.kind == "agent" else Claim("", Said(""), "x"), claim], owns
        )
    assert caught.value.code == "identity.mismatch"


def test_clients_and_nodeless_resources_get_no_node_label() -> None:
    request = ExportMetricsServiceRequest()
    metric(resource(request, agent="", node="", service_name="x"), "m", [({}, 1.0)], time_ns=NOW_NS)
    body = request.SerializeToString()
    (from_client,) = otlp.decode(body, "client", LIMITS).layout.labels
    assert dict(from_client) == {"__name__": "m", "job": "x", "instance": "db1:5432"}
    (from_agent,) = otlp.decode(body, "agent", LIMITS).layout.labels
    assert "node" not in dict(from_agent)


def test_sequence_metadata() -> None:
    agent, client = Caller("agent", AGENT), Caller("client", OTHER)
    shipment = shipment_of(agent, [("pgherd-incarnation", INCARNATION.upper()), ("pgherd-sequence", "7"), ("x-bin", b"1")])
    assert shipment is not None
    assert (shipment.agent_id, shipment.incarnation, shipment.sequence) == (AGENT, INCARNATION, 7)
    assert shipment_of(client, [("pgherd-incarnation", INCARNATION), ("pgherd-sequence", "7")]) is None
    for sequence in ("", "0", "-1", "1.5", "٣", str(1 << 63), "9" * 5000):
        with pytest.raises(PeerError):
            shipment_of(agent, [("pgherd-incarnation", INCARNATION), ("pgherd-sequence", sequence)])
    for incarnation in ("", "not-a-uuid"):
        with pytest.raises(PeerError):
            shipment_of(agent, [("pgherd-incarnation", incarnation), ("pgherd-sequence", "1")])
    with pytest.raises(PeerError):
        shipment_of(agent, None)


def test_labels_of_the_resource_have_the_same_limit_as_any() -> None:
    """Each series carries them: 2 MB of service.name over 20 000 points would be 40 GB in the store."""
    request = ExportMetricsServiceRequest()
    large = resource(request, agent="", node="", service_name="j" * (LIMITS.label_value_chars_max + 1))
    metric(large, "up", [({}, 1), ({"a": "b"}, 1)], time_ns=NOW_NS, scope="io.otel")
    metric(resource(request, agent="", node="", service_name="shop"), "up", [({}, 1)], time_ns=NOW_NS, scope="io.otel")
    decoded = otlp.decode(request.SerializeToString(), "client", LIMITS)
    assert decoded.rejected == {Reason.LABELS: 2}
    assert [dict(labels)["job"] for labels in decoded.layout.labels] == ["shop"]


def test_a_value_joined_from_many_keys_has_the_limit_of_one() -> None:
    request = ExportMetricsServiceRequest()
    made = resource(request, agent="", node="", service_name="shop")
    metric(made, "up", [({}, 1)], time_ns=NOW_NS, scope="io.otel")
    point = made.scope_metrics[0].metrics[0].gauge.data_points[0]
    for _ in range(LIMITS.label_value_chars_max):
        point.attributes.add(key="a").value.string_value = "b"
    decoded = otlp.decode(request.SerializeToString(), "client", LIMITS)
    assert decoded.rejected == {Reason.LABELS: 1}
    assert not len(decoded.series)


@pytest.mark.parametrize(
    "body",
    [
        b"\x0a\x00" * (LIMITS.containers_max + 1),  # resources
        b"\x0a\x80\x80\x08" + b"\x12\x00" * 65536,  # scopes of one
        b"\x0a\x84\x80\x08\x12\x80\x80\x08" + b"\x12\x00" * 65536,  # metrics of one
    ],
)
def test_a_request_of_nothing_but_shells_is_refused_before_it_is_walked(body: bytes) -> None:
    """Four megabytes of empty resources held a decoder for 14 s, and cost their sender no point of its quota."""
    with pytest.raises(PeerError) as caught:
        otlp.decode(body, "client", LIMITS)
    assert caught.value.code == "ingest.too_large"


def test_json_of_nothing_but_shells_is_refused_before_it_is_parsed() -> None:
    """Four kilobytes of gzip held a thread for 9 s."""
    body = gzip.compress(b'{"resourceMetrics":[' + b",".join([b"{}"] * 300_000) + b"]}")
    with pytest.raises(PeerError) as caught:
        plain(body, Cost(), compression="gzip", encoding="application/json", bytes_max=4 << 20)
    assert caught.value.code == "ingest.too_large"


def test_a_request_is_unpacked_within_its_senders_quota() -> None:
    """What inflates and parses before the quota is asked isn't limited by it."""
    unpacked: list[bytes] = []

    def unpack(body: bytes, _cost: Cost) -> bytes:
        unpacked.append(body)
        return body

    async def ask() -> None:
        for _ in range(2):
            await service.accept(b"\x0a\x00", Caller("client", "c"), None, unpack)

    quota = Quota(bytes_per_s=0.001, burst_s=1000.0)
    settings = ServiceSettings(quota=quota, hold_back_s=0.0)
    service = MetricsService(
        cast(Appender, None), current_peer=lambda _: Caller("client", "c"), owns=owns, clock=SystemClock(), settings=settings
    )
    try:
        with pytest.raises(TransientError) as caught:
            asyncio.run(ask())
    finally:
        service.close()
    assert caught.value.code == "ingest.quota"
    assert unpacked == [b"\x0a\x00"]


@pytest.mark.parametrize(
    ("body", "quota"),
    [
        (b'{"x":"' + b"x" * 200_000 + b'"}', Quota(bytes_per_s=50_000.0, burst_s=1.0)),
        (b'{"x":[' + b",".join([b"{}"] * 5_000) + b"]}", Quota(points_per_s=2_000.0, burst_s=1.0)),
        (b"{" * 150_000, Quota(points_per_s=2_000.0, burst_s=1.0)),  # refused, and yet paid for
    ],
)
def test_what_a_request_inflates_to_is_its_senders_cost(body: bytes, quota: Quota) -> None:
    """A few hundred bytes on the wire and no point at all cost nothing, and so could be sent without end."""
    wire = gzip.compress(body)
    assert len(wire) < quota.bytes_per_s
    settings = ServiceSettings(quota=quota, hold_back_s=0.0)
    service = MetricsService(
        cast(Appender, None), current_peer=lambda _: Caller("client", "c"), owns=owns, clock=SystemClock(), settings=settings
    )
    unpack = partial(plain, compression="gzip", encoding="application/json", bytes_max=4 << 20)

    async def ask() -> list[str]:
        codes = []
        for _ in range(2):
            try:
                await service.accept(wire, Caller("client", "c"), None, unpack)
                codes.append("")
            except PgherdError as error:
                codes.append(error.code)
        return codes

    try:
        codes = asyncio.run(ask())
    finally:
        service.close()
    assert codes[1] == "ingest.quota" != codes[0]


def test_refusals_that_are_held_back_are_not_in_flight() -> None:
    """64 senders with four of them each made everybody else's request `ingest.overloaded`."""
    settings = ServiceSettings(quota=Quota(bytes_per_s=1.0, burst_s=1.0), hold_back_s=30.0, in_flight_max=4)
    service = MetricsService(
        cast(Appender, None), current_peer=lambda _: Caller("client", "c"), owns=owns, clock=SystemClock(), settings=settings
    )

    async def ask() -> None:
        mad, calm = Caller("client", "mad"), Caller("client", "calm")
        await service.accept(b"\x0a\x00", mad, None)
        held = [asyncio.create_task(service.accept(b"\x0a\x00", mad, None)) for _ in range(4)]
        await until(lambda: service.counters.requests == 5, 10, "four requests to be held back")
        await service.accept(b"\x0a\x00", calm, None)
        assert not any(task.done() for task in held)
        assert service.counters.in_flight == 0
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)

    try:
        asyncio.run(ask())
    finally:
        service.close()

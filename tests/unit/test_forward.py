"""What forwarding writes: the same samples, in remote write's bytes and as OTLP."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc.aio
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgherd.collector.config import OtlpForwardConfig, RemoteWriteConfig
from pgherd.collector.exposition import forward_families, render
from pgherd.collector.forward.destination import Answer, _retry_delay_s, destination_of
from pgherd.collector.forward.forwarder import ForwardStatus
from pgherd.collector.forward.otlp import export_request
from pgherd.collector.forward.record import records
from pgherd.collector.ingest import otlp as ingest
from pgherd.collector.ingest.admit import AdmitLimits
from pgherd.proto.errors import ConfigError
from pgherd.proto.remote.v1 import remote_pb2 as pb
from pgherd.proto.samples import STALE_NAN_BITS, Metric, MetricKind
from pgherd.runtime.clock import SystemClock
from pgherd.storage.series.batch import Labels, Rows, labels_of
from support.endless import endless

BITS = st.one_of(
    st.sampled_from([STALE_NAN_BITS, 0x7FF8000000000000, 0, 1 << 63, 0x7FF0000000000000]), st.integers(0, (1 << 64) - 1)
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5)


def rows_of(series: list[Labels], points: list[tuple[int, int, int]], *metrics: Metric) -> Rows:
    """`points` are (series, time, bits of the value)."""
    return Rows(
        np.array([p[0] for p in points], np.int32),
        np.array([p[1] for p in points], np.int64),
        np.array([p[2] for p in points], np.uint64).view(np.float64),
        lambda ids: {i: series[i] for i in ids},
        {metric.name: metric for metric in metrics},
    )


@given(
    names=st.lists(st.dictionaries(TEXT, TEXT, max_size=3), min_size=1, max_size=4),
    points=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1 << 45), BITS), max_size=40),
    points_max=st.integers(1, 50),
)
def test_records_hold_every_row_in_order_bit_for_bit(
    names: list[dict[str, str]], points: list[tuple[int, int, int]], points_max: int
) -> None:
    series = [labels_of({**labels, "__name__": f"m{i}"}) for i, labels in enumerate(names)]
    points = [(s % len(series), t, v) for s, t, v in points]
    made = list(records(rows_of(series, points), points_max))
    assert [n for _, n in made] == [min(points_max, len(points) - low) for low in range(0, len(points), points_max)]
    request = pb.WriteRequest.FromString(b"".join(body for body, _ in made))  # joined they are one request
    read: dict[Labels, list[tuple[int, int]]] = {}
    for one in request.timeseries:
        labels = tuple((label.name, label.value) for label in one.labels)
        assert labels == tuple(sorted(labels))
        for sample in one.samples:
            bits = int(np.array([sample.value]).view(np.uint64)[0])
            read.setdefault(labels, []).append((sample.timestamp, bits))
    expected: dict[Labels, list[tuple[int, int]]] = {}
    for s, t, v in points:
        expected.setdefault(series[s], []).append((t, v))
    assert read == expected


AGENT_LABELS = {"job": "pgherd", "instance": "db1:5432", "cluster": "shop", "node": "db1"}
FAMILIES = (
    Metric("pg_x_total", MetricKind.COUNTER, "h"), Metric("pg_up", MetricKind.GAUGE, "h"),
    Metric("lat_seconds", MetricKind.HISTOGRAM, "h", "s"), Metric("sum_up", MetricKind.SUMMARY, "h", "s"),
)  # fmt: skip


def bits(value: float) -> int:
    return int(np.array([value]).view(np.uint64)[0])


def test_as_otlp_another_collector_stores_the_same_series() -> None:
    """Through our own ingest: every series, value and marker comes out as it went in, but for job, cluster and node."""
    names = ["pg_x_total", "pg_up", "sum_up", "sum_up_count", "odd_name", "lat_seconds_count", "lat_seconds_sum"]
    series = [labels_of({**AGENT_LABELS, "__name__": name}) for name in names]
    bounds = ["0.5", "1", "1.189207115002721", "+Inf"]
    series += [labels_of({**AGENT_LABELS, "__name__": "lat_seconds_bucket", "le": le}) for le in bounds]
    series.append(labels_of({"__name__": "foreign", "job": "prod/shop", "instance": "i", "http_method": "GET"}))
    values = [3.0, 1.0, 2.5, 7.0, -1.0, 9.0, 4.75, 2.0, 5.0, 5.0, 9.0, 0.25]
    points = [(i, 1_795_000_000_000, bits(value)) for i, value in enumerate(values)]
    points += [(i, 1_795_000_001_000, STALE_NAN_BITS) for i in range(1, len(series) - 1)]
    ((record, _),) = records(rows_of(series, points, *FAMILIES))
    request = export_request(record, "pgherd-site-a")
    kinds = {
        metric.name: metric.WhichOneof("data") for one in request.resource_metrics for metric in one.scope_metrics[0].metrics
    }
    assert kinds == {
        "pg_x_total": "sum", "pg_up": "gauge", "lat_seconds": "histogram", "sum_up": "gauge", "sum_up_count": "gauge",
        "odd_name": "gauge", "foreign": "gauge",
    }  # fmt: skip
    decoded = ingest.decode(request.SerializeToString(), "client", AdmitLimits())
    renamed = {"job": "pgherd-site-a", "instance": "db1:5432", "exported_cluster": "shop", "exported_node": "db1"}
    own = {"job", "instance", "cluster", "node"}
    expected = set()
    for place, unix_ms, value in points:
        labels = dict(series[place])
        if labels["job"] == "pgherd":
            labels = {key: text for key, text in labels.items() if key not in own} | renamed
        expected.add((labels_of(labels), unix_ms, value))
    found = {
        (decoded.layout.labels[place], time_ns // 1_000_000, value)
        for place, time_ns, value in zip(
            decoded.series.tolist(), decoded.times_ns.tolist(), decoded.values.view(np.uint64).tolist(), strict=True
        )
    }
    assert found == expected
    assert not decoded.rejected


def test_a_histogram_is_not_torn_by_a_record_s_end_and_a_torn_one_is_not_made_up() -> None:
    series = [labels_of({"__name__": "lat_seconds_bucket", "le": le}) for le in ("1", "+Inf")]
    series += [labels_of({"__name__": f"lat_seconds_{part}"}) for part in ("count", "sum")]
    points = [(i, 5, bits(2.0)) for i in range(4)]
    ((whole, count),) = records(rows_of(series, points, *FAMILIES), points_max=2)
    assert count == 4
    (metric,) = export_request(whole, "x").resource_metrics[0].scope_metrics[0].metrics
    assert list(metric.histogram.data_points[0].bucket_counts) == [2, 0]
    ((torn, _),) = records(rows_of(series, points[:1], *FAMILIES))
    (metric,) = export_request(torn, "x").resource_metrics[0].scope_metrics[0].metrics
    assert (metric.name, metric.WhichOneof("data")) == ("lat_seconds_bucket", "gauge")


def test_how_it_stands_is_told_by_destination() -> None:
    text = render(forward_families([ForwardStatus("grafana", 5, 2, 1, 4096, 1.5)]))
    assert 'pgherd_forward_sent_points_total{destination="grafana"} 5' in text
    assert 'pgherd_forward_lag_seconds{destination="grafana"} 1.5' in text
    assert render(forward_families([])) == "\n"


@pytest.mark.parametrize("secret", ["Bearer a\x00b", "Bearer a\tb", "Bearer zürich", "Bearer ab "])
def test_a_secret_that_cant_be_a_header_is_refused_and_never_shown(tmp_path: Path, secret: str) -> None:
    """Libraries quote such a value in the error of each request, and that goes into the log."""
    file = tmp_path / "token"
    file.write_text(secret + "\n")
    file.chmod(0o600)
    configs = (
        RemoteWriteConfig(name="there", url="https://there/write", header_files={"Authorization": file}),
        OtlpForwardConfig(name="there", endpoint="https://there:4317", protocol="grpc", header_files={"Authorization": file}),
    )
    for config in configs:
        with pytest.raises(ConfigError) as caught:
            destination_of(config, SystemClock())
        assert "Bearer" not in repr(caught.value.message)


@pytest.mark.parametrize("url", ["http://", "https://host:port/", "http://[::1/"])
def test_an_address_that_isnt_one_is_told_at_the_start(url: str) -> None:
    """Found out with the first request it would end the collector."""
    with pytest.raises(ConfigError):
        destination_of(RemoteWriteConfig(name="there", url=url), SystemClock())


def test_details_that_arent_a_status_dont_end_forwarding() -> None:
    refusal = grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE,
        grpc.aio.Metadata(),
        grpc.aio.Metadata(("grpc-status-details-bin", b"\xff\xff\xff")),
        None,
        None,
    )
    assert _retry_delay_s(refusal) is None


def _answer_of(port: int, timeout_s: float) -> Answer:
    config = RemoteWriteConfig(name="there", url=f"http://127.0.0.1:{port}/write", timeout=timeout_s)

    async def send() -> Answer:
        destination = destination_of(config, SystemClock())
        try:
            return await asyncio.wait_for(destination.send(b"\n\0"), 20)
        finally:
            await destination.close()

    return asyncio.run(send())


@pytest.mark.parametrize(("status", "verdict"), [(200, "sent"), (400, "refused"), (500, "retry")])
def test_an_answer_without_end_is_read_to_a_bound(status: int, verdict: str) -> None:
    with endless(status) as receiver:
        answer = _answer_of(receiver.port, 15.0)
    assert answer.verdict == verdict
    assert receiver.sent_bytes < 32 * 1024 * 1024  # the sockets' buffers hold some


def test_an_answer_that_drips_is_given_up_after_the_timeout_as_a_whole() -> None:
    with endless(drip_s=0.02) as receiver:
        answer = _answer_of(receiver.port, 0.5)
    assert (answer.verdict, answer.why.partition(":")[0]) == ("retry", "TimeoutError")

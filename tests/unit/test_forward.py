"""What forwarding writes: the same samples, in remote write's bytes and as OTLP."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pgherd.collector.exposition import forward_families, render
from pgherd.collector.forward.forwarder import ForwardStatus
from pgherd.collector.forward.otlp import export_request
from pgherd.collector.forward.record import records
from pgherd.collector.ingest import otlp as ingest
from pgherd.collector.ingest.admit import AdmitLimits
from pgherd.proto.remote.v1 import remote_pb2 as pb
from pgherd.proto.samples import STALE_NAN_BITS, Metric, MetricKind
from pgherd.storage.series.batch import Labels, Rows, labels_of

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


def test_as_otlp_another_collector_stores_the_same_series() -> None:
    names = [
        "pg_x_total",
        "pg_up",
        "lat_seconds_bucket",
        "lat_seconds_count",
        "lat_seconds_sum",
        "sum_up",
        "sum_up_count",
        "odd_name",
    ]
    series = [labels_of({**AGENT_LABELS, "__name__": name} | ({"le": "1"} if "bucket" in name else {})) for name in names]
    series.append(labels_of({"__name__": "foreign", "job": "prod/shop", "instance": "i", "http_method": "GET"}))
    points = [(i, 1_795_000_000_000, int(np.array([float(i)]).view(np.uint64)[0])) for i in range(len(series))]
    points.append((1, 1_795_000_001_000, STALE_NAN_BITS))
    ((record, _),) = records(rows_of(series, points, *FAMILIES))
    request = export_request(record, "pgherd-site-a")
    kinds = {
        metric.name: metric.WhichOneof("data") for one in request.resource_metrics for metric in one.scope_metrics[0].metrics
    }
    assert kinds == {
        "pg_x_total": "sum", "pg_up": "gauge", "lat_seconds_bucket": "sum", "lat_seconds_count": "sum", "lat_seconds_sum": "sum",
        "sum_up": "gauge", "sum_up_count": "sum", "odd_name": "gauge", "foreign": "gauge",
    }  # fmt: skip
    decoded = ingest.decode(request.SerializeToString(), "client", AdmitLimits())
    renamed = {"job": "pgherd-site-a", "instance": "db1:5432", "exported_cluster": "shop", "exported_node": "db1"}
    assert {dict(labels)["__name__"] for labels in decoded.layout.labels} == {*names, "foreign"}
    for labels in decoded.layout.labels:
        found = dict(labels)
        origin = {"job": "prod/shop", "instance": "i"} if found["__name__"] == "foreign" else renamed
        assert found.items() >= origin.items()
    assert decoded.values.view(np.uint64).tolist().count(STALE_NAN_BITS) == 1
    assert not decoded.rejected


def test_how_it_stands_is_told_by_destination() -> None:
    text = render(forward_families([ForwardStatus("grafana", 5, 2, 1, 4096, 1.5)]))
    assert 'pgherd_forward_sent_points_total{destination="grafana"} 5' in text
    assert 'pgherd_forward_lag_seconds{destination="grafana"} 1.5' in text
    assert render(forward_families([])) == "\n"

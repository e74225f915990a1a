"""Foreign exporters against the real collector: opentelemetry-sdk unmodified, and HTTP as strangers speak it."""

from __future__ import annotations

import gzip
import json
import os
import ssl
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from google.protobuf import json_format
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)

from pgherd.runtime.clock import SystemClock
from support.collector import Collector, collector
from support.otlp import metric, resource

pytestmark = pytest.mark.fault

EXPORTER = Path(__file__).resolve().parents[1] / "support" / "foreign_exporter.py"
PROTOBUF, JSON = {"content-type": "application/x-protobuf"}, {"content-type": "application/json"}
REQUEST_BYTES_MAX = 4 * 1024 * 1024


@dataclass
class Foreign:
    """A running collector and one client certificate."""

    herd: Collector
    files: Path
    viewer: dict[str, str]

    def client(self, **options: Any) -> httpx.Client:
        context = ssl.create_default_context(cafile=str(self.files / "ca.crt"))
        context.load_cert_chain(self.files / "client.crt", self.files / "client.key")
        return httpx.Client(base_url=f"https://localhost:{self.herd.ports['otlp']}", verify=context, trust_env=False, **options)

    def peak_bytes(self) -> int:
        """The most memory that the collector ever had."""
        assert self.herd.process is not None
        lines = Path(f"/proc/{self.herd.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

    def values(self, query: str) -> dict[str, float]:
        """`le` (or "") → value of an instant query."""
        with self.herd.http(headers=self.viewer) as http:
            found = http.get("/prometheus/api/v1/query", params={"query": query}).json()["data"]["result"]
        return {one["metric"].get("le", ""): float(one["value"][1]) for one in found}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Foreign]:
    files = tmp_path_factory.mktemp("client") / "shop"
    with collector() as herd:
        (herd.directory / "c.toml").write_text(
            (herd.directory / "c.toml").read_text() + "[ingest]\npoints_per_second = 1000\nburst = '1s'\n"
        )
        herd.start()
        herd.ask("clients", "issue", "shop", "--directory", str(files))
        yield Foreign(herd, files, herd.token("viewer"))
        assert herd.stop() == 0, herd.log


@pytest.mark.parametrize("temporality", ["cumulative", "delta"])
@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("histogram", ["explicit_bucket_histogram", "base2_exponential_bucket_histogram"])
def test_the_sdk_s_own_exporter_works_by_environment_alone(
    foreign: Foreign, protocol: str, temporality: str, histogram: str
) -> None:
    port = foreign.herd.ports["grpc" if protocol == "grpc" else "otlp"]
    service = f"shop-{protocol}-{temporality}-{histogram[:4]}"
    environment = {
        "PATH": os.environ["PATH"],
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"https://localhost:{port}",
        "OTEL_EXPORTER_OTLP_CERTIFICATE": str(foreign.files / "ca.crt"),
        "OTEL_EXPORTER_OTLP_CLIENT_KEY": str(foreign.files / "client.key"),
        "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE": str(foreign.files / "client.crt"),
        "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
        "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": temporality,
        "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION": histogram,
        "OTEL_SERVICE_NAME": service,
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXPORTER), protocol], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout.split(), done.stderr) == (["True", "True"], ""), done.stderr
    job = f'{{job="{service}"}}'
    assert foreign.values(f"orders_total{job}") == {"": 6.0}
    assert foreign.values(f"queue_length{job}") == {"": 4.0}
    assert foreign.values(f"temperature_celsius{job}") == {"": 21.5}
    assert foreign.values(f"checkout_latency_seconds_count{job}") == {"": 6.0}
    assert foreign.values(f"checkout_latency_seconds_sum{job}") == {"": pytest.approx(5.1)}
    buckets = foreign.values(f"checkout_latency_seconds_bucket{job}")
    assert (buckets["1"], buckets["+Inf"]) == (4.0, 6.0)
    assert len(buckets) == (3 if histogram.startswith("explicit") else 68)


def request_of(points: int = 1, name: str = "app.up") -> ExportMetricsServiceRequest:
    request = ExportMetricsServiceRequest()
    made = resource(request, agent="", node="", service_name="web")
    values = [({"i": str(i)}, 1.0) for i in range(points)]
    metric(made, name, values, time_ns=SystemClock().wall_unix_ns(), scope="web")
    return request


def test_protobuf_and_json_plain_and_compressed(foreign: Foreign) -> None:
    with foreign.client() as http:
        for number, (headers, compress) in enumerate(
            [
                (PROTOBUF, None), (PROTOBUF, ("gzip", gzip.compress)), (PROTOBUF, ("deflate", zlib.compress)),
                (JSON, None), (JSON | {"content-type": "application/json; charset=utf-8"}, ("gzip", gzip.compress)),
            ]
        ):  # fmt: skip
            request = request_of(name=f"app.number{number}")
            is_json = "json" in headers["content-type"]
            body = json_format.MessageToJson(request).encode() if is_json else request.SerializeToString()
            if compress:
                body = compress[1](body)
            encoding = {"content-encoding": compress[0]} if compress else {}
            answer = http.post("/v1/metrics", content=body, headers=headers | encoding)
            assert (answer.status_code, answer.content) == (200, b"{}" if is_json else b"")
            assert answer.headers["content-type"] == headers["content-type"].partition(";")[0]
            assert foreign.values(f"app_number{number}") == {"": 1.0}
        chunked = http.post("/v1/metrics", content=iter([request_of().SerializeToString()]), headers=PROTOBUF)
        assert chunked.status_code == 200


def test_partial_success_in_both_encodings(foreign: Foreign) -> None:
    request = request_of()
    request.resource_metrics[0].scope_metrics[0].metrics.add(name="old").gauge.data_points.add(as_double=1.0, time_unix_nano=1)
    with foreign.client() as http:
        answer = http.post("/v1/metrics", content=request.SerializeToString(), headers=PROTOBUF)
        assert answer.status_code == 200
        partial = ExportMetricsServiceResponse.FromString(answer.content).partial_success
        assert (partial.rejected_data_points, partial.error_message) == (1, "1 × timestamp too old")
        answer = http.post("/v1/metrics", content=json_format.MessageToJson(request), headers=JSON)
        assert answer.json()["partialSuccess"]["rejectedDataPoints"] == "1"


def test_what_is_refused_says_whether_to_repeat_it(foreign: Foreign) -> None:
    good = request_of().SerializeToString()
    bomb = gzip.compress(bytes(1024 * 1024 * 1024), 1)
    nested = b'{"a":' + b"[" * 100_000
    peak_before = foreign.peak_bytes()
    with foreign.client() as http:
        for content, headers, status, code in [
            (b"\xff", PROTOBUF, 400, "ingest.malformed"),
            (b"{", JSON, 400, "ingest.malformed"),
            (nested, JSON, 400, "ingest.malformed"),
            (b"[]", JSON, 400, "ingest.malformed"),
            (b"[1]", JSON, 400, "ingest.malformed"),
            (b'{"resourceMetrics": ["\\ud800"]}', JSON, 400, "ingest.malformed"),
            (b'{"resourceMetrics": 7}', JSON, 400, "ingest.malformed"),
            (b"\xff\xfe", JSON, 400, "ingest.malformed"),
            (b"no gzip", PROTOBUF | {"content-encoding": "gzip"}, 400, "ingest.malformed"),
            (gzip.compress(good)[:-4], PROTOBUF | {"content-encoding": "gzip"}, 400, "ingest.malformed"),
            (bomb[:REQUEST_BYTES_MAX], PROTOBUF | {"content-encoding": "gzip"}, 413, "ingest.too_large"),
            (bytes(REQUEST_BYTES_MAX + 1), PROTOBUF, 413, "ingest.too_large"),
            (iter([bytes(1 << 20)] * 5), PROTOBUF, 413, "ingest.too_large"),
            (good, PROTOBUF | {"content-encoding": "br"}, 415, "ingest.unsupported"),
            (good, {"content-type": "text/plain"}, 415, "ingest.unsupported"),
        ]:
            answer = http.post("/v1/metrics", content=content, headers=headers)  # type: ignore[arg-type]
            assert answer.status_code == status, (code, answer.content)
            assert "retry-after" not in answer.headers
            message = answer.json()["message"] if headers == JSON else Status.FromString(answer.content).message
            assert message.startswith(f"{code}: ")
        assert http.get("/v1/metrics").status_code == 405
        assert http.post("/v1/traces", content=good, headers=PROTOBUF).status_code == 404
        assert http.post("/v1/metrics", content=good, headers=PROTOBUF).status_code == 200, "and it lives on"
    assert foreign.peak_bytes() - peak_before < 256 * 1024 * 1024, "the bomb of 1 GiB wasn't inflated"


def test_a_client_speaks_for_no_agent(foreign: Foreign) -> None:
    request = ExportMetricsServiceRequest()
    metric(resource(request), "pg_up", [({}, 1.0)], time_ns=SystemClock().wall_unix_ns())
    with foreign.client() as http:
        assert http.post("/v1/metrics", content=request.SerializeToString(), headers=PROTOBUF).status_code == 403


def test_over_its_quota_it_is_told_when_to_come_again(foreign: Foreign, tmp_path: Path) -> None:
    foreign.herd.ask("clients", "issue", "greedy", "--directory", str(tmp_path / "greedy"))
    greedy, body = Foreign(foreign.herd, tmp_path / "greedy", {}), request_of(20_000).SerializeToString()
    with greedy.client() as http, foreign.client() as calm:
        assert http.post("/v1/metrics", content=body, headers=PROTOBUF).status_code == 200  # and 19 s of debt
        refused = http.post("/v1/metrics", content=body, headers=PROTOBUF)
        assert refused.status_code == 429
        delay_s = int(refused.headers["retry-after"])
        assert 1 <= delay_s <= 19
        status, retry = Status.FromString(refused.content), RetryInfo()
        assert [detail.Unpack(retry) for detail in status.details] == [False, True]
        assert retry.retry_delay.seconds == delay_s
        as_json = http.post("/v1/metrics", content="{}", headers=JSON)
        assert as_json.status_code == 429
        assert json.loads(as_json.content)["code"] == 14
        assert calm.post("/v1/metrics", content=request_of().SerializeToString(), headers=PROTOBUF).status_code == 200


def test_nobody_gets_in_without_a_certificate_that_still_holds(foreign: Foreign, tmp_path: Path) -> None:
    context = ssl.create_default_context(cafile=str(foreign.files / "ca.crt"))
    url = f"https://localhost:{foreign.herd.ports['otlp']}/v1/metrics"
    with httpx.Client(verify=context, trust_env=False) as bare, pytest.raises(httpx.TransportError):
        bare.post(url, content=b"", headers=PROTOBUF)
    foreign.herd.ask("clients", "issue", "gone", "--directory", str(tmp_path / "gone"))
    gone = Foreign(foreign.herd, tmp_path / "gone", {})
    with gone.client() as http:
        assert http.post("/v1/metrics", content=b"", headers=PROTOBUF).status_code == 200
        foreign.herd.ask("clients", "revoke", "gone", "--yes")
        refused = http.post("/v1/metrics", content=b"", headers=PROTOBUF)  # the same connection
        assert (refused.status_code, Status.FromString(refused.content).code) == (401, 16)

"""Forwarding through everything a receiver can do, and through kill -9 of the collector: nothing is lost, all is counted.

PGHERD_NIGHTLY=1 kills ten times instead of twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from pgherd.collector.config import ForwardConfig, OtlpForwardConfig, RemoteWriteConfig
from pgherd.collector.forward.forwarder import Forwarder, ForwardStatus, Pace
from pgherd.proto.errors import ConfigError
from pgherd.runtime.clock import SystemClock
from pgherd.storage.series.batch import Batch, layout_of
from pgherd.storage.series.store import SeriesStore
from support.collector import Collector, collector
from support.otlp import metric, resource
from support.postgres import free_port
from support.remote_receiver import TAKE, remote_receiver
from support.sampling import until
from support.series import BASE_MS, HandClock, quiet
from support.waiting import wait_until

pytestmark = pytest.mark.fault

KILLS = 10 if os.environ.get("PGHERD_NIGHTLY") else 2
QUICK = Pace(backoff_min_s=0.02, backoff_max_s=0.1, idle_poll_s=5.0)


@dataclass
class Forwarding:
    """A store with a forwarder on its tap."""

    store: SeriesStore
    forwarder: Forwarder
    clock: HandClock

    def put(self, name: str, value: float | NDArray[np.float64], count: int = 1) -> None:
        self.clock.unix_ms += 1000
        made = layout_of({"__name__": name, "i": str(i)} for i in range(count))
        columns = (
            np.arange(count, dtype=np.int32),
            np.full(count, self.clock.unix_ms, np.int64),
            np.broadcast_to(np.float64(value), count),
        )
        assert self.store.append(Batch(made, *columns)).result(10).stored_points == count

    @property
    def status(self) -> ForwardStatus:
        (one,) = self.forwarder.status()
        return one

    def send_until(self, done: Any) -> None:
        async def work() -> None:
            task = asyncio.create_task(self.forwarder.run())
            try:
                await until(done, 30, "forwarding to get there")
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

        asyncio.run(work())


@contextlib.contextmanager
def forwarding(directory: Path, port: int, **options: Any) -> Iterator[Forwarding]:
    clock = HandClock()
    one = RemoteWriteConfig(name="there", url=f"http://127.0.0.1:{port}/api/v1/write", timeout=2.0, **options)
    forwarder = Forwarder.open(directory / "forward", ForwardConfig(remote_write=(one,)), clock, QUICK)
    store = SeriesStore.open(directory / "series.duckdb", quiet(), clock, forwarder.tap)
    try:
        yield Forwarding(store, forwarder, clock)
    finally:
        store.close()
        forwarder.close()


def in_order(count: int) -> list[tuple[int, float]]:
    return [(BASE_MS + 1000 * n, float(n)) for n in range(1, count + 1)]


def test_an_outage_is_waited_out_and_what_waited_arrives_in_order(tmp_path: Path) -> None:
    port = free_port()
    with forwarding(tmp_path, port) as one:
        for n in range(1, 6):
            one.put("m", float(n))
        assert one.status.lag_s == 4.0
        with contextlib.suppress(TimeoutError):
            asyncio.run(asyncio.wait_for(one.forwarder.run(), 0.5))  # nobody listens
    with remote_receiver(port) as receiver, forwarding(tmp_path, port) as one:  # and the collector was restarted
        one.clock.unix_ms = BASE_MS + 5000
        script = [
            (503, {"Retry-After": "0"}),
            (500, {}),
            (429, {"Retry-After": "Thu, 01 Jan 1970 00:00:00 GMT"}),
            (404, {}),
            (401, {}),
        ]
        receiver.judge = lambda _request, _headers: script.pop(0) if script else TAKE
        one.put("m", 6.0)
        one.send_until(lambda: one.status.sent_points == 6)
        assert receiver.answers[:5] == [503, 500, 429, 404, 401]
        assert receiver.samples == {"m": in_order(6)}
        assert (one.status.dropped_points, one.status.failed_points, one.status.lag_s) == (0, 0, 0.0)


def test_what_is_refused_for_ever_is_set_aside_and_stops_nobody(tmp_path: Path) -> None:
    with remote_receiver() as receiver, forwarding(tmp_path, receiver.port) as one:

        def judge(request: Any, _headers: Any) -> Any:
            names = {label.value for series in request.timeseries for label in series.labels if label.name == "__name__"}
            return (400, {}) if "bad" in names else TAKE

        receiver.judge = judge
        for n in range(1, 6):
            one.put("m", float(n))
            if n == 3:
                one.clock.unix_ms -= 1000
                one.put("bad", 0.0, count=7)
        one.send_until(lambda: one.status.sent_points + one.status.failed_points == 12)
        assert receiver.samples == {"m": in_order(5)}
        assert (one.status.sent_points, one.status.failed_points) == (5, 7)
        assert len(list((tmp_path / "forward" / "there" / "set-aside").iterdir())) == 1


def test_a_queue_is_bounded_and_says_what_it_dropped(tmp_path: Path) -> None:
    with remote_receiver() as receiver, forwarding(tmp_path, receiver.port, queue_size=256 * 1024) as one:
        rng, total = np.random.default_rng(1), 0
        for _ in range(12):
            one.put("m", rng.random(5000), count=5000)
            total += 5000
        assert one.status.dropped_points > 0
        assert one.status.queue_bytes <= 256 * 1024
        one.send_until(lambda: one.status.sent_points + one.status.dropped_points == total)
        times = sorted({time for time, _ in receiver.samples["m"]})
        assert times == [BASE_MS + 1000 * n for n in range(total // 5000 - len(times) + 1, total // 5000 + 1)], (
            "the oldest went"
        )


def test_what_is_too_old_is_not_sent_any_more(tmp_path: Path) -> None:
    with remote_receiver() as receiver, forwarding(tmp_path, receiver.port, queue_age=60.0) as one:
        one.put("m", 1.0)
        one.clock.unix_ms += 61_000
        one.put("m", 2.0)
        one.send_until(lambda: one.status.sent_points == 1)
        assert [value for _, value in receiver.samples["m"]] == [2.0]
        assert one.status.dropped_points == 1


def test_headers_come_from_files(tmp_path: Path) -> None:
    secret = tmp_path / "key"
    secret.write_text("s3cret\n")
    secret.chmod(0o600)
    seen: list[str | None] = []
    with remote_receiver() as receiver, forwarding(tmp_path, receiver.port, header_files={"DD-API-KEY": secret}) as one:

        def judge(_request: Any, headers: Any) -> Any:
            seen.append({name.lower(): value for name, value in headers.items()}.get("dd-api-key"))
            return TAKE

        receiver.judge = judge
        one.put("m", 1.0)
        one.send_until(lambda: one.status.sent_points == 1)
    assert seen == ["s3cret"]


@pytest.mark.parametrize(
    ("config", "code"),
    [
        (ForwardConfig(remote_write=(RemoteWriteConfig("../x", "http://h/"),)), "config.invalid"),
        (
            ForwardConfig(remote_write=(RemoteWriteConfig("a", "http://h/"), RemoteWriteConfig("a", "http://h/"))),
            "config.invalid",
        ),
        (ForwardConfig(remote_write=(RemoteWriteConfig("a", "ftp://h/"),)), "config.invalid"),
        (ForwardConfig(otlp=(OtlpForwardConfig("a", "collector:4317", "grpc"),)), "config.invalid"),
        (
            ForwardConfig(remote_write=(RemoteWriteConfig("a", "https://h/", ca_file=Path("/none")),)),
            "config.secret_unreadable",
        ),
        (
            ForwardConfig(otlp=(OtlpForwardConfig("a", "https://h:1", "grpc", ca_file=Path("/none")),)),
            "config.secret_unreadable",
        ),
    ],
)
def test_a_bad_configuration_is_named(tmp_path: Path, config: ForwardConfig, code: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Forwarder.open(tmp_path, config, SystemClock())
    assert caught.value.code == code


# --- two real collectors ------------------------------------------------------------------------


def exporter_of(herd: Collector, files: Path) -> httpx.Client:
    context = ssl.create_default_context(cafile=str(files / "ca.crt"))
    context.load_cert_chain(files / "client.crt", files / "client.key")
    return httpx.Client(base_url=f"https://localhost:{herd.ports['otlp']}", verify=context, trust_env=False, timeout=20)


def values_at(herd: Collector, name: str, viewer: dict[str, str]) -> set[float]:
    with herd.http(headers=viewer) as http:
        found = http.get("/prometheus/api/v1/query", params={"query": f"{name}[1h]"}).json()["data"]["result"]
    return {float(value) for one in found for _, value in one["values"]}


def test_kill_9_loses_nothing_on_its_way_to_another_collector_and_to_remote_write(tmp_path: Path) -> None:
    """Acknowledged is forwarded: over OTLP/gRPC and OTLP/HTTP to a second pgherd collector, and as remote write."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    with collector() as there, collector() as here, remote_receiver() as receiver:
        there.start()
        viewer = there.token("viewer")
        there.ask("clients", "issue", "site-a", "--directory", str(tmp_path / "site-a"))
        files = "".join(
            f'{key} = "{tmp_path / "site-a" / name}"\n'
            for key, name in (("ca_file", "ca.crt"), ("certificate_file", "client.crt"), ("key_file", "client.key"))
        )
        (here.directory / "c.toml").write_text(
            (here.directory / "c.toml").read_text()
            + f'[[forward.remote_write]]\nname = "prom"\nurl = "{receiver.url}"\n'
            + f'[[forward.otlp]]\nname = "http"\nendpoint = "https://localhost:{there.ports["otlp"]}/v1/metrics"\n{files}'
            + f'[[forward.otlp]]\nname = "grpc"\nprotocol = "grpc"\nendpoint = "https://localhost:{there.ports["grpc"]}"\n{files}'
        )
        here.start()
        here.ask("clients", "issue", "app", "--directory", str(tmp_path / "app"))
        acknowledged: set[float] = set()
        number = 0
        for _ in range(KILLS):
            with exporter_of(here, tmp_path / "app") as http:
                for _ in range(rng.randrange(1, 20)):
                    number += 1
                    request = ExportMetricsServiceRequest()
                    made = resource(request, agent="", node="", service_name="app")
                    metric(made, "app.number", [({}, float(number))], time_ns=SystemClock().wall_unix_ns(), scope="app")
                    body = request.SerializeToString()
                    headers = {"content-type": "application/x-protobuf"}
                    assert http.post("/v1/metrics", content=body, headers=headers).status_code == 200, here.log
                    acknowledged.add(float(number))
            here.kill()
            here.start()
        wait_until(lambda: acknowledged <= {v for _, v in receiver.samples.get("app_number", [])}, 30, "remote write")
        wait_until(lambda: acknowledged <= values_at(there, "app_number", viewer), 30, "the other collector")
        with here.http(headers=here.token("viewer")) as http:
            lines = [line for line in http.get("/metrics").text.splitlines() if line.startswith("pgherd_forward_")]
        assert sum(float(line.split()[-1]) for line in lines if "dropped" in line or "failed" in line) == 0
        assert {line.split('"')[1] for line in lines} == {"prom", "http", "grpc"}

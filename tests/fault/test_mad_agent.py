"""One mad agent: huge requests, new series each time, as fast as it can. It is told to wait; its neighbour doesn't notice."""

from __future__ import annotations

import statistics
import threading
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

from pgherd.agent.identity.join import join_herd
from pgherd.collector.ingest.service import SERVICE
from pgherd.proto.enrolment import JoinToken
from support.collector import Collector, collector
from support.otlp import simple
from support.waiting import wait_until

pytestmark = [pytest.mark.fault, pytest.mark.slow]

SHARE, CALM_BATCHES, CALM_POINTS, MAD_POINTS, MAD_THREADS = 3000, 60, 20, 10_000, 4


@dataclass
class Sender:
    """An agent that joined, and a channel of its own."""

    herd: Collector
    state: Path
    incarnation: str = field(default_factory=lambda: str(uuid.uuid4()))
    sequence: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.identity = join_herd(self.state, JoinToken.parse(self.herd.ask("agents", "add")["token"]))
        parts = [path.read_bytes() for path in (self.identity.ca_file, self.identity.key_file, self.identity.certificate_file)]
        self.channel = grpc.secure_channel(
            f"localhost:{self.herd.ports['grpc']}",
            grpc.ssl_channel_credentials(*parts),
            options=[("grpc.use_local_subchannel_pool", 1)],
        )

    def body(self, points: int, instance: str) -> bytes:
        return simple([1.0] * points, time.time_ns(), agent=self.identity.agent_id, node="", instance=instance)

    def ship(self, body: bytes) -> None:
        """Raises grpc.RpcError."""
        with self.lock:
            self.sequence += 1
            sequence = self.sequence
        metadata = (("pgherd-incarnation", self.incarnation), ("pgherd-sequence", str(sequence)))
        self.channel.unary_unary(f"/{SERVICE}/Export", None, None)(body, timeout=30, metadata=metadata)


def calm_latencies(calm: Sender) -> list[float]:
    """Ack times of a quiet agent's batches; every one must be taken at once."""
    found = []
    for _ in range(CALM_BATCHES):
        began = time.monotonic()
        calm.ship(calm.body(CALM_POINTS, "calm"))
        found.append(time.monotonic() - began)
        time.sleep(0.02)  # its rhythm
    return found


def go_mad(mad: Sender, stop: threading.Event, answers: Counter[str], delays: list[float]) -> None:
    instance = str(uuid.uuid4())
    body = mad.body(MAD_POINTS, instance)
    while not stop.is_set():
        try:
            mad.ship(body.replace(instance.encode(), str(uuid.uuid4()).encode()))  # other series, quickly made
            answers["OK"] += 1
        except grpc.RpcError as error:
            answers[error.code().name] += 1
            trailing: Any = error.trailing_metadata()
            for detail in Status.FromString(dict(trailing)["grpc-status-details-bin"]).details:
                retry = RetryInfo()
                if detail.Unpack(retry):
                    delays.append(retry.retry_delay.ToMilliseconds() / 1000)


def test_a_mad_agent_is_told_to_wait_and_its_neighbour_does_not_notice() -> None:
    with collector() as herd:
        config = herd.directory / "c.toml"
        config.write_text(
            config.read_text() + f"[ingest]\nseries_per_sender = {SHARE}\npoints_per_second = 2000\nburst = '1s'\n"
        )
        herd.start()
        calm, mad = Sender(herd, herd.directory / "calm"), Sender(herd, herd.directory / "mad")
        calm.ship(calm.body(CALM_POINTS, "calm"))
        alone = calm_latencies(calm)
        stop, answers, delays = threading.Event(), Counter[str](), list[float]()
        threads = [threading.Thread(target=go_mad, args=(mad, stop, answers, delays)) for _ in range(MAD_THREADS)]
        for thread in threads:
            thread.start()
        try:
            beside = calm_latencies(calm)
            wait_until(lambda: answers["UNAVAILABLE"] > 4 * MAD_THREADS, 60, "the mad one to be told to wait")
        finally:
            stop.set()
            for thread in threads:
                thread.join(40)
        print(
            f"ack alone p50 {statistics.median(alone) * 1000:.1f} ms max {max(alone) * 1000:.1f} ms; beside the mad one"
            f" p50 {statistics.median(beside) * 1000:.1f} ms max {max(beside) * 1000:.1f} ms; the mad one was answered {dict(answers)}"
        )
        assert set(answers) == {"OK", "UNAVAILABLE"}
        assert answers["UNAVAILABLE"] == len(delays)
        assert min(delays) >= 1.0
        for sender in (calm, mad):
            sender.channel.close()
        assert herd.stop() == 0
        with duckdb.connect(str(herd.state / "series.duckdb"), read_only=True) as connection:
            query = "SELECT owner, count(*) FROM series WHERE name = 'pg_stat_x' GROUP BY 1"
            owned = dict(connection.execute(query).fetchall())
            stored = connection.execute(
                "SELECT count(*) FROM samples JOIN series ON id = series_id WHERE owner = ?",
                [f"agent:{calm.identity.agent_id}"],
            ).fetchone()
        assert owned == {f"agent:{calm.identity.agent_id}": CALM_POINTS, f"agent:{mad.identity.agent_id}": SHARE}
        assert stored == ((2 * CALM_BATCHES + 1) * CALM_POINTS,)

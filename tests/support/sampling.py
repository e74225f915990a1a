"""A sampler on a real server and what its batches say, decoded with the OTLP classes (not with our decoder)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from pgherd.agent.config import NodeConfig, SamplingConfig
from pgherd.agent.probes.catalog import load_catalog
from pgherd.agent.sampler import NodeSampler
from pgherd.proto.clock import Clock
from pgherd.runtime.clock import SystemClock
from pgherd.runtime.queue.spool import Spool
from support.spooling import open_spool

AGENT_ID = "11111111-1111-4111-8111-111111111111"
NODE_ID = "22222222-2222-4222-8222-222222222222"

# Short enough for tests, long enough for two loaded cores.
SAMPLING = SamplingConfig(
    interval=10.0, statement_timeout=2.0, lock_timeout=0.1, connect_timeout=2.0, answer_timeout=2.5, server_share_max=1.0
)


@dataclass(frozen=True, slots=True)
class Point:
    """One decoded point."""

    name: str
    labels: dict[str, str]
    value: float
    stale: bool
    counter: bool
    unix_ns: int
    start_unix_ns: int


@dataclass(frozen=True, slots=True)
class Decoded:
    """One decoded request."""

    resource: dict[str, str]
    points: list[Point]

    def names(self) -> set[str]:
        return {point.name for point in self.points if not point.stale}

    def find(self, name: str, **labels: str) -> list[Point]:
        return [p for p in self.points if p.name == name and not p.stale and labels.items() <= p.labels.items()]

    def value(self, name: str, **labels: str) -> float:
        found = self.find(name, **labels)
        assert len(found) == 1, f"{name}{labels}: {len(found)} points"
        return found[0].value

    def unknown(self) -> dict[str, str]:
        return {p.labels["probe"]: p.labels["reason"] for p in self.find("pgherd_probe_unknown")}


def decode(payload: bytes) -> Decoded:
    request = ExportMetricsServiceRequest.FromString(payload)
    assert len(request.resource_metrics) == 1
    resource = {a.key: a.value.string_value for a in request.resource_metrics[0].resource.attributes}
    return Decoded(resource, list(_points(request)))


def _points(request: ExportMetricsServiceRequest) -> Iterator[Point]:
    for scope in request.resource_metrics[0].scope_metrics:
        assert scope.scope.name == "pgherd.agent"
        for metric in scope.metrics:
            counter = metric.HasField("sum")
            for point in (metric.sum if counter else metric.gauge).data_points:
                labels = {a.key: a.value.string_value for a in point.attributes}
                stale = bool(point.flags & 1)
                yield Point(
                    metric.name, labels, point.as_double, stale, counter, point.time_unix_nano, point.start_time_unix_nano
                )


@dataclass(slots=True)
class Bench:
    """A sampler with its spool; `cycle` runs one cycle and decodes what it spooled."""

    sampler: NodeSampler
    spool: Spool

    def condition(self) -> str:
        """As a call: mypy may not take it for unchanged over a cycle."""
        return self.sampler.status.condition

    def role(self) -> str:
        return self.sampler.status.role

    async def cycle(self) -> Decoded:
        report = await self.sampler.cycle()
        assert report.spooled
        newest = None
        while (batch := self.spool.head()) is not None:
            newest = batch
            self.spool.release(batch, "acked")
        assert newest is not None
        decoded = decode(newest.payload)
        assert newest.points == len(decoded.points) == report.points
        return decoded


async def until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Give the event loop time until the condition holds."""
    deadline_mono_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_mono_s, f"no {what} within {timeout_s:g} s"
        await asyncio.sleep(0.01)


async def cycle_until(bench: Bench, condition: Callable[[Decoded], bool], what: str, timeout_s: float = 20.0) -> Decoded:
    """Cycles until one satisfies the condition."""
    deadline_mono_s = time.monotonic() + timeout_s
    while True:
        decoded = await bench.cycle()
        if condition(decoded):
            return decoded
        assert time.monotonic() < deadline_mono_s, f"no {what} within {timeout_s:g} s"
        await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def sampling(
    directory: Path,
    conninfo: str,
    *,
    settings: SamplingConfig = SAMPLING,
    password_file: Path | None = None,
    host: Literal["auto", "local", "remote"] = "auto",
    clock: Clock | None = None,
) -> AsyncIterator[Bench]:
    node = NodeConfig(alias="n1", cluster="c1", conninfo=conninfo, password_file=password_file, host=host)
    spool = open_spool(directory, size_max=1 << 24, segment_max=1 << 18)
    clock = clock or SystemClock()
    sampler = NodeSampler(
        agent_id=AGENT_ID, node_id=NODE_ID, node=node, sampling=settings, catalog=load_catalog(), spool=spool, clock=clock
    )
    try:
        yield Bench(sampler, spool)
    finally:
        await sampler.close()
        spool.close()

"""Walks over the databases of a real server, and what they stated."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from pgherd.agent.config import NodeConfig, RoundsConfig, SamplingConfig
from pgherd.agent.rounds.walk import Rounds
from pgherd.runtime.clock import SystemClock
from support.sampling import SAMPLING, Bench, Point, decode, sampling

GENEROUS = RoundsConfig(cost_max=1.0, series_max=100_000)


class ShiftedClock(SystemClock):
    """The system's clock, set forward at will."""

    ahead_s = 0.0

    def mono_s(self) -> float:
        return super().mono_s() + self.ahead_s


@dataclass(slots=True)
class Stated:
    """All points since the last look, the last of each series."""

    points: list[Point]

    def find(self, name: str, **labels: str) -> list[Point]:
        return [p for p in self.points if p.name == name and not p.stale and labels.items() <= p.labels.items()]

    def value(self, name: str, **labels: str) -> float:
        (point,) = self.find(name, **labels)
        return point.value

    def ended(self, name: str, **labels: str) -> list[Point]:
        return [p for p in self.points if p.name == name and p.stale and labels.items() <= p.labels.items()]

    def reasons(self) -> set[tuple[str, str, str]]:
        """(probe, reason, datname)"""
        return {(p.labels["probe"], p.labels["reason"], p.labels.get("datname", "")) for p in self.find("pgherd_probe_unknown")}


@dataclass(slots=True)
class Walker:
    bench: Bench
    rounds: Rounds
    clock: ShiftedClock

    def stated(self) -> Stated:
        """Empties the spool."""
        return stated_of(self.bench)


def stated_of(bench: Bench) -> Stated:
    """What the spool holds; empties it."""
    last: dict[tuple[str, tuple[tuple[str, str], ...]], Point] = {}
    while (batch := bench.spool.head()) is not None:
        for point in decode(batch.payload).points:
            last[point.name, tuple(sorted(point.labels.items()))] = point
        bench.spool.release(batch, "acked")
    return Stated(list(last.values()))


@contextlib.asynccontextmanager
async def walker(
    directory: Path, conninfo: str, *, rounds: RoundsConfig = GENEROUS, settings: SamplingConfig = SAMPLING
) -> AsyncIterator[Walker]:
    """A sampler that has met the server, and the rounds that share its connection."""
    async with sampling(directory, conninfo, settings=settings) as bench:
        await bench.cycle()
        clock = ShiftedClock()
        made = Rounds(
            NodeConfig("n1", "c1", conninfo),
            settings,
            rounds,
            connection=bench.sampler.connection,
            emitter=bench.sampler.emitter,
            budget=bench.sampler.budget,
            status=lambda: bench.sampler.status,
            clock=clock,
        )
        try:
            yield Walker(bench, made, clock)
        finally:
            await made.close()

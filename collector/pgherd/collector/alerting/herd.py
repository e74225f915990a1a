"""What is heard of the herd, for the alerts: facts for `known`, and heartbeats as series.

The collector writes gauges {job="pgherd", agent, agent_id} for each active agent, so that silence can be alerted on,
graphed and queried like anything else, and so that a rule over them exists exactly when an agent doesn't speak:

    pgherd_agent_heartbeat_age_seconds    since the last heartbeat, or since joining
    pgherd_agent_up                       1 heard within three heartbeats, else 0
    pgherd_agent_clock_skew_seconds       what the collector's clock is ahead of the agent's, by the last round trip
    pgherd_agent_spool_age_seconds        age of the oldest sample that waits in the agent's spool, 0 when none does

The last two are what the agent itself said last: of one that isn't heard they are unknown, hence absent. A series that
ends, also because its agent was revoked or forgotten, gets a staleness marker: its AgentSilent ends. That goes for what a former
process wrote too.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from sqlalchemy import Connection, select

from pgherd.alerts.knowledge import EVERYTHING, Knowledge, Watched, knowledge
from pgherd.collector.alerting.group import Facts
from pgherd.collector.alerting.query import Query
from pgherd.proto.clock import Clock
from pgherd.proto.errors import PgherdError
from pgherd.proto.samples import STALE_NAN, Metric, MetricKind
from pgherd.proto.selectors import NAME_LABEL, Matcher, MatchOp
from pgherd.runtime.logging import get_logger
from pgherd.storage.control.schema import agents, nodes
from pgherd.storage.control.store import ControlStore
from pgherd.storage.series.batch import Batch, Window, layout_of

_log = get_logger(__name__)

HEARTBEAT_AGE = Metric(
    "pgherd_agent_heartbeat_age_seconds", MetricKind.GAUGE, "Time since the collector last heard this agent", "s"
)
AGENT_UP = Metric("pgherd_agent_up", MetricKind.GAUGE, "Whether the agent was heard within three heartbeats")
CLOCK_SKEW = Metric(
    "pgherd_agent_clock_skew_seconds", MetricKind.GAUGE, "What the collector's clock is ahead of the agent's", "s"
)
SPOOL_AGE = Metric(
    "pgherd_agent_spool_age_seconds", MetricKind.GAUGE, "Age of the oldest sample that waits in the agent's spool", "s"
)
_METRICS = (HEARTBEAT_AGE, AGENT_UP, CLOCK_SKEW, SPOOL_AGE)

# What the agent says of itself when values are missing: a probe's, or (of the connection, or without a slot for it) all.
_TROUBLED = "pgherd_node_saturated == 1 or pgherd_probe_unknown == 1"
_CONNECTION = "connection"

_APPEND_TIMEOUT_S = 30.0
_LOOKBACK_MS = 300_000  # so long a series stands that nobody ends


class Heard(Protocol):
    """An agent that was heard lately (pgherd.collector.control.herd.LiveAgent)."""

    @property
    def heard_unix_ns(self) -> int: ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """What it said of itself: `skew_ns` (collector's clock minus its own), `spool_oldest_unix_ns` (its own clock)."""
        ...


class Herd(Protocol):
    """Who is heard (pgherd.collector.control.herd.Herd)."""

    def heard(self, agent_id: str, /) -> Heard | None:
        """None when the agent is silent."""
        ...


class Series(Protocol):
    """The store of samples (pgherd.storage.series.store.SeriesStore)."""

    def select(self, matchers: Sequence[Matcher], start_ms: int, end_ms: int, /) -> list[Window]: ...

    def append(self, batch: Batch, /) -> Future[Any]: ...


@dataclass(frozen=True, slots=True)
class AgentPulse:
    """An active agent, how long ago it was last heard, and what it said then; None is unknown."""

    id: str
    name: str
    age_s: float
    alive: bool
    skew_s: float | None = None
    spool_age_s: float | None = None

    def values(self) -> dict[Metric, float]:
        """The gauges that have a value."""
        known = {
            HEARTBEAT_AGE: self.age_s, AGENT_UP: float(self.alive), CLOCK_SKEW: self.skew_s, SPOOL_AGE: self.spool_age_s,
        }  # fmt: skip
        return {metric: value for metric, value in known.items() if value is not None}


def herd_facts(store: ControlStore, herd: Herd, query: Query, *, fresh_s: float = 60.0) -> Facts:
    """Facts from the control store, the live sessions, and `pg_up` samples no older than `fresh_s`.

    "Up" needs a sample that says so: a link that delivers nothing leaves its last value behind, and that isn't news.
    """
    # The instant selector heeds staleness markers, the range bounds the age of the last value.
    up_expr = f"pg_up == 1 and last_over_time(pg_up[{max(1, round(fresh_s))}s])"

    def instances(expr: str, at_ms: int) -> set[str]:
        return {labels.get("instance", "") for labels, _value in query(expr, at_ms)}

    def troubled(at_ms: int) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for labels, _value in query(_TROUBLED, at_ms):
            probe = labels.get("probe", _CONNECTION)
            found.setdefault(labels.get("instance", ""), set()).add(EVERYTHING if probe == _CONNECTION else probe)
        return found

    def facts(at_ms: int) -> Knowledge:
        with store.read() as connection:
            watched = watched_nodes(connection)
        alive = {one.agent_id for one in watched if herd.heard(one.agent_id) is not None}
        return knowledge(watched, alive, instances(up_expr, at_ms), troubled(at_ms))

    return facts


def watched_nodes(connection: Connection) -> list[Watched]:
    """Every node of an agent that may still speak; a revoked agent's nodes are nobody's, so their alerts may end."""
    rows = connection.execute(
        select(nodes.c.instance, nodes.c.alias, nodes.c.cluster, agents.c.name, agents.c.id)
        .join(agents, agents.c.id == nodes.c.agent_id)
        .where(agents.c.status != "revoked")
    )
    return [Watched(row.instance or "", row.alias, row.cluster, row.name, row.id) for row in rows]


def agent_pulses(connection: Connection, herd: Herd, now_unix_ns: int) -> list[AgentPulse]:
    """Every agent that isn't revoked; one that never spoke counts from its joining.

    A stamp in the future (the collector's clock was set back) is as suspicious as an old one.
    """
    rows = connection.execute(
        select(agents.c.id, agents.c.name, agents.c.joined_unix_ns, agents.c.last_heartbeat_unix_ns)
        .where(agents.c.kind == "agent", agents.c.status != "revoked")
        .order_by(agents.c.id)
    )
    pulses = []
    for row in rows:
        live = herd.heard(row.id)
        heard_unix_ns = live.heard_unix_ns if live is not None else (row.last_heartbeat_unix_ns or row.joined_unix_ns)
        told = _told(live.facts, now_unix_ns) if live is not None else (None, None)
        pulses.append(AgentPulse(row.id, row.name, abs(now_unix_ns - heard_unix_ns) / 1e9, live is not None, *told))
    return pulses


def _told(facts: Mapping[str, Any], now_unix_ns: int) -> tuple[float | None, float | None]:
    """Skew and age of the spool, in seconds, as far as an agent has told them."""
    skew_ns = facts.get("skew_ns")
    skew_s = None if skew_ns is None else skew_ns / 1e9
    if "spool_oldest_unix_ns" not in facts:  # no heartbeat yet
        return skew_s, None
    oldest_unix_ns = facts["spool_oldest_unix_ns"]
    if not oldest_unix_ns:
        return skew_s, 0.0
    return skew_s, max(0.0, (now_unix_ns - oldest_unix_ns - (skew_ns or 0)) / 1e9)


_Written = Mapping[tuple[Metric, str, str], float]


def written_of(pulses: Sequence[AgentPulse]) -> _Written:
    """Every gauge of every agent: (metric, name, id) → value."""
    return {(metric, pulse.name, pulse.id): value for pulse in pulses for metric, value in pulse.values().items()}


def heartbeat_batch(current: _Written, previous: _Written, now_unix_ns: int) -> Batch:
    """All gauges at one time, and staleness markers for those that are no longer."""
    values = {**current, **{key: STALE_NAN for key in previous if key not in current}}
    series = [
        {NAME_LABEL: metric.name, "job": "pgherd", "agent": name, "agent_id": agent_id} for metric, name, agent_id in values
    ]
    return Batch(
        layout=layout_of(series, _METRICS),
        series=np.arange(len(series), dtype=np.int32),
        times_ms=np.full(len(series), now_unix_ns // 1_000_000, dtype=np.int64),
        values=np.array(list(values.values()), dtype=np.float64),
    )


class HeartbeatSeries:
    """Writes the gauges every `interval_s`."""

    def __init__(
        self,
        store: ControlStore,
        herd: Herd,
        series: Series,
        clock: Clock,
        *,
        interval_s: float = 10.0,
    ) -> None:
        self._store = store
        self._herd = herd
        self._series = series
        self._clock = clock
        self._interval_s = interval_s
        self._written: _Written | None = None  # None: to be read from the store

    async def run(self) -> None:
        """Write until cancelled. A turn that fails is a gap, and the next is tried."""
        while True:
            try:
                await self.write()
            except (PgherdError, TimeoutError) as error:
                _log.warning("alert.heartbeats_not_written", error=str(error))
            await asyncio.sleep(self._interval_s)

    async def write(self) -> int:
        """Write one turn and wait until it is durable; returns the number of agents. Raises PgherdError, TimeoutError."""
        now_unix_ns = self._clock.wall_unix_ns()
        pulses = await asyncio.to_thread(self._pulses, now_unix_ns)
        current = written_of(pulses)
        before = await asyncio.to_thread(self._standing, now_unix_ns // 1_000_000) if self._written is None else self._written
        if current or before:
            batch = heartbeat_batch(current, before, now_unix_ns)
            await asyncio.wait_for(asyncio.wrap_future(self._series.append(batch)), _APPEND_TIMEOUT_S)
        self._written = current
        return len(pulses)

    def _pulses(self, now_unix_ns: int) -> list[AgentPulse]:
        with self._store.read() as connection:
            return agent_pulses(connection, self._herd, now_unix_ns)

    def _standing(self, now_ms: int) -> _Written:
        """What a former process wrote and nobody has ended."""
        found: dict[tuple[Metric, str, str], float] = {}
        for metric in _METRICS:
            mine = [Matcher(NAME_LABEL, MatchOp.EQUAL, metric.name), Matcher("job", MatchOp.EQUAL, "pgherd")]
            for window in self._series.select(mine, now_ms - _LOOKBACK_MS, now_ms):
                if not math.isnan(window.values[-1]):
                    found[metric, window.labels.get("agent", ""), window.labels.get("agent_id", "")] = float(window.values[-1])
        return found

"""One node's sampling cycle: ask, convert, spool; and the loop that repeats it.

A cycle always produces a batch, whatever the server does: `pg_up` and the agent's own figures are known
even when PostgreSQL is not. What can't be read is absent, carries a NO_RECORDED_VALUE point once, and is
named by `pgherd_probe_unknown{probe,reason}`. All points of a cycle have one timestamp, taken before the
first question.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

from pgherd.agent.config import NodeConfig, SamplingConfig
from pgherd.agent.node import Condition, NodeStatus, Role
from pgherd.agent.probes.catalog import Catalog, Probe
from pgherd.agent.probes.connection import NodeConnection, Rows, instance_label
from pgherd.agent.probes.disk import DiskProbe
from pgherd.agent.probes.host import HostProbe
from pgherd.agent.probes.local import LocalProbe
from pgherd.agent.probes.own import OwnFigures
from pgherd.agent.probes.places import PLACES_SQL
from pgherd.agent.probes.rows import samples_of, unknown_reason
from pgherd.agent.telemetry.convert import Series, Source, encode, series_of, vanished
from pgherd.agent.telemetry.spool import Spool
from pgherd.proto.clock import Clock
from pgherd.proto.errors import PgherdError
from pgherd.proto.samples import Metric, MetricKind, Sample
from pgherd.runtime.logging import get_logger

_SLOW_TIER_S: Final = 60.0
_BUDGET_SHARE: Final = 0.8  # of the interval: a slow server costs probes, not the rhythm

_GAUGE, _COUNTER = MetricKind.GAUGE, MetricKind.COUNTER
UP: Final = Metric("pg_up", _GAUGE, "Whether the last sampling could connect to the server")
SATURATED: Final = Metric("pgherd_node_saturated", _GAUGE, "Whether the server is up but has no connection slot for the agent")
CONDITION: Final = Metric("pgherd_node_condition", _GAUGE, "1 for the condition the node was found in")
SCRAPE_DURATION: Final = Metric("pg_exporter_last_scrape_duration_seconds", _GAUGE, "Duration of the last sampling", "s")
SCRAPE_ERROR: Final = Metric("pg_exporter_last_scrape_error", _GAUGE, "Whether the last sampling had an error (1) or not (0)")
PROBE_DURATION: Final = Metric("pgherd_probe_duration_seconds", _GAUGE, "Duration of the probe's last answer", "s")
PROBE_ERRORS: Final = Metric("pgherd_probe_errors_total", _COUNTER, "Failed probes since the agent's start, by code")
PROBE_UNKNOWN: Final = Metric("pgherd_probe_unknown", _GAUGE, "1 while a probe can't know a value, with the reason")
SKIPPED: Final = Metric(
    "pgherd_sampling_cycles_skipped_total", _COUNTER, "Cycles left out because the one before took too long"
)
ATTEMPTS: Final = Metric("pgherd_connection_attempts_total", _COUNTER, "Connections that the sampler tried to open")

_IDENTITY_SQL: Final = """
SELECT pg_is_in_recovery() AS standby, current_setting('server_version_num')::int AS version,
       (SELECT system_identifier::text FROM pg_control_system()) AS system_identifier
"""

_CONDITION_OF_CODE: Final[dict[str, Condition]] = {
    "postgres.unreachable": "down",
    "postgres.saturated": "saturated",
    "postgres.auth": "auth_failed",
    "postgres.privilege": "auth_failed",
    "config.secret_unreadable": "auth_failed",
    "postgres.timeout": "hung",
}

_log = get_logger(__name__)


@dataclass(slots=True)
class _Cycle:
    """What one cycle has gathered so far."""

    samples: list[Sample] = field(default_factory=list)
    unknown: dict[tuple[str, str], None] = field(default_factory=dict)  # (probe, reason), ordered
    failed: bool = False


@dataclass(frozen=True, slots=True)
class CycleReport:
    """How a cycle went: for status files, tests and the bench."""

    unix_ns: int
    duration_s: float
    points: int
    condition: Condition
    spooled: bool


class NodeSampler:
    """Samples one node into the spool. `run` it as a task; read `status` at any time."""

    def __init__(
        self,
        *,
        agent_id: str,
        node_id: str,
        node: NodeConfig,
        sampling: SamplingConfig,
        catalog: Catalog,
        spool: Spool,
        clock: Clock,
        on_spooled: Callable[[], None] = lambda: None,
        disk: DiskProbe | None = None,
        host: HostProbe | None = None,
    ) -> None:
        self._node = node
        self._sampling = sampling
        self._catalog = catalog
        self._spool = spool
        self._clock = clock
        self._on_spooled = on_spooled
        self._local = LocalProbe(node, disk or DiskProbe(sampling.answer_timeout), host or HostProbe(clock))
        self._located_mono_s = float("-inf")
        self._own = OwnFigures()
        self._connection = NodeConnection(node, sampling, clock)
        instance = instance_label(node, socket.gethostname(), os.environ)
        self._source = Source(agent_id, node_id, node.alias, node.cluster, instance)
        self.status = NodeStatus(node_id, node.alias, node.cluster, instance)
        self._alive: Series = {}  # what has a value now, asked in this cycle or, in the slow tier, lately
        self._slow: dict[str, list[Sample]] = {}  # the slow tier's last answers
        self._slow_due_mono_s: dict[str, float] = {}
        self._errors: dict[tuple[str, str], int] = {}
        self._skipped = 0
        self._started_unix_ns = clock.wall_unix_ns()

    # ---- the loop

    async def run(self) -> None:
        """Sample every interval until cancelled. Ends only by cancellation; an unforeseen error costs one cycle."""
        interval_s = self._sampling.interval
        due_mono_s = self._clock.mono_s()
        try:
            while True:
                try:
                    await self.cycle()
                except Exception:  # noqa: BLE001 - the loop's guard: sampling goes on whatever one cycle met
                    _log.exception("sampling.cycle_failed", node=self._node.alias)
                due_mono_s += interval_s
                late_s = self._clock.mono_s() - due_mono_s
                if late_s > 0:
                    missed = int(late_s // interval_s) + 1
                    self._skipped += missed
                    due_mono_s += missed * interval_s
                await asyncio.sleep(max(0.0, due_mono_s - self._clock.mono_s()))
        finally:
            await self.close()

    async def close(self) -> None:
        """End the connection."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._connection.close(), 5.0)

    async def cycle(self) -> CycleReport:
        """One cycle: sample, encode, spool."""
        unix_ns, started_mono_s = self._clock.wall_unix_ns(), self._clock.mono_s()
        cycle = _Cycle()
        condition = await self._ask(cycle, started_mono_s)
        await self._ask_host(cycle)
        duration_s = self._clock.mono_s() - started_mono_s
        if condition != self.status.condition:
            _log.info("node.condition_changed", node=self._node.alias, condition=condition, before=self.status.condition)
        role: Role = self.status.role if condition == "up" else "unknown"
        self.status = replace(self.status, condition=condition, role=role, observed_unix_ns=unix_ns)
        cycle.samples += self._own_samples(cycle, condition, duration_s)
        current = series_of(cycle.samples)
        alive = current | series_of(sample for samples in self._slow.values() for sample in samples)
        stale = vanished(self._alive, alive)
        payload = encode(self._source, current, stale, unix_ns)
        points = len(current) + len(stale)
        spooled = await asyncio.to_thread(self._spool.append, payload, points)
        self._alive = alive
        self._on_spooled()
        return CycleReport(unix_ns, duration_s, points, condition, spooled)

    # ---- asking

    async def _ask(self, cycle: _Cycle, started_mono_s: float) -> Condition:
        try:
            identity = await self._identify()
        except PgherdError as error:
            self._failed(cycle, "connection", error)
            self._forget_slow()
            return _CONDITION_OF_CODE.get(error.code, "unknown")
        row = identity[0]
        version = int(row["version"])
        role: Role = "standby" if row["standby"] else "primary"
        if (version, role) != (self.status.server_version_num, self.status.role):
            self._forget_slow()  # another server answers there, or the same in another role
        self.status = replace(
            self.status, server_version_num=version, role=role, system_identifier=str(row["system_identifier"] or "")
        )
        deadline_mono_s = started_mono_s + _BUDGET_SHARE * max(self._sampling.interval, self._sampling.statement_timeout)
        for probe in self._catalog.for_major(version // 10000):
            lost = await self._probe(cycle, probe, deadline_mono_s)
            if lost is not None:
                self._forget_slow()
                return lost
        await self._locate(cycle)
        return "up"

    async def _identify(self) -> Rows:
        """Who answers there now. A connection that died since the last cycle is replaced once."""
        fresh = await self._connection.open()
        try:
            if fresh:
                await self._forbid_idle_timeout()
            return await self._connection.fetch(_IDENTITY_SQL)
        except PgherdError as error:
            if fresh or error.code != "postgres.unreachable":
                raise
        await self._connection.open()
        return await self._connection.fetch(_IDENTITY_SQL)

    async def _forbid_idle_timeout(self) -> None:
        """A role's idle_session_timeout (14+) would cut our connection between any two cycles."""
        await self._connection.fetch(
            "SELECT set_config(name, '0', false) FROM pg_settings WHERE name = 'idle_session_timeout' AND setting <> '0'"
        )

    async def _probe(self, cycle: _Cycle, probe: Probe, deadline_mono_s: float) -> Condition | None:
        """Ask one probe; the node's condition when the connection is gone and asking on is pointless."""
        now_mono_s = self._clock.mono_s()
        if probe.tier == "slow" and now_mono_s < self._slow_due_mono_s.get(probe.name, 0.0):
            return None
        if now_mono_s > deadline_mono_s:
            cycle.unknown[probe.name, "cycle_budget"] = None
            return None
        try:
            rows = await self._connection.fetch(probe.sql)
            samples = samples_of(probe, rows)
            reason = unknown_reason(probe, rows)
        except PgherdError as error:
            self._slow.pop(probe.name, None)
            self._failed(cycle, probe.name, error)
            return None if self._connection.connected else _CONDITION_OF_CODE.get(error.code, "down")
        if reason:
            cycle.unknown[probe.name, reason] = None
        cycle.samples.append(Sample(PROBE_DURATION, {"probe": probe.name}, self._clock.mono_s() - now_mono_s))
        cycle.samples += samples
        if probe.tier == "slow":
            self._slow[probe.name] = samples
            self._slow_due_mono_s[probe.name] = now_mono_s + _SLOW_TIER_S
        return None

    async def _locate(self, cycle: _Cycle) -> None:
        """Learn where the server's files are; they move seldom, and what was known is kept when this fails."""
        if self._clock.mono_s() < self._located_mono_s + _SLOW_TIER_S:
            return
        endpoint = self._connection.endpoint
        try:
            rows = await self._connection.fetch(PLACES_SQL)
        except PgherdError as error:
            self._failed(cycle, "places", error)
            return
        if endpoint is not None:
            self._local.locate(rows, endpoint.host, endpoint.hostaddr)
        self._located_mono_s = self._clock.mono_s()

    async def _ask_host(self, cycle: _Cycle) -> None:
        samples, unknown = await self._local.sample()
        cycle.samples += samples
        for probe, reason in unknown.items():
            cycle.unknown[probe, reason] = None

    # ---- the agent's own samples

    def _failed(self, cycle: _Cycle, probe: str, error: PgherdError) -> None:
        phase = str(error.context.get("phase") or "")
        reason = f"{error.code}.{phase}" if phase else error.code
        cycle.failed = True
        cycle.unknown[probe, reason] = None
        count = self._errors.get((probe, error.code), 0) + 1
        self._errors[probe, error.code] = count
        if count in (1, 10, 100) or count % 1000 == 0:
            _log.warning("probe.failed", node=self._node.alias, probe=probe, code=error.code, why=error.message, count=count)

    def _forget_slow(self) -> None:
        self._slow.clear()
        self._slow_due_mono_s.clear()
        self._located_mono_s = float("-inf")

    def _own_samples(self, cycle: _Cycle, condition: Condition, duration_s: float) -> list[Sample]:
        reachable = condition in ("up", "saturated")
        return [
            Sample(UP, {}, 1.0 if reachable else 0.0),
            Sample(SATURATED, {}, 1.0 if condition == "saturated" else 0.0),
            Sample(CONDITION, {"condition": condition}, 1.0),
            Sample(SCRAPE_DURATION, {}, duration_s),
            Sample(SCRAPE_ERROR, {}, 1.0 if cycle.failed else 0.0),
            Sample(SKIPPED, {}, float(self._skipped), self._started_unix_ns),
            Sample(ATTEMPTS, {}, float(self._connection.attempts), self._started_unix_ns),
            *(Sample(PROBE_UNKNOWN, {"probe": probe, "reason": reason}, 1.0) for probe, reason in cycle.unknown),
            *(
                Sample(PROBE_ERRORS, {"probe": probe, "code": code}, float(count), self._started_unix_ns)
                for (probe, code), count in self._errors.items()
            ),
            *self._own.samples(self._spool.status),
        ]

"""One node's sampling: ask what is due, convert, spool; and the loop that repeats it.

A tick is one pipeline over the node's connection and one batch with one timestamp, taken before the first
question. It asks the probes that are due: the live tier at every tick, the others at their own pace. A tick always
produces a batch, whatever the server does: `pg_up` and the agent's own figures are known even when PostgreSQL is not.
What can't be read is absent, carries a NO_RECORDED_VALUE point once, and is named by
`pgherd_probe_unknown{probe,reason}`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from pgherd.agent.config import NodeConfig, SamplingConfig
from pgherd.agent.node import Condition, NodeStatus, Role
from pgherd.agent.probes.budget import SHED_ORDER, Budget
from pgherd.agent.probes.catalog import TESTED_MAJORS, Catalog, Probe, Tier
from pgherd.agent.probes.connection import Answer, NodeConnection, instance_label
from pgherd.agent.probes.disk import DiskProbe
from pgherd.agent.probes.host import HostProbe
from pgherd.agent.probes.local import LocalProbe
from pgherd.agent.probes.own import OwnFigures
from pgherd.agent.probes.pipeline import Question
from pgherd.agent.probes.places import PLACES_SQL
from pgherd.agent.probes.rhythm import Rhythm
from pgherd.agent.probes.rows import samples_of, unknown_reason, unknown_sample
from pgherd.agent.telemetry.convert import Source
from pgherd.agent.telemetry.emit import Emitter
from pgherd.proto.clock import Clock
from pgherd.proto.errors import PgherdError
from pgherd.proto.samples import Metric, MetricKind, Sample
from pgherd.runtime.logging import get_logger
from pgherd.runtime.queue.spool import Spool

_LATENCY_INTERVAL_S: Final = 0.1
_SEND_SHARE: Final = 0.8  # of the interval: a slow server costs probes, not the rhythm

# Sources of samples that aren't probes (see telemetry/emit.py).
_NODE: Final = "node"  # whether the server answers: every tick
_AGENT: Final = "agent"  # the agent's own figures: every cycle, and not about the server
_HOST: Final = "host"  # volumes and machine: every cycle, and not about the server
_IDENTITY: Final = "identity"
_PLACES: Final = "places"

_GAUGE, _COUNTER = MetricKind.GAUGE, MetricKind.COUNTER
UP: Final = Metric("pg_up", _GAUGE, "Whether the last sampling could connect to the server")
SATURATED: Final = Metric("pgherd_node_saturated", _GAUGE, "Whether the server is up but has no connection slot for the agent")
CONDITION: Final = Metric("pgherd_node_condition", _GAUGE, "1 for the condition the node was found in")
SCRAPE_DURATION: Final = Metric("pg_exporter_last_scrape_duration_seconds", _GAUGE, "Duration of the last sampling", "s")
SCRAPE_ERROR: Final = Metric("pg_exporter_last_scrape_error", _GAUGE, "Whether the last sampling had an error (1) or not (0)")
PROBE_DURATION: Final = Metric("pgherd_probe_duration_seconds", _GAUGE, "Duration of the probe's last answer", "s")
PROBE_ERRORS: Final = Metric("pgherd_probe_errors_total", _COUNTER, "Failed probes since the agent's start, by code")
TESTED: Final = Metric(
    "pgherd_server_tested",
    _GAUGE,
    "1 for a major version that this agent was tested with; 0: newest or oldest known SQL is used",
)
SKIPPED: Final = Metric("pgherd_sampling_cycles_skipped_total", _COUNTER, "Ticks left out because the one before took too long")
SERVER_SECONDS: Final = Metric(
    "pgherd_sampling_server_seconds_total", _COUNTER, "Server time that sampling caused, by tier", "s"
)
SERVER_CPU: Final = Metric(
    "pgherd_sampling_server_cpu_seconds_total",
    _COUNTER,
    "CPU time that the sampling connection's backends used (local servers only)",
    "s",
)
SHED: Final = Metric("pgherd_sampling_shed", _GAUGE, "1 while a tier is left out because sampling costs the server too much")
BUDGET_RATIO: Final = Metric(
    "pgherd_sampling_budget_ratio", _GAUGE, "Price of the running tiers as a part of the budget (sampling.server_share_max)"
)
ATTEMPTS: Final = Metric("pgherd_connection_attempts_total", _COUNTER, "Connections that the sampler tried to open")

_IDENTITY_SQL: Final = """
SELECT current_setting('server_version_num')::int AS version,
       (SELECT system_identifier::text FROM pg_control_system()) AS system_identifier
"""
# A role's idle_session_timeout (14+) would cut our connection between any two ticks.
_IDLE_SQL: Final = "SELECT set_config(name, '0', false) FROM pg_settings WHERE name = 'idle_session_timeout' AND setting <> '0'"
_ROLE: Final = Question("SELECT pg_is_in_recovery() AS standby")

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
class _Tick:
    """What one tick has gathered so far, by source."""

    started_mono_s: float
    stated: dict[str, list[Sample]] = field(default_factory=dict)
    failed: bool = False

    def unknown(self, probe: str, reason: str, *, source: str = "", grant: str = "") -> None:
        """The probe can't know a value; `grant` is what the role would need."""
        self.stated.setdefault(source or probe, []).append(unknown_sample(probe, reason, grant))


@dataclass(frozen=True, slots=True)
class TickReport:
    """How a tick went: for tests and the bench."""

    unix_ns: int
    duration_s: float
    points: int
    condition: Condition
    spooled: bool


class NodeSampler:
    """Samples one node into the spool. `run` it as a task; read `status` at any time.

    `connection`, `emitter` and `budget` are the node's only ones; its other samplers use them too.
    """

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
        self._local = LocalProbe(node, disk or DiskProbe(sampling.answer_timeout), host or HostProbe(clock))
        self._located_mono_s = float("-inf")
        self._own = OwnFigures()
        instance = instance_label(node, socket.gethostname(), os.environ)
        self.connection = NodeConnection(node, sampling, clock)
        self.emitter = Emitter(Source(agent_id, node_id, node.alias, node.cluster, instance), spool, on_spooled)
        self.status = NodeStatus(node_id, node.alias, node.cluster, instance)
        self._tick_s = min(sampling.live_interval, sampling.interval)
        slow_s = max(sampling.slow_interval, sampling.interval)
        intervals_s = {"live": self._tick_s, "cycle": sampling.interval, "slow": slow_s}
        self._rhythm = Rhythm(intervals_s)
        others_s = {"tables": max(sampling.rare_interval, slow_s), "statements": slow_s, "latency": _LATENCY_INTERVAL_S}
        self.budget = Budget(sampling.server_share_max, {**intervals_s, **others_s})
        self._planned: set[Tier] = set()  # tiers that this connection has asked before
        self._another_server = False  # than the one whose series live
        self._cycle_due_mono_s = clock.mono_s()
        self._errors: dict[tuple[str, str], int] = {}
        self._skipped = 0
        self._started_unix_ns = clock.wall_unix_ns()

    # ---- the loop

    async def run(self) -> None:
        """Tick until cancelled. Ends only by cancellation; an unforeseen error costs one tick."""
        due_mono_s = self._clock.mono_s()
        try:
            while True:
                try:
                    await self.tick()
                except Exception:  # noqa: BLE001 - the loop's guard: sampling goes on whatever one tick met
                    _log.exception("sampling.tick_failed", node=self._node.alias)
                period_s = self._tick_s if self.budget.allows("live") else self._sampling.interval
                due_mono_s += period_s
                late_s = self._clock.mono_s() - due_mono_s
                if late_s > 0:
                    missed = int(late_s // period_s) + 1
                    self._skipped += missed
                    due_mono_s += missed * period_s
                await asyncio.sleep(max(0.0, due_mono_s - self._clock.mono_s()))
        finally:
            await self.close()

    async def close(self) -> None:
        """End the connection."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.connection.close(), 5.0)

    async def cycle(self) -> TickReport:
        """A tick in which the cycle is due now; slow probes keep their own pace."""
        self._cycle_due_mono_s = self._clock.mono_s()
        self._rhythm.hasten(("live", "cycle"))
        return await self.tick()

    async def tick(self) -> TickReport:
        """Ask what is due, encode, spool."""
        unix_ns, now_mono_s = self._clock.wall_unix_ns(), self._clock.mono_s()
        tick = _Tick(now_mono_s)
        cycle_due = now_mono_s >= self._cycle_due_mono_s - self._tick_s / 2
        condition = await self._ask(tick)
        if cycle_due:
            if condition == "up":
                tick.stated[_IDENTITY] = [version_sample(self.status.server_version_num)]
            await self._ask_host(tick)
        if condition != "up":
            self._forget()
        if condition != "up" or self._another_server:
            self._another_server = False
            for source in self.emitter.about_server():
                tick.stated.setdefault(source, [])
        if condition != self.status.condition:
            _log.info("node.condition_changed", node=self._node.alias, condition=condition, before=self.status.condition)
        role: Role = self.status.role if condition == "up" else "unknown"
        self.status = replace(self.status, condition=condition, role=role, observed_unix_ns=unix_ns)
        duration_s = self._clock.mono_s() - now_mono_s
        tick.stated[_NODE] = [*tick.stated.get(_NODE, []), *self._node_samples(condition)]
        if cycle_due:
            self._cycle_due_mono_s = max(self._cycle_due_mono_s, now_mono_s - self._tick_s) + self._sampling.interval
            tick.stated[_AGENT] = self._own_samples(tick, duration_s)
        emitted = await self.emitter.emit(tick.stated, unix_ns)
        return TickReport(unix_ns, duration_s, emitted.points, condition, emitted.spooled)

    # ---- asking

    async def _ask(self, tick: _Tick) -> Condition:
        """Ask the server what is due; the node's condition."""
        try:
            await self._connect()
            asked = await self._round(tick, retry=True)
            if asked is None:  # another role than a moment ago: all of it anew
                self._forget()
                tick.stated.clear()
                await self._round(tick, retry=False)
            await self._locate(tick)
        except PgherdError as error:
            self._failed(tick, "connection", error, source=_NODE)
            return _CONDITION_OF_CODE.get(error.code, "unknown")
        return "up"

    async def _connect(self) -> None:
        """Make sure that there is a connection, and know who answers there. Raises PgherdError."""
        if not await self.connection.open():
            return
        self._planned.clear()
        await self.connection.fetch(_IDLE_SQL)
        (row,) = await self.connection.fetch(_IDENTITY_SQL)
        version, identifier = int(row["version"]), str(row["system_identifier"] or "")
        if (version, identifier) != (self.status.server_version_num, self.status.system_identifier):
            self._forget()
            self._another_server = True
        self.status = replace(self.status, server_version_num=version, system_identifier=identifier)

    async def _round(self, tick: _Tick, *, retry: bool) -> bool | None:
        """One pipeline with all that is due; None when the server's role has changed. Raises PgherdError when it is lost."""
        probes = self._due(tick)
        limit_s = _SEND_SHARE * max(self._sampling.interval, self._sampling.statement_timeout)
        send_for_s = tick.started_mono_s + limit_s - self._clock.mono_s()
        questions = [_ROLE, *(Question(probe.sql) for probe in probes)]
        role_answer, *answers = await self.connection.fetch_many(questions, send_for_s=send_for_s)
        self._pay(["live", *(probe.tier for probe in probes)], [role_answer, *answers])
        if role_answer.error is not None:
            if retry and role_answer.error.code == "postgres.unreachable":  # died since the last tick: replaced once
                await self._connect()
                return await self._round(tick, retry=False)
            raise role_answer.error
        role: Role = "standby" if role_answer.rows[0]["standby"] else "primary"
        changed = self.status.role not in (role, "unknown")
        self.status = replace(self.status, role=role)
        if changed and self.connection.connected:
            return None
        for probe, answer in zip(probes, answers, strict=True):
            self._take(tick, probe, answer)
        lost = next((answer.error for answer in answers if answer.error is not None), None)
        if lost is not None and not self.connection.connected:  # it may also fall right after its last answer
            raise lost
        return True

    def _forget(self) -> None:
        """Another server answers there, or the same in another role, or none: all is asked anew."""
        self._rhythm.forget()
        self._located_mono_s = float("-inf")

    def _due(self, tick: _Tick) -> list[Probe]:
        """The probes to ask now; those of a shed tier say so instead."""
        probes = self._rhythm.due(self._catalog.for_major(self.status.server_version_num // 10000), self._clock.mono_s())
        asked = []
        for probe in probes:
            if probe.tier == "live" or self.budget.allows(probe.tier):
                asked.append(probe)
                continue
            tick.stated[probe.name] = []
            tick.unknown(probe.name, "shed")
            self._rhythm.answered(probe, self._clock.mono_s())
        return asked

    def _pay(self, tiers: Sequence[Tier], answers: Sequence[Answer]) -> None:
        """Book what a pipeline cost the server, a tier at a time.

        A lock that didn't come within its timeout cost a place in a queue: the rhythm leaves that probe alone, its tier stays.
        """
        now_mono_s = self._clock.mono_s()
        costs: dict[Tier, float] = {}
        for tier, answer in zip(tiers, answers, strict=True):
            waited = answer.error is not None and answer.error.context.get("phase") == "lock"
            costs[tier] = costs.get(tier, 0.0) + (0.0 if waited else answer.cost_s)
        before = self.budget.shed
        for tier, cost_s in costs.items():
            self.budget.spent(tier, cost_s, now_mono_s, is_first=tier not in self._planned)
        self._planned |= costs.keys()
        if self.budget.shed != before:
            _log.warning("sampling.shed_changed", node=self._node.alias, shed=list(self.budget.shed), before=list(before))

    def _take(self, tick: _Tick, probe: Probe, answer: Answer) -> None:
        """One probe's answer into the tick; its next time into the rhythm."""
        now_mono_s = self._clock.mono_s()
        error = answer.error
        if error is None:
            self._rhythm.answered(probe, now_mono_s)
            samples = samples_of(probe, answer.rows)
            samples.append(Sample(PROBE_DURATION, {"probe": probe.name}, answer.duration_s))
            tick.stated[probe.name] = samples
            if reason := unknown_reason(probe, answer.rows):
                tick.unknown(probe.name, reason, grant=probe.grant if reason.endswith("_hidden") else "")
        elif error.context.get("phase") == "unasked":
            tick.stated[probe.name] = []
            tick.unknown(probe.name, "cycle_budget")
        else:
            tick.stated[probe.name] = []
            self._failed(tick, probe.name, error, grant=probe.grant if error.code == "postgres.privilege" else "")
            if error.context.get("phase") in ("statement", "lock"):
                self._rhythm.timed_out(probe, now_mono_s)
            else:
                self._rhythm.answered(probe, now_mono_s)

    async def _locate(self, tick: _Tick) -> None:
        """Learn where the server's files are; they move seldom, and what was known is kept when this fails."""
        if self._clock.mono_s() < self._located_mono_s + self._sampling.slow_interval:
            return
        endpoint = self.connection.endpoint
        tick.stated[_PLACES] = []
        (answer,) = await self.connection.fetch_many([Question(PLACES_SQL)])
        self._pay(["slow"], [answer])
        if answer.error is not None:
            self._failed(tick, _PLACES, answer.error)
            return
        if endpoint is not None:
            self._local.locate(answer.rows, endpoint.host, endpoint.hostaddr)
        self._located_mono_s = self._clock.mono_s()

    async def _ask_host(self, tick: _Tick) -> None:
        samples, unknown = await self._local.sample()
        tick.stated[_HOST] = [
            *samples,
            *(unknown_sample(probe, reason) for probe, reason in unknown.items()),
        ]

    # ---- the agent's own samples

    def _failed(self, tick: _Tick, probe: str, error: PgherdError, *, source: str = "", grant: str = "") -> None:
        phase = str(error.context.get("phase") or "")
        reason = f"{error.code}.{phase}" if phase else error.code
        tick.failed = True
        tick.unknown(probe, reason, source=source, grant=grant)
        count = self._errors.get((probe, error.code), 0) + 1
        self._errors[probe, error.code] = count
        if count in (1, 10, 100) or count % 1000 == 0:
            _log.warning("probe.failed", node=self._node.alias, probe=probe, code=error.code, why=error.message, count=count)

    @staticmethod
    def _node_samples(condition: Condition) -> list[Sample]:
        return [
            Sample(UP, {}, 1.0 if condition in ("up", "saturated") else 0.0),
            Sample(SATURATED, {}, 1.0 if condition == "saturated" else 0.0),
            Sample(CONDITION, {"condition": condition}, 1.0),
        ]

    def _own_samples(self, tick: _Tick, duration_s: float) -> list[Sample]:
        return [
            Sample(SCRAPE_DURATION, {}, duration_s),
            Sample(SCRAPE_ERROR, {}, 1.0 if tick.failed else 0.0),
            Sample(SKIPPED, {}, float(self._skipped), self._started_unix_ns),
            *(
                sample
                for tier in SHED_ORDER
                for sample in (
                    Sample(SHED, {"tier": tier}, 0.0 if self.budget.allows(tier) else 1.0),
                    Sample(SERVER_SECONDS, {"tier": tier}, self.budget.spent_s(tier), self._started_unix_ns),
                )
            ),
            Sample(BUDGET_RATIO, {}, self.budget.ratio),
            *([Sample(SERVER_CPU, {}, self.connection.cpu_s, self._started_unix_ns)] if self.connection.cpu_s else []),
            Sample(ATTEMPTS, {}, float(self.connection.attempts), self._started_unix_ns),
            *(
                Sample(PROBE_ERRORS, {"probe": probe, "code": code}, float(count), self._started_unix_ns)
                for (probe, code), count in self._errors.items()
            ),
            *self._own.samples(self._spool.status),
        ]


def version_sample(server_version_num: int) -> Sample:
    """Whether this agent was tested with the server's major version; a newer one gets the newest SQL we know."""
    major = server_version_num // 10000
    return Sample(TESTED, {"major": str(major)}, 1.0 if major in TESTED_MAJORS else 0.0)

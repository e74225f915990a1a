"""The walk: one database at a time over the node's second connection, as far as its budget goes.

Rules, each with a test:
- at most one connection besides the sampler's; it is opened for one database, closed, and gone at the server
  before the next one is opened. While a session hangs that either of them gave up there is none. A visit is short, since DROP DATABASE waits five seconds for visitors to leave;
- what a walk may cost the server is bounded (`cost_max` of a core, `walk_timeout`); the next walk goes on where
  this one stopped, with the database that has waited longest;
- a database that refuses is unknown with its reason and doesn't end the walk; a server that is saturated, away
  or hung does. A connection attempt that hangs is kept and waited for, never doubled;
- the last connection slots are left to others;
- a value is stated anew at least every `REPEAT_S` (Prometheus forgets a series after five minutes), and its age
  is a series; nothing is stated while the server is away.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any, Final, Literal

from psycopg.conninfo import make_conninfo

from pgherd.agent.config import NodeConfig, RoundsConfig, SamplingConfig
from pgherd.agent.node import NodeStatus
from pgherd.agent.probes.budget import Budget
from pgherd.agent.probes.catalog import Probe, load_catalog
from pgherd.agent.probes.connection import Answer, NodeConnection, Rows
from pgherd.agent.probes.pipeline import Question
from pgherd.agent.probes.rows import samples_of, unknown_sample
from pgherd.agent.rounds.plan import SEQUENCES, SEQUENCES_BASIC, Database, relations_allowed, visiting_order
from pgherd.agent.rounds.ranking import Choice, Ranking, parse_relations
from pgherd.agent.telemetry.convert import Series, series_of, vanished
from pgherd.agent.telemetry.emit import Emitter
from pgherd.proto.clock import Clock
from pgherd.proto.errors import PgherdError
from pgherd.proto.samples import Metric, MetricKind, Sample
from pgherd.runtime.logging import get_logger

APPLICATION_NAME: Final = "pgherd-rounds"
REPEAT_S: Final = 150.0
_TIER: Final = "tables"  # of the node's budget
_LOOK_S: Final = 1.0
_BATCH_POINTS: Final = 2_000  # a repeated batch's size: small enough to be encoded without holding up the loop
_SLOTS_LEFT_MIN: Final = 3  # connection slots that stay free for others
_FAILURES_MAX: Final = 3  # databases in a row: then it is the server
_GONE_TIMEOUT_S: Final = 2.0
_RETRY_S: Final = 30.0
_REST_S: Final = (
    3600.0  # before a database is asked again that pg_hba.conf or a right keeps us out of: each try is a line in its log
)

_DATABASES_SQL: Final = """
SELECT d.oid::int8 AS oid, d.datname,
       CASE WHEN d.datistemplate THEN 'template' WHEN NOT d.datallowconn THEN 'closed'
            WHEN NOT has_database_privilege(d.oid, 'CONNECT') THEN 'postgres.privilege' ELSE '' END AS refusal,
       (pg_stat_get_db_tuples_returned(d.oid) + pg_stat_get_db_tuples_inserted(d.oid) + pg_stat_get_db_tuples_updated(d.oid)
        + pg_stat_get_db_tuples_deleted(d.oid))::float8 AS activity
FROM pg_database AS d
"""
_SLOTS_SQL: Final = """
SELECT current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
       - coalesce(current_setting('reserved_connections', true), '0')::int
       - count(*) FILTER (WHERE backend_type = 'client backend') AS free,
       bool_or(backend_type IS NULL) AS hidden
FROM pg_stat_get_activity(NULL)
"""

_GAUGE, _COUNTER = MetricKind.GAUGE, MetricKind.COUNTER
DATABASES: Final = Metric(
    "pgherd_rounds_databases",
    _GAUGE,
    "Databases by what the last walk did: reached, refused, waiting for a later walk, skipped",
)
AGE: Final = Metric("pgherd_rounds_age_seconds", _GAUGE, "Age of what is stated about the inside of the database", "s")
DURATION: Final = Metric("pgherd_rounds_duration_seconds", _GAUGE, "Duration of the last walk over the databases", "s")
WALKS: Final = Metric("pgherd_rounds_walks_total", _COUNTER, "Walks over the databases, by how they ended")
TABLES_REPORTED: Final = Metric("pgherd_tables_reported", _GAUGE, "Tables of the database that have series")
INDEXES_REPORTED: Final = Metric("pgherd_indexes_reported", _GAUGE, "Indexes of the database that have series")

_GRANTS: Final = {"sequences postgres.privilege": "pg_read_all_data", "rounds postgres.privilege": "CONNECT"}

End = Literal["whole", "cost", "deadline", "saturated", "away", "hung"]

_log = get_logger(__name__)


def load_probes() -> Mapping[str, Probe]:
    """The questions of a visit, by name."""
    text = resources.files(__package__).joinpath("rounds.toml").read_text(encoding="utf-8")
    return {probe.name: probe for probe in load_catalog(text).probes}


@dataclass(slots=True)
class _Held:
    """What the last visit of a database brought, as rows: a few dozen bytes a series."""

    name: str
    read_mono_s: float
    stated_mono_s: float
    rows: list[tuple[Probe, Rows]] = field(default_factory=list)
    choice: Choice = field(default_factory=lambda: Choice([], []))
    unknown: tuple[str, ...] = ()  # "probe reason"
    series: int = 0

    def samples(self) -> Iterable[Sample]:
        """All that is known of this database, its age apart."""
        for probe, rows in self.rows:
            yield from samples_of(probe, rows)
        labels = {"datname": self.name}
        if self.rows:
            yield Sample(TABLES_REPORTED, labels, float(len(self.choice.tables)))
            yield Sample(INDEXES_REPORTED, labels, float(len(self.choice.indexes)))
        for fact in self.unknown:
            probe_name, _, reason = fact.partition(" ")
            unknown = unknown_sample(probe_name, reason, _GRANTS.get(fact, ""))
            yield replace(unknown, labels={**unknown.labels, **labels})


@dataclass(slots=True)
class _Walk:
    """One walk while it goes on, and its outcome."""

    started_mono_s: float
    cost_s: float = 0.0
    reached: int = 0
    refused: int = 0
    failures: int = 0  # in a row
    end: End = "whole"


@dataclass(frozen=True, slots=True)
class WalkReport:
    """How a walk went: for tests and the bench."""

    reached: int
    refused: int
    waiting: int
    skipped: int
    cost_s: float
    duration_s: float
    end: End


class Rounds:
    """One node's walks. `run` it as a task beside the node's sampler, whose connection and emitter it shares."""

    def __init__(
        self,
        node: NodeConfig,
        sampling: SamplingConfig,
        settings: RoundsConfig,
        *,
        connection: NodeConnection,
        emitter: Emitter,
        budget: Budget,
        status: Callable[[], NodeStatus],
        clock: Clock,
        probes: Mapping[str, Probe] | None = None,
    ) -> None:
        self._node = node
        self._sampling = replace(
            sampling,
            connect_timeout=min(sampling.connect_timeout, settings.database_timeout / 2),
            answer_timeout=min(sampling.answer_timeout, settings.database_timeout),
        )
        self._interval_s = sampling.rare_interval
        self._settings = settings
        self._main = connection
        self._emitter = emitter
        self._budget = budget
        self._status = status
        self._clock = clock
        self._probes = probes or load_probes()
        self._ranking = Ranking()
        self._held: dict[int, _Held] = {}
        self._visited_mono_s: dict[int, float] = {}
        self._resting_until_mono_s: dict[int, float] = {}
        self._pending: tuple[int, NodeConnection] | None = None  # an attempt that hangs
        self._stated = False  # whether the collector has living series of ours
        self._server: tuple[str, int, str] = ("", 0, "")
        self._walks: dict[End, int] = {}
        self._last: WalkReport | None = None
        self._started_unix_ns = clock.wall_unix_ns()

    # ---- the loop

    async def run(self) -> None:
        """Walk every `rare_interval` while the server is up, and repeat what is known in between; until cancelled."""
        due_mono_s = self._clock.mono_s()
        try:
            while True:
                try:
                    if self._status().condition != "up":
                        await self._fall_silent()
                    elif self._clock.mono_s() >= due_mono_s and self._budget.allows(_TIER):
                        started_mono_s = self._clock.mono_s()
                        due_mono_s = started_mono_s + min(_RETRY_S, self._interval_s)  # for when it can't even begin
                        await self.walk()
                        due_mono_s = started_mono_s + self._interval_s
                    else:
                        await self._meet_server()
                        await self._repeat()
                except PgherdError as error:
                    _log.info("rounds.not_begun", node=self._node.alias, code=error.code, why=error.message)
                except Exception:  # noqa: BLE001 - the loop's guard: walking goes on whatever one turn met
                    _log.exception("rounds.turn_failed", node=self._node.alias)
                await asyncio.sleep(_LOOK_S)
        finally:
            await self.close()

    async def close(self) -> None:
        """End a pending connection attempt."""
        pending, self._pending = self._pending, None
        if pending is not None:
            await pending[1].close()

    # ---- one walk

    async def walk(self) -> WalkReport:
        """Visit as many databases as the budget allows. Raises PgherdError when the server can't even name them."""
        await self._meet_server()
        walk = _Walk(self._clock.mono_s())
        rows, slots = await self._ask_main()
        open_to_us = [
            Database(int(row["oid"]), str(row["datname"]), float(row["activity"] or 0)) for row in rows if not row["refusal"]
        ]
        refused = {int(row["oid"]): row for row in rows if row["refusal"] == "postgres.privilege"}
        await self._forget_gone({int(row["oid"]) for row in rows})
        for oid, row in refused.items():
            await self._hold(oid, _Held(str(row["datname"]), walk.started_mono_s, 0.0, unknown=(f"rounds {row['refusal']}",)))
        resting = {oid for oid, until_mono_s in self._resting_until_mono_s.items() if walk.started_mono_s < until_mono_s}
        waiting = await self._order([one for one in open_to_us if one.oid not in resting])
        if slots is not None and slots < _SLOTS_LEFT_MIN:
            walk.end = "saturated"
        while waiting and self._may_go_on(walk):
            await self._visit(walk, waiting.pop(0), len(open_to_us))
        report = WalkReport(
            reached=walk.reached,
            refused=walk.refused + len(refused) + len(resting),
            waiting=len(waiting),
            skipped=len(rows) - len(open_to_us) - len(refused),
            cost_s=walk.cost_s,
            duration_s=self._clock.mono_s() - walk.started_mono_s,
            end=walk.end,
        )
        self._budget.spent(_TIER, walk.cost_s, self._clock.mono_s())
        self._walks[walk.end] = self._walks.get(walk.end, 0) + 1
        self._last = report
        await self._state_self()
        return report

    async def _meet_server(self) -> None:
        """What one server said isn't another's, nor a primary's a standby's."""
        status = self._status()
        server = (status.system_identifier, status.server_version_num // 10000, status.role)
        if server != self._server:
            await self._fall_silent()
            self._held.clear()
            self._visited_mono_s.clear()
            self._resting_until_mono_s.clear()
            self._ranking = Ranking()
            self._server = server

    async def _ask_main(self) -> tuple[Rows, int | None]:
        databases, slots = await self._main.fetch_many([Question(_DATABASES_SQL), Question(_SLOTS_SQL)])
        if databases.error is not None:
            raise databases.error
        if slots.error is not None or not slots.rows or slots.rows[0]["hidden"]:
            return databases.rows, None
        return databases.rows, int(slots.rows[0]["free"])

    async def _order(self, databases: Sequence[Database]) -> list[Database]:
        order = visiting_order(databases, self._visited_mono_s)
        if self._pending is not None:  # the attempt that is under way goes first
            order.sort(key=lambda one: one.oid != self._pending[0])  # type: ignore[index]
            if not order or order[0].oid != self._pending[0]:  # its database is gone: nobody waits for it any more
                await self.close()
        return order

    def _may_go_on(self, walk: _Walk) -> bool:
        if self._main.sessions.abandoned:  # whoever gave it up: the sampler goes first to the room that is left
            walk.end = "hung"
        if walk.end == "whole" and self._clock.mono_s() - walk.started_mono_s > self._settings.walk_timeout:
            walk.end = "deadline"
        if walk.end == "whole" and walk.cost_s > self._settings.cost_max * self._interval_s:
            walk.end = "cost"
        return walk.end == "whole"

    async def _visit(self, walk: _Walk, database: Database, databases: int) -> None:
        """One database; its samples go out at once, or its reason."""
        now_mono_s = self._clock.mono_s()
        self._visited_mono_s[database.oid] = now_mono_s
        connection = (
            self._pending[1]
            if self._pending is not None
            else NodeConnection(self._at(database), self._sampling, self._clock, beside=self._main.sessions)
        )
        self._pending = None
        try:
            async with asyncio.timeout(self._settings.database_timeout):
                await connection.open()
                walk.cost_s += self._clock.mono_s() - now_mono_s  # a new process, its caches still empty: all of it for us
                held = await self._ask(connection, database, databases, walk)
        except (PgherdError, TimeoutError) as error:
            code, phase = (
                (error.code, error.context.get("phase")) if isinstance(error, PgherdError) else ("postgres.timeout", "visit")
            )
            if phase == "connect":
                self._pending = (database.oid, connection)
                walk.end = "hung"
            elif code in ("postgres.saturated", "config.secret_unreadable"):
                walk.end = "saturated" if code == "postgres.saturated" else "away"
            if code in ("postgres.auth", "postgres.privilege"):  # this database's own: the sampler has just been let in
                self._resting_until_mono_s[database.oid] = now_mono_s + _REST_S
            else:
                walk.failures += 1
            walk.refused += 1
            if walk.failures >= _FAILURES_MAX and walk.end == "whole":
                walk.end = "away"
            held = _Held(database.name, now_mono_s, 0.0, unknown=(f"rounds {code}{f'.{phase}' if phase else ''}",))
            _log.info("rounds.refused", node=self._node.alias, database=database.name, code=code, phase=phase)
        else:
            walk.failures = 0
            walk.reached += 1
        finally:
            if self._pending is None:
                await connection.close(until_gone_s=_GONE_TIMEOUT_S)
                if not await self._main.sessions.abandoned_end(_GONE_TIMEOUT_S):
                    walk.end = "hung"
        await self._hold(database.oid, held)

    def _at(self, database: Database) -> NodeConfig:
        conninfo = make_conninfo(self._node.conninfo, dbname=database.name, application_name=APPLICATION_NAME)
        return replace(self._node, conninfo=conninfo)

    async def _ask(self, connection: NodeConnection, database: Database, databases: int, walk: _Walk) -> _Held:
        """Two round trips: what there is, then what is worth telling. Raises PgherdError when it can't be known at all."""
        held = _Held(database.name, self._clock.mono_s(), 0.0)
        unknown: list[str] = []
        first = [self._probes["relations"], self._probes["sequences"]]
        listed, sequences = answers = await connection.fetch_many([Question(probe.sql) for probe in first])
        walk.cost_s += sum(answer.cost_s for answer in answers)
        if listed.error is not None:
            raise listed.error
        relations = parse_relations(listed.rows[0].pop("relations"))
        others = {oid: one.series for oid, one in self._held.items() if oid != database.oid}
        limit = relations_allowed(self._settings.series_max, self._settings.tables_max, databases, others)
        held.choice = self._ranking.choose(database.oid, relations, limit)
        held.rows.append((first[0], listed.rows))
        self._take(held, unknown, first[1], sequences, rows_max=SEQUENCES if limit else SEQUENCES_BASIC)
        if sequences.rows and sequences.rows[0]["unreadable"]:
            unknown.append("sequences postgres.privilege")
        second = [(self._probes["tables"], held.choice.tables), (self._probes["indexes"], held.choice.indexes)]
        answers = await self._ask_relations(connection, second, sizes=True)
        walk.cost_s += sum(answer.cost_s for answer in answers)
        for (probe, oids), answer in zip(second, answers, strict=True):
            if _locked(answer):  # somebody took a lock between our look at pg_locks and the size: do without
                unknown.append(f"{probe.name}_size postgres.timeout.lock")
                (answer,) = await self._ask_relations(connection, [(probe, oids)], sizes=False)  # noqa: PLW2901
                walk.cost_s += answer.cost_s
            self._take(held, unknown, probe, answer)
        held.unknown = tuple(unknown)
        return held

    @staticmethod
    async def _ask_relations(
        connection: NodeConnection, asked: Sequence[tuple[Probe, Sequence[int]]], *, sizes: bool
    ) -> list[Answer]:
        flag = "true" if sizes else "false"
        return await connection.fetch_many(
            [Question(probe.sql, (f"{{{','.join(map(str, oids))}}}", flag)) for probe, oids in asked]
        )

    @staticmethod
    def _take(held: _Held, unknown: list[str], probe: Probe, answer: Answer, rows_max: int | None = None) -> None:
        if answer.error is None:
            held.rows.append((probe, answer.rows[:rows_max]))
            return
        phase = answer.error.context.get("phase")
        unknown.append(f"{probe.name} {answer.error.code}{f'.{phase}' if phase else ''}")

    # ---- stating

    async def _hold(self, oid: int, held: _Held) -> None:
        """Replace what is known of a database, and say so: its new samples, and the ends of those that it lost."""
        before = self._held.get(oid)
        current = series_of(self._with_age(held))
        held.series = len(current)
        ended = vanished(series_of(self._with_age(before)), current) if before is not None and self._stated else []
        self._held[oid] = held
        await self._spool(current, ended)
        held.stated_mono_s = self._clock.mono_s()

    async def _forget_gone(self, oids: set[int]) -> None:
        """Databases that were dropped."""
        for oid in [oid for oid in self._held if oid not in oids]:
            held = self._held.pop(oid)
            if self._stated:
                await self._spool({}, list(series_of(self._with_age(held)).values()))
        for oid in [oid for oid in self._visited_mono_s if oid not in oids]:
            del self._visited_mono_s[oid]
            self._resting_until_mono_s.pop(oid, None)
            self._ranking.forget(oid)

    async def _repeat(self) -> None:
        """State again what was stated too long ago, a batch of a few databases at a time."""
        due_mono_s = self._clock.mono_s() - REPEAT_S
        due = [one for one in self._held.values() if one.stated_mono_s <= due_mono_s or not self._stated]
        while due:
            batch: Series = {}
            while due and len(batch) < _BATCH_POINTS:
                held = due.pop()
                batch |= series_of(self._with_age(held))
                held.stated_mono_s = self._clock.mono_s()
            await self._spool(batch, [])
            if not due:
                await self._state_self()

    async def _fall_silent(self) -> None:
        """The server is away: what was known of its inside isn't known now."""
        if not self._stated:
            return
        for held in self._held.values():
            await self._spool({}, list(series_of(self._with_age(held)).values()))
        self._stated = False

    def _with_age(self, held: _Held) -> Iterable[Sample]:
        yield from held.samples()
        if held.rows:
            yield Sample(AGE, {"datname": held.name}, self._clock.mono_s() - held.read_mono_s)

    async def _spool(self, current: Series, ended: Sequence[Sample]) -> None:
        await self._emitter.emit_held(current, ended, self._clock.wall_unix_ns())
        self._stated = True

    async def _state_self(self) -> None:
        """How the last walk went: a source of its own, so that it ends with the server."""
        last = self._last
        if last is None:
            return
        states: dict[str, Any] = {
            "reached": last.reached,
            "refused": last.refused,
            "waiting": last.waiting,
            "skipped": last.skipped,
        }
        samples = [
            *(Sample(DATABASES, {"state": state}, float(count)) for state, count in states.items()),
            Sample(DURATION, {}, last.duration_s),
            *(Sample(WALKS, {"end": end}, float(count), self._started_unix_ns) for end, count in self._walks.items()),
        ]
        await self._emitter.emit({"rounds": samples}, self._clock.wall_unix_ns())


def _locked(answer: Answer) -> bool:
    return answer.error is not None and answer.error.context.get("phase") == "lock"

"""Looks at one node's sessions ten times a second, and says once a window how long statements took.

The looks go over the node's one sampling connection, between its ticks. A look reads the function below
pg_stat_activity, so it locks no relation; it asks only for backends that are active or have news; it never opens a
connection and never waits for a busy one longer than a period: what it misses is a gap, which the estimate knows of.
The instants are jittered, so that they don't fall in step with the workload.

Source: PostgreSQL docs "pg_stat_get_activity", "pg_stat_statements", "Statistics Functions" (pg_stat_get_db_*).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from pgherd.agent.latency.estimate import Estimate, estimate
from pgherd.agent.latency.observation import look_of
from pgherd.agent.latency.publish import Grown, samples_of
from pgherd.agent.latency.traffic import Counters, counters_of, traffic_between
from pgherd.agent.latency.window import CUT_S, Tracker
from pgherd.agent.node import NodeStatus
from pgherd.agent.probes.budget import SHED_ORDER, Budget
from pgherd.agent.probes.connection import APPLICATION_NAME, Answer
from pgherd.agent.probes.pipeline import Question
from pgherd.agent.telemetry.emit import Emitter
from pgherd.proto.clock import Clock
from pgherd.proto.errors import PgherdError
from pgherd.runtime.logging import get_logger

SOURCE: Final = "latency"
TIER: Final = "latency"  # in the node's budget of server time
_QUERY_ID_MAJOR: Final = 14  # query_id, active_time, toplevel and pg_stat_statements_info came with it

# One row per backend with news, and at least one for the clock. "Hidden" are sessions that our role may not see into.
LOOK_SQL: Final = f"""
SELECT date_part('epoch', clock_timestamp()) AS now, a.pid, a.state,
       date_part('epoch', a.query_start) AS query_start, date_part('epoch', a.state_change) AS state_change,
       %(query_id)s AS query_id, a.backend_type IS NULL AS hidden, a.usesysid = $2::oid AS our_role
FROM (SELECT 1) AS always
LEFT JOIN pg_stat_get_activity(NULL) AS a
  ON a.pid <> pg_backend_pid()
 AND NOT (a.usesysid = $2::oid AND a.application_name = '{APPLICATION_NAME}')
 AND (a.backend_type IS NULL OR a.backend_type = 'client backend')
 AND (a.backend_type IS NULL OR a.state IN ('active', 'fastpath function call', 'disabled')
      OR date_part('epoch', a.state_change) >= $1::float8)
"""  # noqa: S608 - the name is our own constant

_COUNTERS_SQL: Final = """
SELECT sum(pg_stat_get_db_xact_commit(oid) + pg_stat_get_db_xact_rollback(oid))::float8 AS transactions,
       %(active_time)s AS active_ms, %(sessions)s AS sessions,
       concat_ws('/', count(*), sum(oid::bigint), date_part('epoch', max(pg_stat_get_db_stat_reset_time(oid))),
                 date_part('epoch', pg_postmaster_start_time())) AS key
FROM pg_database
"""
_EXTENSION_SQL: Final = """
SELECT quote_ident(n.nspname) AS schema, (SELECT usesysid FROM pg_stat_get_activity(pg_backend_pid()))::text AS role
FROM (SELECT 1) AS always
LEFT JOIN pg_extension AS e ON e.extname = 'pg_stat_statements'
LEFT JOIN pg_namespace AS n ON n.oid = e.extnamespace
"""
_STATEMENTS_SQL: Final = """
SELECT coalesce(sum(s.calls), 0)::float8 AS calls,
       coalesce(sum(s.calls) FILTER (WHERE s.userid = $1::oid), 0)::float8 AS calls_of_role,
       max(i.dealloc)::float8 AS evictions, coalesce(date_part('epoch', max(i.stats_reset))::text, '') AS key
FROM %(schema)s.pg_stat_statements_info AS i LEFT JOIN %(schema)s.pg_stat_statements(false) AS s ON s.toplevel
"""

_log = get_logger(__name__)


class Connection(Protocol):
    """What this needs of the node's connection."""

    @property
    def connected(self) -> bool: ...

    @property
    def busy(self) -> bool: ...

    async def fetch_many(self, questions: Sequence[Question], *, send_for_s: float = ...) -> list[Answer]: ...


class LatencySampler:
    """One node's looks and windows. `run` it as a task beside the node's sampler, whose connection it shares."""

    def __init__(
        self,
        *,
        connection: Connection,
        emitter: Emitter,
        status: Callable[[], NodeStatus],
        window_s: float,
        threshold_s: float,
        clock: Clock,
        budget: Budget,
        chance: Callable[[], float],
    ) -> None:
        """`budget` tells whether the server is to be spared; `chance` draws from 0 … 1."""
        self._connection = connection
        self._emitter = emitter
        self._status = status
        self._window_s = window_s
        self._threshold_s = threshold_s
        self._clock = clock
        self._chance = chance
        self._budget = budget
        self._tracker = Tracker(threshold_s)
        self._grown = Grown(clock.wall_unix_ns())
        self._before: Counters | None = None
        self._role = "0"
        self._server: tuple[int, str, str] | None = None
        self._own_looks = 0
        self._own_before_s = 0.0
        self.last: Estimate | None = None  # of the window that ended last
        self.looks = 0  # answered, since the start
        self.shed = 0  # left out to spare the server, since the start

    # ---- the loop

    async def run(self) -> None:
        """Until cancelled. An unforeseen error costs one look."""
        due_mono_s = self._clock.mono_s()
        ends_mono_s = due_mono_s + self._window_s
        while True:
            due_mono_s = max(due_mono_s + CUT_S * (0.5 + self._chance()), self._clock.mono_s())
            await asyncio.sleep(due_mono_s - self._clock.mono_s())
            try:
                await self.look()
                if self._clock.mono_s() >= ends_mono_s:
                    ends_mono_s = max(ends_mono_s + self._window_s, self._clock.mono_s())
                    await self.end_window()
            except Exception:  # noqa: BLE001 - the loop's guard: one look is lost, whatever it met
                _log.exception("latency.look_failed", node=self._status().alias)

    async def look(self) -> None:
        """One look, or a miss."""
        if not self._budget.allows(TIER):
            self.shed += 1
            self._tracker.miss(shed=True)
            return
        status = self._status()
        if status.condition != "up" or not self._connection.connected or self._connection.busy:
            self._tracker.miss()
            return
        if (server := (status.server_version_num, status.system_identifier, status.role)) != self._server:
            await self._meet(server)
        query_id = "a.query_id" if status.server_version_num >= _QUERY_ID_MAJOR * 10000 else "NULL::bigint"
        question = Question(LOOK_SQL % {"query_id": query_id}, (repr(self._tracker.since_s), self._role))
        (answer,) = await self._connection.fetch_many([question])
        self._budget.spent(TIER, answer.cost_s, self._clock.mono_s())
        if answer.error is not None:
            self._tracker.miss()
            return
        self.looks += 1
        self._own_looks += 1
        self._tracker.add(look_of(answer.rows))

    async def _meet(self, server: tuple[int, str, str]) -> None:
        """Another server, or the same in another role: what was known of its sessions and counters is void."""
        self._tracker.forget()
        self._server = server
        self._before = await self._count()
        self._own_before_s = sum(self._budget.spent_s(tier) for tier in SHED_ORDER)

    # ---- a window

    async def end_window(self) -> None:
        """Estimate what was seen since the last one, and emit it."""
        unix_ns = self._clock.wall_unix_ns()
        after = await self._count()
        window = self._tracker.take()
        own_s = sum(self._budget.spent_s(tier) for tier in SHED_ORDER)
        traffic = traffic_between(
            self._before,
            after,
            own_looks=self._own_looks,
            own_active_s=own_s - self._own_before_s,
            role_is_shared=window.role_is_shared,
        )
        self._before, self._own_looks, self._own_before_s = after, 0, own_s
        self.last = estimate(window, traffic)
        await self._emitter.emit({SOURCE: samples_of(self.last, self._grown, self._threshold_s)}, unix_ns)

    async def _count(self) -> Counters | None:
        """What the server has counted so far; None when it can't be asked now."""
        status = self._status()
        if not self._budget.allows(TIER) or status.condition != "up" or not self._connection.connected:
            return None
        is_new = status.server_version_num >= _QUERY_ID_MAJOR * 10000
        kinds = ("active_time", "sessions")
        sums = {kind: f"sum(pg_stat_get_db_{kind}(oid))::float8" if is_new else "NULL::float8" for kind in kinds}
        databases, extension = await self._connection.fetch_many([Question(_COUNTERS_SQL % sums), Question(_EXTENSION_SQL)])
        if databases.error is not None or extension.error is not None:
            return None
        found = extension.rows[0]
        self._role = found["role"]
        statements, reason = await self._statements(found["schema"], is_new)
        return counters_of(databases.rows[0], statements, reason)

    async def _statements(self, schema: str | None, is_new: bool) -> tuple[dict[str, Any] | None, str]:
        if schema is None:
            return None, "statements_not_installed"
        if not is_new:  # nested statements couldn't be told from those that clients sent
            return None, "statements_too_old"
        (answer,) = await self._connection.fetch_many([Question(_STATEMENTS_SQL % {"schema": schema}, (self._role,))])
        return (answer.rows[0], "") if answer.error is None else (None, _reason(answer.error))


def _reason(error: PgherdError) -> str:
    return f"statements_{error.code.removeprefix('postgres.')}"

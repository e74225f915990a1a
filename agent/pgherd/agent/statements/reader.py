"""Reads pg_stat_statements every slow interval over the sampler's connection, and states what the ledger makes of it.

The counters come without texts, packed by the server into one line per database and role: the view's text file
isn't touched and a reading costs a few milliseconds and little memory here. A text is asked for once, when its
statement gets series; it leaves this host only normalised (probes/normalise.py).

Columns go by the extension's version, not the server's: an upgraded server keeps the old one until ALTER EXTENSION.
Source: PostgreSQL docs "pg_stat_statements".
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from pgherd.agent.config import StatementsConfig
from pgherd.agent.node import NodeStatus
from pgherd.agent.probes.budget import Budget
from pgherd.agent.probes.connection import Answer, NodeConnection, Rows
from pgherd.agent.probes.normalise import normalise
from pgherd.agent.probes.pipeline import Question
from pgherd.agent.probes.rows import unknown_sample
from pgherd.agent.statements.ledger import ENTRIES_MAX, Counts, Key, Reading, StatementLedger
from pgherd.agent.telemetry.emit import Emitter
from pgherd.proto.clock import Clock
from pgherd.proto.errors import PgherdError
from pgherd.proto.samples import Metric, MetricKind, Sample
from pgherd.runtime.logging import get_logger

_SOURCE: Final = "statements"
_LOOK_S: Final = 1.0
_TEXTS_MAX: Final = 500  # texts kept here, the least used go first
_TEXT_CHARS_ASKED: Final = 16_000

# 1.8 belongs to PostgreSQL 13; 1.9 brought pg_stat_statements_info, 1.11 new names for the block times.
_OLDEST: Final = (1, 8)
_WITH_INFO: Final = (1, 9)
_SHARED_BLOCKS: Final = (1, 11)

_EXTENSION_SQL: Final = """
SELECT quote_ident(n.nspname) AS schema, e.extversion AS version
FROM pg_extension AS e JOIN pg_namespace AS n ON n.oid = e.extnamespace WHERE e.extname = 'pg_stat_statements'
"""
_ENTRIES_SQL: Final = """
SELECT coalesce(d.datname, '') AS datname, coalesce(r.rolname, '') AS role, max(s.entries) AS entries,
       string_agg(concat_ws(' ', s.queryid, s.calls, s.seconds, s.rows, s.block_read_seconds, s.block_write_seconds), ',')
         AS packed, bool_or(s.queryid IS NULL) AS hidden
FROM (SELECT queryid, dbid, userid, count(*) OVER () AS entries, sum(calls) AS calls, sum(total_exec_time) / 1000 AS seconds,
             sum(rows) AS rows, sum({read_time}) / 1000 AS block_read_seconds, sum({write_time}) / 1000 AS block_write_seconds
      FROM {schema}.pg_stat_statements(false) GROUP BY queryid, dbid, userid ORDER BY seconds DESC LIMIT {limit}) AS s
LEFT JOIN pg_database AS d ON d.oid = s.dbid LEFT JOIN pg_roles AS r ON r.oid = s.userid
GROUP BY 1, 2
"""
_INFO_SQL: Final = "SELECT dealloc, extract(epoch FROM stats_reset)::float8 AS reset FROM {schema}.pg_stat_statements_info"
_DATABASES_SQL: Final = "SELECT datname FROM pg_database"
_TEXTS_SQL: Final = """
SELECT queryid, left(min(query), {chars}) AS query
FROM {schema}.pg_stat_statements(true) WHERE queryid = ANY ($1::int8[]) GROUP BY queryid
"""

_GAUGE, _COUNTER = MetricKind.GAUGE, MetricKind.COUNTER
_FIGURES: Final = (
    ("calls", "Number of times executed", ""),
    ("seconds", "Total time spent in the statement, in seconds", "s"),
    ("rows", "Total number of rows retrieved or affected by the statement", ""),
    ("block_read_seconds", "Total time the statement spent reading blocks, in seconds", "s"),
    ("block_write_seconds", "Total time the statement spent writing blocks, in seconds", "s"),
)
TOP: Final = tuple(Metric(f"pg_stat_statements_{name}_total", _COUNTER, text, unit) for name, text, unit in _FIGURES)
TOTALS: Final = tuple(
    Metric(f"pgherd_statements_{name}_total", _COUNTER, f"{text}: all statements of the database", unit)
    for name, text, unit in _FIGURES
)
INFO: Final = Metric("pgherd_statement_info", _GAUGE, "Normalised text of a statement that has series")
ENTRIES: Final = Metric("pgherd_statements_entries", _GAUGE, "Statements in pg_stat_statements, by database and role")
REPORTED: Final = Metric("pgherd_statements_reported", _GAUGE, "Statements that have series of their own")
DEALLOCATIONS: Final = Metric(
    "pgherd_statements_deallocations_total", _COUNTER, "Times that pg_stat_statements threw out its least used entries"
)
_GRANTS: Final = {
    "extension_absent": "CREATE EXTENSION pg_stat_statements",
    "not_preloaded": "shared_preload_libraries",
    "statements_hidden": "pg_read_all_stats",
    "postgres.privilege": "USAGE on the extension's schema",
}

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Extension:
    schema: str  # quoted
    version: tuple[int, ...]

    def entries_sql(self) -> str:
        prefix = "shared_blk" if self.version >= _SHARED_BLOCKS else "blk"
        return _ENTRIES_SQL.format(
            schema=self.schema, read_time=f"{prefix}_read_time", write_time=f"{prefix}_write_time", limit=ENTRIES_MAX
        )


def unpack(rows: Rows) -> Iterator[tuple[Key, Counts]]:
    """The entries in the rows of the packed form, one at a time. Raises ValueError."""
    for row in rows:
        database, role = str(row["datname"]), str(row["role"])
        for item in str(row["packed"]).split(",") if row["packed"] else ():
            queryid, *figures = item.split(" ")
            if len(figures) == len(_FIGURES):  # one without an id is hidden from this role
                yield Key(int(queryid), database, role), Counts(*map(float, figures))


class StatementReader:
    """One node's statements. `run` it as a task beside the node's sampler, whose connection and emitter it shares."""

    def __init__(
        self,
        settings: StatementsConfig,
        interval_s: float,
        *,
        connection: NodeConnection,
        emitter: Emitter,
        budget: Budget,
        status: Callable[[], NodeStatus],
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._interval_s = interval_s
        self._connection = connection
        self._emitter = emitter
        self._budget = budget
        self._status = status
        self._clock = clock
        self._ledger = StatementLedger(settings.top)
        self._extension: _Extension | None = None
        self._server: tuple[str, int, str] = ("", 0, "")
        self._texts: OrderedDict[int, str] = OrderedDict()  # "": there is none to be had
        self._started_unix_ns = clock.wall_unix_ns()

    async def run(self) -> None:
        """Read every slow interval while the server is up; until cancelled."""
        due_mono_s = self._clock.mono_s()
        while True:
            try:
                if self._status().condition == "up" and self._clock.mono_s() >= due_mono_s:
                    due_mono_s = self._clock.mono_s() + self._interval_s
                    await self.read()
            except Exception:  # noqa: BLE001 - the loop's guard: reading goes on whatever one turn met
                _log.exception("statements.turn_failed")
            await asyncio.sleep(_LOOK_S)

    async def read(self) -> None:
        """One reading and one batch; when it can't be read, or may not be to spare the server, the reason."""
        unix_ns = self._clock.wall_unix_ns()
        self._meet_server()
        if not self._budget.allows(_SOURCE):
            await self._emitter.emit({_SOURCE: [_unknown("shed")]}, unix_ns)
            return
        try:
            samples = await self._samples()
        except PgherdError as error:
            self._extension = None  # updated, moved or dropped: looked for anew
            reason = _reason(error)
            samples = [_unknown(reason)]
            _log.info("statements.unknown", reason=reason, why=error.message)
        await self._emitter.emit({_SOURCE: samples}, unix_ns)

    def _meet_server(self) -> None:
        """What one server counted isn't another's."""
        status = self._status()
        server = (status.system_identifier, status.server_version_num, status.role)
        if server != self._server:
            self._server, self._extension = server, None
            self._ledger.forget()

    async def _samples(self) -> list[Sample]:
        if self._extension is None:
            rows = await self._connection.fetch(_EXTENSION_SQL)
            if not rows:
                return [_unknown("extension_absent")]
            version = tuple(int(part) for part in str(rows[0]["version"]).split("."))
            if version < _OLDEST:
                return [_unknown("extension_too_old")]
            self._extension = _Extension(str(rows[0]["schema"]), version)
        extension = self._extension
        questions = [Question(extension.entries_sql()), Question(_DATABASES_SQL)]
        if extension.version >= _WITH_INFO:
            questions.append(Question(_INFO_SQL.format(schema=extension.schema)))
        answers = await self._connection.fetch_many(questions)
        cost_s = sum(answer.cost_s for answer in answers)
        entries, databases, *info = [_rows(answer) for answer in answers]
        listed = max((int(row["entries"]) for row in entries), default=0)
        reading = self._ledger.read(unpack(entries), whole=listed <= ENTRIES_MAX)
        self._ledger.keep_databases([*(str(row["datname"]) for row in databases), ""])
        cost_s += await self._fetch_texts(extension, list(reading.top))
        self._budget.spent(_SOURCE, cost_s, self._clock.mono_s())
        samples = [*self._figures(reading), Sample(ENTRIES, {}, float(listed))]
        samples += [
            Sample(DEALLOCATIONS, {}, float(row["dealloc"]), int(float(row["reset"] or 0) * 1e9))
            for row in (info[0] if info else ())
        ]
        if any(row["hidden"] for row in entries):
            samples.append(_unknown("statements_hidden"))
        if listed > ENTRIES_MAX:
            samples.append(_unknown("too_many_entries"))
        return samples

    def _figures(self, reading: Reading) -> Iterable[Sample]:
        for database, counts in reading.totals.items():
            for metric, value in zip(TOTALS, counts, strict=True):
                yield Sample(metric, {"datname": database}, value, self._started_unix_ns)
        for key, counts in reading.top.items():
            labels = {"queryid": str(key.queryid), "datname": key.database, "user": key.user}
            for metric, value in zip(TOP, counts, strict=True):
                yield Sample(metric, labels, value)
        for queryid in dict.fromkeys(key.queryid for key in reading.top):
            if text := self._texts.get(queryid):
                yield Sample(INFO, {"queryid": str(queryid), "query": text}, 1.0)
        yield Sample(REPORTED, {}, float(len(reading.top)))

    # ---- texts

    async def _fetch_texts(self, extension: _Extension, top: Sequence[Key]) -> float:
        """Ask for the texts that are missing, all in one; what that cost the server, in seconds."""
        wanted = dict.fromkeys(key.queryid for key in top) if self._settings.texts else {}
        missing = [queryid for queryid in wanted if queryid not in self._texts]
        for queryid in wanted:
            if queryid in self._texts:
                self._texts.move_to_end(queryid)
        if not missing:
            return 0.0
        sql = _TEXTS_SQL.format(schema=extension.schema, chars=_TEXT_CHARS_ASKED)
        (answer,) = await self._connection.fetch_many([Question(sql, (f"{{{','.join(map(str, missing))}}}",))])
        if answer.error is None:  # else they are asked for again at the next reading
            texts = {int(row["queryid"]): str(row["query"] or "") for row in answer.rows}
            for queryid in missing:
                self._texts[queryid] = normalise(texts.get(queryid, ""))
        while len(self._texts) > max(_TEXTS_MAX, len(wanted)):
            self._texts.popitem(last=False)
        return answer.cost_s


def _rows(answer: Answer) -> Rows:
    if answer.error is not None:
        raise answer.error
    return answer.rows


def _unknown(reason: str) -> Sample:
    return unknown_sample(_SOURCE, reason, _GRANTS.get(reason, ""))


def _reason(error: PgherdError) -> str:
    if error.context.get("sqlstate") == "55000":
        return "not_preloaded"
    phase = error.context.get("phase")
    return f"{error.code}.{phase}" if phase else error.code

"""pg_stat_statements of real servers: totals and top statements, as the view has them; texts without what people put in."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from pgherd.agent.config import StatementsConfig
from pgherd.agent.probes.budget import Budget
from pgherd.agent.statements.reader import StatementReader
from pgherd.runtime.clock import SystemClock
from support.postgres import Fleet, Server, majors
from support.rounds import Stated, stated_of
from support.sampling import sampling

pytestmark = pytest.mark.pg

SECRET = "hunter2-in-a-literal"


@contextlib.asynccontextmanager
async def reading(
    directory: Path, conninfo: str, settings: StatementsConfig | None = None
) -> AsyncIterator[tuple[StatementReader, Callable[[], Awaitable[Stated]], Budget]]:
    async with sampling(directory, conninfo) as bench:
        await bench.cycle()
        sampler = bench.sampler
        reader = StatementReader(
            settings or StatementsConfig(),
            60.0,
            connection=sampler.connection,
            emitter=sampler.emitter,
            budget=sampler.budget,
            status=lambda: sampler.status,
            clock=SystemClock(),
        )

        async def read() -> Stated:
            await reader.read()
            return stated_of(bench)

        yield reader, read, sampler.budget


@pytest.fixture(params=[major for major in (15, 17, 18) if major in majors()])
def server(postgres_fleet: Fleet, request: pytest.FixtureRequest) -> Iterator[Server]:
    made = postgres_fleet.server(request.param, settings={"track_io_timing": "on"})
    made.create_role("monitor", member_of=["pg_monitor"])
    made.create_database("app")
    yield made
    made.stop()


def test_totals_and_top_are_the_view_s(server: Server, tmp_path: Path) -> None:
    def work_done(times: int) -> None:
        with server.connect("app") as connection:
            for number in range(times):
                connection.execute(f"SELECT count(*) FROM generate_series(1, 20000) AS g WHERE g <> {number}".encode())
                connection.execute(f"SELECT '{SECRET}' AS x".encode())
            connection.execute(f"ALTER ROLE monitor PASSWORD '{SECRET}'".encode())

    async def work() -> None:
        async with reading(tmp_path / "spool", server.conninfo("monitor")) as (_, read, _):
            work_done(1)
            seen = await read()
            assert seen.value("pgherd_statements_calls_total", datname="app") == 0, "counting begins here"
            work_done(10)
            seen = await read()
            view = server.execute(
                "SELECT s.queryid::text, s.calls, s.total_exec_time / 1000, s.rows FROM pg_stat_statements s"
                " JOIN pg_database d ON d.oid = s.dbid WHERE d.datname = 'app' AND s.query LIKE 'SELECT count%generate_series%'"
            )
            ((queryid, calls, seconds, rows),) = view
            labels = {"queryid": queryid, "datname": "app", "user": "postgres"}
            assert calls == 11
            assert seen.value("pg_stat_statements_calls_total", **labels) == calls
            assert seen.value("pg_stat_statements_seconds_total", **labels) == pytest.approx(seconds)
            assert seen.value("pg_stat_statements_rows_total", **labels) == rows
            assert seen.find("pg_stat_statements_block_read_seconds_total", **labels)
            in_all = (
                "SELECT sum(calls)::int FROM pg_stat_statements s JOIN pg_database d ON d.oid = s.dbid WHERE d.datname = 'app'"
            )
            since = server.execute(in_all)[0][0] - 3  # the first reading's
            assert since >= 21
            assert seen.value("pgherd_statements_calls_total", datname="app") == since
            total = server.execute(
                "SELECT count(*) FROM (SELECT DISTINCT queryid, dbid, userid FROM pg_stat_statements) AS entries"
            )[0][0]
            assert seen.value("pgherd_statements_entries") == pytest.approx(total, abs=5)
            assert seen.find("pgherd_statements_deallocations_total")
            texts = {point.labels["queryid"]: point.labels["query"] for point in seen.find("pgherd_statement_info")}
            assert "generate_series" in texts[queryid]
            assert any("ALTER ROLE" in text for text in texts.values())
            assert not any(SECRET in str(point) for point in seen.points), "no literal leaves the host"
            server.execute("SELECT pg_stat_statements_reset()")
            work_done(2)
            seen = await read()
            assert seen.value("pg_stat_statements_calls_total", **labels) == 2, "the server's own counter began anew"
            print(
                server.execute(
                    "SELECT calls, query, toplevel FROM pg_stat_statements s JOIN pg_database d ON d.oid = s.dbid WHERE d.datname = 'app'"
                )
            )
            assert seen.value("pgherd_statements_calls_total", datname="app") == since + 5, "the total goes on"

    asyncio.run(work())


def test_statements_that_are_left_out_end_and_say_so(server: Server, tmp_path: Path) -> None:
    async def work() -> None:
        async with reading(tmp_path / "spool", server.conninfo("monitor")) as (_, read, budget):
            assert (await read()).find("pgherd_statements_calls_total")
            for second in range(3):
                budget.spent("statements", 3600.0, float(second))
            stated = await read()
            assert stated.find("pgherd_probe_unknown", probe="statements", reason="shed")
            assert not stated.find("pgherd_statements_calls_total"), "no frozen value stays"

    asyncio.run(work())


def test_what_keeps_statements_unknown_is_named(postgres_fleet: Fleet, tmp_path: Path) -> None:
    server = postgres_fleet.server(settings={"pg_stat_statements.max": "100"})
    server.create_role("monitor", member_of=["pg_monitor"])
    server.create_role("blind")

    async def work() -> None:
        async with reading(tmp_path / "blind", server.conninfo("blind")) as (_, read, _):
            assert ("statements", "statements_hidden", "") in (await read()).reasons()
        async with reading(tmp_path / "spool", server.conninfo("monitor"), StatementsConfig(top=5)) as (_, read, _):
            before = (await read()).value("pgherd_statements_calls_total", datname="postgres")
            with server.connect() as connection:
                for number in range(400):  # 100 fit: the rest is evicted
                    connection.execute(f"SELECT 1{', 1' * number}".encode())
            seen = await read()
            assert seen.value("pgherd_statements_calls_total", datname="postgres") > before
            assert seen.value("pgherd_statements_deallocations_total") >= 1
            assert seen.value("pgherd_statements_entries") <= 100
            assert seen.value("pgherd_statements_reported") == 5
            assert len(seen.find("pg_stat_statements_calls_total")) == 5
            server.execute('CREATE SCHEMA "Odd one"; GRANT USAGE ON SCHEMA "Odd one" TO monitor')
            server.execute('ALTER EXTENSION pg_stat_statements SET SCHEMA "Odd one"')
            assert (await read()).reasons() == {("statements", "postgres.failed", "")}, "looked for where it was"
            assert (await read()).find("pg_stat_statements_calls_total"), "and found where it is"
            server.execute("DROP EXTENSION pg_stat_statements")
            await read()
            seen = await read()
            assert ("statements", "extension_absent", "") in seen.reasons()
            server.execute("CREATE EXTENSION pg_stat_statements VERSION '1.9'")  # as an upgraded server has it
            assert (await read()).find("pg_stat_statements_calls_total")
            server.execute("ALTER SYSTEM RESET ALL")
        server.stop()
        text = (server.data_directory / "postgresql.conf").read_text(encoding="utf-8")
        (server.data_directory / "postgresql.conf").write_text(
            text.replace("shared_preload_libraries = 'pg_stat_statements'", ""), encoding="utf-8"
        )
        server.start()
        async with reading(tmp_path / "unloaded", server.conninfo("monitor")) as (_, read, _):
            assert ("statements", "not_preloaded", "") in (await read()).reasons()

    asyncio.run(work())
    server.stop()

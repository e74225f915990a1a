"""One connection, many questions: each costs only itself, turns are taken in order, prepared statements are mended."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import psycopg
import pytest

from pgherd.agent.config import NodeConfig
from pgherd.agent.probes.connection import NodeConnection
from pgherd.agent.probes.pipeline import WINDOW, Question
from pgherd.proto.errors import TransientError
from pgherd.runtime.clock import SystemClock
from support.postgres import Server
from support.sampling import SAMPLING, until

pytestmark = pytest.mark.pg


@contextlib.asynccontextmanager
async def opened(server: Server, **settings: Any) -> AsyncIterator[NodeConnection]:
    sampling = replace(SAMPLING, **settings)
    connection = NodeConnection(NodeConfig("n", "c", server.conninfo()), sampling, SystemClock())
    assert await connection.open()
    try:
        yield connection
    finally:
        await connection.close()


def test_a_failing_or_slow_statement_costs_only_itself(postgres: Server, database: str) -> None:
    async def work() -> None:
        async with opened(postgres, statement_timeout=0.2) as connection:
            questions = [
                Question("SELECT 1 AS one"),
                Question("SELECT no_such_column"),
                Question("SELECT 2 AS two"),
                Question("SELECT 1/0"),
                Question("SELECT pg_sleep(5)"),
                Question("SELECT $1::int + 1 AS three", ("2",)),
                *(Question(f"SELECT {number} AS number") for number in range(3 * WINDOW)),
            ]
            for _ in range(2):  # the second time most of them are prepared
                answers = await connection.fetch_many(questions)
                errors = [answer.error for answer in answers]
                assert [error.context.get("sqlstate") for error in errors if error] == ["42703", "22012", "57014"]
                assert errors[4] is not None
                assert errors[4].context["phase"] == "statement"
                assert answers[4].duration_s > 0.1
                assert [answers[index].rows for index in (0, 2, 5)] == [[{"one": 1}], [{"two": 2}], [{"three": 3}]]
                assert [answer.rows[0]["number"] for answer in answers[6:]] == list(range(3 * WINDOW))
            assert connection.attempts == 1

    asyncio.run(work())


def test_a_locked_table_costs_the_statement_that_needs_it(postgres: Server, database: str) -> None:
    postgres.execute("CREATE TABLE locked ()", dbname=database)

    async def work() -> None:
        node = NodeConfig("n", "c", postgres.conninfo(dbname=database))
        connection = NodeConnection(node, SAMPLING, SystemClock())
        await connection.open()
        with psycopg.connect(postgres.conninfo(dbname=database)) as blocker:
            blocker.execute("LOCK TABLE locked IN ACCESS EXCLUSIVE MODE")
            locked, free = await connection.fetch_many(
                [Question("SELECT count(*) FROM public.locked"), Question("SELECT 1 AS one")]
            )
            assert locked.error is not None
            assert locked.error.context["phase"] == "lock"
            assert free.rows == [{"one": 1}]
        (again,) = await connection.fetch_many([Question("SELECT count(*) FROM public.locked")])
        assert again.rows == [{"count": 0}]
        await connection.close()

    asyncio.run(work())


def test_what_isnt_sent_in_time_stays_unasked_and_the_connection_lives(postgres: Server) -> None:
    async def work() -> None:
        async with opened(postgres) as connection:
            answers = await connection.fetch_many([Question("SELECT pg_sleep(0.1)")] * (WINDOW + 3), send_for_s=0.05)
            phases = [answer.error.context["phase"] for answer in answers if answer.error]
            assert phases == ["unasked"] * 3
            assert (await connection.fetch("SELECT 1 AS one")) == [{"one": 1}]
            assert connection.attempts == 1

    asyncio.run(work())


def test_users_take_turns_in_the_order_of_asking(postgres: Server) -> None:
    async def work() -> None:
        order: list[int] = []

        async def use(number: int, connection: NodeConnection) -> None:
            assert await connection.fetch(f"SELECT pg_sleep(0.02), {number} AS number") == [{"pg_sleep": "", "number": number}]
            order.append(number)

        async with opened(postgres) as connection:
            tasks = [asyncio.create_task(use(number, connection)) for number in range(8)]
            await asyncio.gather(*tasks)
            assert order == list(range(8))

    asyncio.run(work())


def sleeping(server: Server) -> bool:
    return bool(server.execute("SELECT 1 FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(30)%' AND state = 'active'"))


def test_a_user_cancelled_in_the_middle_leaves_no_broken_connection(postgres: Server) -> None:
    async def work() -> None:
        async with opened(postgres) as connection:
            task = asyncio.create_task(connection.fetch("SELECT pg_sleep(30)"))
            await until(lambda: sleeping(postgres), 10, "the statement under way")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not connection.connected
            with pytest.raises(TransientError) as caught:
                await connection.fetch("SELECT 1")
            assert caught.value.code == "postgres.unreachable"
            assert await connection.open()
            assert await connection.fetch("SELECT 1 AS one") == [{"one": 1}]

    asyncio.run(work())


def test_a_prepared_statement_that_no_longer_fits_is_prepared_anew(postgres: Server, database: str) -> None:
    postgres.execute("CREATE VIEW seen AS SELECT 1 AS a", dbname=database)

    async def work() -> None:
        node = NodeConfig("n", "c", postgres.conninfo(dbname=database))
        connection = NodeConnection(node, SAMPLING, SystemClock())
        await connection.open()
        assert await connection.fetch("SELECT * FROM public.seen") == [{"a": 1}]
        postgres.execute("CREATE OR REPLACE VIEW seen AS SELECT 1 AS a, 2 AS b", dbname=database)
        (once,) = await connection.fetch_many([Question("SELECT * FROM public.seen")])
        assert once.error is not None, "the server says that the plan doesn't fit"
        assert await connection.fetch("SELECT * FROM public.seen") == [{"a": 1, "b": 2}]
        await connection.fetch("DEALLOCATE ALL")
        (lost,) = await connection.fetch_many([Question("SELECT * FROM public.seen")])
        assert lost.error is not None
        assert await connection.fetch("SELECT * FROM public.seen") == [{"a": 1, "b": 2}]
        await connection.close()

    asyncio.run(work())


def test_the_server_ending_the_session_is_unreachable_and_what_came_before_is_kept(postgres: Server) -> None:
    async def work() -> None:
        async with opened(postgres) as connection:
            first, killed, after = await connection.fetch_many(
                [Question("SELECT 1 AS one"), Question("SELECT pg_terminate_backend(pg_backend_pid())"), Question("SELECT 2")]
            )
            assert first.rows == [{"one": 1}]
            assert killed.error is not None
            assert killed.error.code == "postgres.unreachable"
            assert after.error is not None
            assert not connection.connected

    asyncio.run(work())


def test_answers_that_we_looked_at_late_arent_dear(postgres: Server) -> None:
    """An agent on a busy machine must not take its own slowness for the server's."""

    async def work() -> None:
        async with opened(postgres) as connection:
            questions = [Question("SELECT pg_sleep(0.05)"), Question("SELECT 1 AS one")]

            async def keep_the_loop() -> None:
                await until(lambda: connection.busy, 5, "the conversation")
                await asyncio.sleep(0.02)  # into the server's sleep, after the first sign of it
                until_mono_s = time.monotonic() + 0.5
                while time.monotonic() < until_mono_s:
                    pass

            answers, _ = await asyncio.gather(connection.fetch_many(questions), keep_the_loop())
            assert sum(answer.duration_s for answer in answers) > 0.3
            assert 0 < sum(answer.cost_s for answer in answers) < 0.25

    asyncio.run(work())

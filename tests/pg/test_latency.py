"""The latency sampler on real servers: what it counts is what clients did, and where it can't know it says so."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from pgherd.agent.config import SamplingConfig
from pgherd.agent.latency.estimate import Estimate
from pgherd.agent.latency.sampler import LatencySampler
from pgherd.runtime.clock import SystemClock
from support.postgres import Fleet, Server
from support.sampling import SAMPLING, Bench, sampling, until

pytestmark = pytest.mark.pg


@dataclass(slots=True)
class Watch:
    """A latency sampler at work beside its node's sampler; `window` ends a window and says what it found."""

    bench: Bench
    latency: LatencySampler

    async def window(self) -> Estimate:
        await self.latency.end_window()
        assert self.latency.last is not None
        return self.latency.last

    async def seen(self) -> None:
        """Until a look that began after now has been taken in."""
        looks = self.latency.looks
        await until(lambda: self.latency.looks >= looks + 2, 10, "two more looks")


@contextlib.asynccontextmanager
async def watching(
    server: Server, directory: Path, role: str = "monitor", settings: SamplingConfig = SAMPLING
) -> AsyncIterator[Watch]:
    async with sampling(directory / "spool", server.conninfo(role), settings=settings) as bench:
        sampler = bench.sampler
        latency = LatencySampler(
            connection=sampler.connection,
            emitter=sampler.emitter,
            status=lambda: sampler.status,
            window_s=3600.0,
            threshold_s=1.0,
            clock=SystemClock(),
            budget=sampler.budget,
            chance=random.random,
        )
        await sampler.tick()
        task = asyncio.create_task(latency.run())
        try:
            watch = Watch(bench, latency)
            await watch.seen()
            await watch.window()
            yield watch
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@pytest.fixture(scope="module")
def server(postgres_fleet: Fleet) -> Iterator[Server]:
    """One server for these tests; each of them starts with a window of its own."""
    made = postgres_fleet.server()
    made.create_role("monitor", member_of=["pg_monitor"])
    made.create_role("app")
    made.execute("CREATE TABLE t AS SELECT 1 AS one; GRANT ALL ON t TO app")
    yield made
    made.stop()


def session(server: Server, work: Callable[[psycopg.Connection[object]], object]) -> None:
    with server.connect(role="app") as connection:
        work(connection)


async def clients(count: int, work: Callable[[int], None]) -> None:
    """So many threads that do `work(number)`, all to their end."""
    await asyncio.gather(*(asyncio.to_thread(work, number) for number in range(count)))


def test_long_statements_are_counted_exactly(server: Server, tmp_path: Path) -> None:
    """24 of 1.3 s, 24 of 0.4 s and a thousand quick ones: 24 above the threshold, in any order."""

    def work(number: int) -> None:
        def statements(connection: psycopg.Connection[object]) -> None:
            for turn in range(4):
                for _ in range(40):
                    connection.execute("SELECT one FROM t")
                connection.execute("SELECT pg_sleep(%s) FROM t", [1.3 if (turn + number) % 2 else 0.4])

        session(server, statements)

    async def go() -> None:
        async with watching(server, tmp_path) as watch:
            await clients(12, work)
            await watch.seen()
            found = await watch.window()
            assert found.over == (24.0, 24.0)
            assert found.count is not None
            assert found.ratio is not None
            assert found.ratio[0] > 0.005
            decoded = await watch.bench.cycle()
            assert decoded.resource["pgherd.node"] == "n1"

    asyncio.run(go())


def test_a_plan_that_flips_for_one_statement_in_thirty_fires_and_calm_clears(server: Server, tmp_path: Path) -> None:
    """The decision of P99 > 1 s, both ways, and P99 itself: a percentile of means would say 40 ms."""

    def work(slow: bool) -> Callable[[int], None]:
        def statements(connection: psycopg.Connection[object]) -> None:
            for _ in range(2):
                for _ in range(29):
                    connection.execute("SELECT pg_sleep(0.004) FROM t")
                connection.execute("SELECT pg_sleep(%s) FROM t", [1.3 if slow else 0.004])

        return lambda _number: session(server, statements)

    async def go() -> None:
        async with watching(server, tmp_path) as watch:
            await clients(16, work(True))
            await watch.seen()
            flipped = await watch.window()
            assert flipped.over == (32.0, 32.0)
            assert flipped.ratio is not None
            assert flipped.ratio[0] > 0.01
            p99 = flipped.quantiles[2]
            assert p99.estimator.startswith("counted/")
            assert p99.value_s == pytest.approx(1.3, rel=0.05)
            await clients(16, work(False))
            await watch.seen()
            calm = await watch.window()
            assert calm.over == (0.0, 0.0)
            assert calm.ratio is not None
            assert calm.ratio[1] < 0.01

    asyncio.run(go())


def test_a_connection_for_every_statement_gives_no_wrong_number(server: Server, tmp_path: Path) -> None:
    """No backend stays to be found idle: what is published comes from ages or counting, and its interval holds."""

    def work(number: int) -> None:
        rng = random.Random(number)
        for _ in range(25):
            session(server, lambda c: c.execute("SELECT pg_sleep(%s) FROM t", [0.06 if rng.random() < 0.9 else 0.25]))

    async def go() -> None:
        async with watching(server, tmp_path) as watch:
            await clients(8, work)
            await watch.seen()
            found = await watch.window()
            assert found.count is not None
            assert found.count.best == pytest.approx(200, abs=10)
            for quantile in found.quantiles:
                assert not quantile.estimator.startswith("stratified")
            for quantile, least_s, most_s in ((found.quantiles[0], 0.06, 0.08), (found.quantiles[2], 0.25, 0.3)):
                if quantile.low_s is not None and quantile.high_s is not None:  # a loaded machine makes naps longer
                    assert quantile.low_s <= most_s
                    assert quantile.high_s >= least_s

    asyncio.run(go())


def quick(server: Server, statements: int = 300) -> Callable[[int], None]:
    def work(connection: psycopg.Connection[object]) -> None:
        for _ in range(statements):
            connection.execute("SELECT one FROM t")

    return lambda _number: session(server, work)


def test_without_pg_stat_statements_and_after_its_reset_the_count_is_another_or_none(server: Server, tmp_path: Path) -> None:
    async def go() -> None:
        async with watching(server, tmp_path) as watch:
            await clients(4, quick(server))
            await watch.seen()
            counted = await watch.window()
            assert counted.count is not None
            assert counted.count.source == "statements"
            assert counted.count.best == pytest.approx(1200, abs=15)
            await clients(4, quick(server))
            await asyncio.to_thread(server.execute, "SELECT pg_stat_statements_reset()")
            reset = await watch.window()
            assert "statements_reset" in reset.notes
            assert reset.count is None or reset.count.source != "statements"
            await asyncio.to_thread(server.execute, "DROP EXTENSION pg_stat_statements")
            await clients(4, quick(server))
            absent = await watch.window()
            assert "statements_not_installed" in absent.notes
            assert absent.count is None or absent.count.source != "statements"
            assert all(quantile.value_s is None or "/statements" not in quantile.estimator for quantile in absent.quantiles)
            await asyncio.to_thread(server.execute, "CREATE EXTENSION pg_stat_statements")

    asyncio.run(go())


@pytest.mark.parametrize("major", [17, 18])
def test_other_majors_answer_the_same_questions(postgres_fleet: Fleet, tmp_path: Path, major: int) -> None:
    made = postgres_fleet.server(major)
    made.create_role("monitor", member_of=["pg_monitor"])
    made.create_role("app")
    made.execute("CREATE TABLE t AS SELECT 1 AS one; GRANT ALL ON t TO app")

    async def go() -> None:
        async with watching(made, tmp_path) as watch:
            await clients(4, quick(made))
            await watch.seen()
            found = await watch.window()
            assert found.count is not None
            assert found.count.source == "statements"
            assert found.count.best == pytest.approx(1200, abs=15)
            assert found.over == (0.0, 0.0)

    asyncio.run(go())
    made.stop()


def test_a_role_that_may_not_see_and_sessions_that_arent_tracked_are_named(server: Server, tmp_path: Path) -> None:
    server.create_role("blind")

    async def reasons(role: str, directory: Path) -> tuple[str, ...]:
        async with watching(server, directory, role) as watch:
            with server.connect(role="app"):
                await watch.seen()
                found = await watch.window()
        assert all(quantile.value_s is None for quantile in found.quantiles)
        return found.notes

    assert "sessions_hidden" in asyncio.run(reasons("blind", tmp_path / "a"))
    server.execute("ALTER ROLE app SET track_activities = off")  # only a superuser may
    assert "track_activities_off" in asyncio.run(reasons("monitor", tmp_path / "b"))
    server.execute("ALTER ROLE app RESET track_activities")


def test_a_hung_server_is_a_gap_and_not_a_fast_window(server: Server, tmp_path: Path) -> None:
    async def go() -> None:
        async with watching(server, tmp_path) as watch:
            ticking = asyncio.create_task(watch.bench.sampler.run())
            await asyncio.to_thread(quick(server), 0)
            server.pause()
            try:
                await until(lambda: watch.bench.condition() == "hung", 20, "the hang to be noticed")
                hung = await watch.window()
            finally:
                server.resume()
            assert all(quantile.value_s is None for quantile in hung.quantiles)
            assert hung.missed > 0
            assert hung.ratio is None
            await until(lambda: watch.bench.condition() == "up", 20, "the server")
            await watch.seen()
            back = await watch.window()
            assert "gaps" in back.notes
            ticking.cancel()
            await asyncio.gather(ticking, return_exceptions=True)

    asyncio.run(go())


def test_shed_looks_are_said_to_be_shed(server: Server, tmp_path: Path) -> None:
    async def go() -> None:
        async with watching(server, tmp_path) as watch:
            budget = watch.bench.sampler.budget
            for _ in range(60):  # a median of the last looks: one dear one sheds nothing
                budget.spent("latency", 10.0, SystemClock().mono_s())
            assert not budget.allows("latency")
            await until(lambda: watch.latency.shed >= 3, 10, "three looks left out")
            found = await watch.window()
            assert found.notes[0] == "shed"
            assert all(quantile.value_s is None for quantile in found.quantiles)

    asyncio.run(go())


def test_a_look_locks_no_relation(server: Server, tmp_path: Path) -> None:
    """An exclusive lock on the catalogs that pg_stat_activity's view joins stops no look."""

    async def go() -> None:
        async with watching(server, tmp_path) as watch:
            locked = threading.Event()
            release = threading.Event()

            def hold() -> None:
                with server.connect(autocommit=False) as connection:
                    connection.execute("LOCK TABLE pg_authid, pg_database IN ACCESS EXCLUSIVE MODE")
                    locked.set()
                    release.wait(20)

            holding = asyncio.create_task(asyncio.to_thread(hold))
            await asyncio.to_thread(locked.wait, 10)
            before = watch.latency.looks
            await until(lambda: watch.latency.looks >= before + 5, 10, "looks beside the lock")
            release.set()
            await holding

    asyncio.run(go())

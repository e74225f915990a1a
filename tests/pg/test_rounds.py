"""Walks over the databases of real servers. PGHERD_NIGHTLY=1: 10 000 tables and 500 databases instead of the sample."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import psycopg
import pytest

from pgherd.agent.config import RoundsConfig
from pgherd.agent.probes.dial import ConnectFailed, dial, told
from pgherd.agent.rounds.walk import REPEAT_S
from support.postgres import Fleet, Pair, Server, majors
from support.rounds import GENEROUS, Stated, walker
from support.sampling import SAMPLING, Point
from support.waiting import wait_until

NIGHTLY = os.environ.get("PGHERD_NIGHTLY") == "1"
pytestmark = [pytest.mark.pg, pytest.mark.timeout(1200 if NIGHTLY else 120)]
TABLES = 10_000 if NIGHTLY else 1_000
DATABASES = 500 if NIGHTLY else 30

FILL = """
CREATE TABLE busy AS SELECT g AS id, g::text AS body FROM generate_series(1, 2000) AS g;
CREATE UNIQUE INDEX busy_id ON busy (id);
CREATE TABLE calm (id smallserial, note text);
INSERT INTO calm (note) SELECT 'x' FROM generate_series(1, 16384);
UPDATE busy SET body = body || '!' WHERE id <= 100;
DELETE FROM busy WHERE id > 1990;
VACUUM ANALYZE busy;
SELECT pg_stat_force_next_flush();
"""


@pytest.fixture(params=[major for major in (15, 17, 18) if major in majors()])
def filled(postgres_fleet: Fleet, request: pytest.FixtureRequest) -> Iterator[Server]:
    server = postgres_fleet.server(request.param)
    server.create_role("monitor", member_of=["pg_monitor"])
    for name in ("one", "two"):
        server.create_database(name)
        with server.connect(name) as connection:
            for statement in FILL.strip().split(";\n"):
                connection.execute(statement)
    yield server
    server.stop()


def test_every_database_says_what_its_own_views_say(filled: Server, tmp_path: Path) -> None:
    async def work() -> None:
        async with walker(tmp_path / "spool", filled.conninfo("monitor")) as walk:
            report = await walk.rounds.walk()
            assert (report.reached, report.refused, report.waiting, report.skipped, report.end) == (3, 0, 0, 2, "whole")
            seen = walk.stated()
            for name in ("one", "two"):
                columns = ["seq_scan", "n_tup_ins", "n_tup_upd", "n_tup_del", "n_live_tup", "n_dead_tup", "vacuum_count"]
                rows = filled.execute(f"SELECT relname, {', '.join(columns)} FROM pg_stat_user_tables", dbname=name)
                assert {row[0] for row in rows} == {"busy", "calm"}
                for relname, *values in rows:
                    for column, value in zip(columns, values, strict=True):
                        labels = {"datname": name, "schemaname": "public", "relname": relname}
                        assert seen.value(f"pg_stat_user_tables_{column}", **labels) == value, (relname, column)
                sizes = filled.execute(
                    "SELECT pg_table_size('busy'), pg_indexes_size('busy'), extract(epoch FROM last_vacuum)"
                    " FROM pg_stat_user_tables WHERE relname = 'busy'",
                    dbname=name,
                )[0]
                for what, expected in zip(("table_size_bytes", "index_size_bytes", "last_vacuum"), sizes, strict=True):
                    found = seen.value(f"pg_stat_user_tables_{what}", datname=name, relname="busy")
                    assert found == pytest.approx(float(expected))
                assert seen.value("pg_stat_user_tables_last_vacuum", datname=name, relname="calm") == 0, (
                    "never, and known to be"
                )
                assert seen.find("pg_stat_user_indexes_idx_scan", datname=name, indexrelname="busy_id")
                assert (
                    seen.value("pgherd_tables_total", datname=name) == seen.value("pgherd_tables_reported", datname=name) == 2
                )
                size = filled.execute("SELECT pg_database_size(current_database())", dbname=name)[0][0]
                assert seen.value("pg_database_size_bytes", datname=name) == pytest.approx(size, rel=0.01)
                # A sequence that the role may not read is counted and named, not guessed.
                assert seen.value("pgherd_sequences_unreadable", datname=name) == 1
                assert ("sequences", "postgres.privilege", name) in seen.reasons()
            filled.execute("GRANT SELECT ON ALL SEQUENCES IN SCHEMA public TO monitor", dbname="one")
            await walk.rounds.walk()
            seen = walk.stated()
            assert seen.value("pgherd_sequence_used_ratio", datname="one") == pytest.approx(0.5, abs=0.001)
            assert seen.value("pgherd_sequences_unreadable", datname="one") == 0
            assert seen.ended("pgherd_probe_unknown", datname="one", probe="sequences")
            # A reset and a dropped table are told at the next visit.
            filled.execute("SELECT pg_stat_reset()", dbname="one")
            filled.execute("DROP TABLE calm", dbname="two")
            await walk.rounds.walk()
            seen = walk.stated()
            assert seen.value("pg_stat_user_tables_n_tup_ins", datname="one", relname="busy") == 0
            assert seen.value("pg_stat_user_tables_n_tup_ins", datname="two", relname="busy") == 2000
            assert not seen.find("pg_stat_user_tables_n_tup_ins", datname="two", relname="calm")
            assert seen.ended("pg_stat_user_tables_n_tup_ins", datname="two", relname="calm")

    asyncio.run(work())


@pytest.fixture(scope="module")
def wide(postgres_fleet: Fleet) -> Iterator[Server]:
    """Many tables in one database, and many databases."""
    server = postgres_fleet.server(settings={"max_locks_per_transaction": "512"})
    server.create_role("monitor", member_of=["pg_monitor"])
    server.create_database("tables")
    made = "DO $$ BEGIN FOR i IN {}..{} LOOP EXECUTE format('CREATE TABLE t%s (id int PRIMARY KEY)', i); END LOOP; END $$"
    for first in range(0, TABLES, 500):
        server.execute(made.format(first, first + 499), dbname="tables")
    with server.connect() as connection:
        for number in range(DATABASES):
            connection.execute(f"CREATE DATABASE d{number:03} STRATEGY file_copy".encode())
    yield server
    server.stop()


def test_ten_thousand_tables_become_the_few_that_matter(wide: Server, tmp_path: Path) -> None:
    changed = {f"t{number}" for number in range(700, 710)}
    wide.execute("INSERT INTO t3 SELECT generate_series(1, 20000); ANALYZE t3", dbname="tables")

    async def work() -> None:
        settings = replace(GENEROUS, tables_max=30, database_timeout=20.0)
        async with walker(tmp_path / "spool", wide.conninfo("monitor"), rounds=settings) as walk:
            await walk.rounds.walk()
            seen = walk.stated()
            assert seen.value("pgherd_tables_total", datname="tables") == TABLES
            assert seen.value("pgherd_tables_reported", datname="tables") == 30, "truncated, and says so"
            assert seen.find("pg_stat_user_tables_n_tup_ins", relname="t3")
            with wide.connect("tables") as connection:
                for name in sorted(changed):
                    connection.execute(f"INSERT INTO {name} VALUES (1), (2), (3)".encode())
                connection.execute("SELECT pg_stat_force_next_flush()")
            tracemalloc.start()
            before = tracemalloc.get_traced_memory()[0]
            await walk.rounds.walk()
            kept, peak = (figure - before for figure in tracemalloc.get_traced_memory())
            tracemalloc.stop()
            print(f"{TABLES} tables: {kept / 2**20:.2f} MiB kept, {peak / 2**20:.2f} MiB at the peak")
            assert peak < 2**20 + TABLES * 1500, "a walk's memory grows with what it considers, not with what tables have"
            seen = walk.stated()
            reported = {point.labels["relname"] for point in seen.find("pg_stat_user_tables_n_tup_ins", datname="tables")}
            assert changed <= reported, "what changed since the last walk"
            assert "t3" in reported, "the largest"
            assert len(reported) == 30

    asyncio.run(work())


def test_what_the_budget_doesn_t_reach_waits_its_turn(wide: Server, tmp_path: Path) -> None:
    everything = DATABASES + 2  # "tables" and "postgres"

    async def work() -> None:
        probing = replace(GENEROUS, cost_max=1e-9)
        async with walker(tmp_path / "spool", wide.conninfo("monitor"), rounds=probing) as walk:
            report = await walk.rounds.walk()
            assert (report.reached, report.waiting, report.end) == (1, everything - 1, "cost")
            seen: set[str] = set()
            for number in range(2, everything + 1):
                report = await walk.rounds.walk()
                assert (report.reached, report.waiting) == (1, everything - 1), number
            stated = walk.stated()
            seen = {point.labels["datname"] for point in stated.find("pg_database_size_bytes")}
            assert len(seen) == everything, "round robin: every database once before any twice"
            assert stated.value("pgherd_rounds_databases", state="waiting") == everything - 1
            assert stated.value("pgherd_rounds_walks_total", end="cost") == everything

    asyncio.run(work())


def test_there_are_never_more_than_two_connections(wide: Server, tmp_path: Path) -> None:
    most, stop = [0], threading.Event()

    def watch() -> None:
        with wide.connect() as connection:
            while not stop.is_set():
                count = connection.execute("SELECT count(*) FROM pg_stat_activity WHERE usename = 'monitor'").fetchall()[0][0]
                most[0] = max(most[0], count)

    async def work() -> None:
        async with walker(tmp_path / "spool", wide.conninfo("monitor")) as walk:
            watcher = threading.Thread(target=watch)
            watcher.start()
            try:
                assert (await walk.rounds.walk()).reached == DATABASES + 2
            finally:
                stop.set()
                watcher.join()
            wait_until(
                lambda: wide.execute("SELECT count(*) FROM pg_stat_activity WHERE usename = 'monitor'")[0][0] == 1, 10, "one"
            )

    asyncio.run(work())
    assert most[0] == 2


def test_series_stay_within_their_bound_and_nobody_is_starved(wide: Server, tmp_path: Path) -> None:
    async def work() -> None:
        settings = RoundsConfig(cost_max=1.0, series_max=4_000, database_timeout=20.0)
        async with walker(tmp_path / "spool", wide.conninfo("monitor"), rounds=settings) as walk:
            await walk.rounds.walk()
            stated = [p for p in walk.stated().points if not p.stale and p.labels.get("datname")]
            ours = [p for p in stated if p.name.startswith(("pg_stat_user_", "pg_statio_", "pgherd_table"))]
            assert len(ours) <= 4_000
            assert {p.labels["datname"] for p in ours} >= {"tables", "d000"}

    asyncio.run(work())


def test_locks_refusals_and_drops_cost_what_they_hide_and_no_more(private_postgres: Server, tmp_path: Path) -> None:
    server = private_postgres
    server.create_role("monitor", member_of=["pg_monitor"])
    for name in ("a", "b", "closed", "private"):
        server.create_database(name)
        server.execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)", dbname=name)
    server.execute("ALTER DATABASE closed ALLOW_CONNECTIONS false")
    server.execute("REVOKE CONNECT ON DATABASE private FROM public")
    settings = replace(SAMPLING, lock_timeout=1.0)

    async def work() -> None:
        async with walker(tmp_path / "spool", server.conninfo("monitor"), settings=settings) as walk:
            await walk.rounds.walk()
            seen = walk.stated()
            assert ("rounds", "postgres.privilege", "private") in seen.reasons()
            assert not seen.find("pg_database_size_bytes", datname="private")
            assert seen.value("pgherd_rounds_databases", state="skipped") == 3  # two templates and the closed one
            assert seen.value("pgherd_rounds_databases", state="refused") == 1
            with server.connect("a", autocommit=False) as one, server.connect("b", autocommit=False) as other:
                other.execute("LOCK TABLE t IN ACCESS EXCLUSIVE MODE")
                one.execute("LOCK TABLE pg_catalog.pg_sequence IN ACCESS EXCLUSIVE MODE")

                def drop_b() -> None:
                    """b's turn comes after a's, whose sequences keep the walk waiting."""
                    waiting = "SELECT 1 FROM pg_stat_activity WHERE application_name = 'pgherd-rounds' AND datname = 'a'"
                    wait_until(lambda: server.execute(waiting), 10, "a visit of a")
                    other.close()
                    server.drop_database("b")

                dropper = threading.Thread(target=drop_b)
                dropper.start()
                report = await walk.rounds.walk()
                dropper.join()
            assert report.end == "whole"
            seen = walk.stated()
            assert ("sequences", "postgres.timeout.lock", "a") in seen.reasons()
            assert seen.find("pg_stat_user_tables_n_tup_ins", datname="a"), "the rest of a is known"
            assert any(datname == "b" for _, _, datname in seen.reasons())
            assert seen.ended("pg_database_size_bytes", datname="b")
            server.execute("BEGIN; LOCK TABLE t IN ACCESS EXCLUSIVE MODE; COMMIT", dbname="a")
            with server.connect("a", autocommit=False) as one:
                one.execute("LOCK TABLE t IN ACCESS EXCLUSIVE MODE")
                await walk.rounds.walk()
                seen = walk.stated()
                assert seen.find("pg_stat_user_tables_n_tup_ins", datname="a", relname="t")
                assert seen.ended("pg_stat_user_tables_table_size_bytes", datname="a", relname="t")
                assert seen.ended("pg_stat_user_indexes_size_bytes", datname="a", relname="t")
                assert not [reason for _, reason, datname in seen.reasons() if datname == "a"], "we didn't queue for a size"
            assert not [point for point in walk.stated().points if point.labels.get("datname") == "b"], (
                "said once that it is gone"
            )

    asyncio.run(work())


def test_databases_that_pg_hba_closes_are_refused_and_left_in_peace(private_postgres: Server, tmp_path: Path) -> None:
    server = private_postgres
    server.create_role("monitor", member_of=["pg_monitor"])
    for name in ("a", "b", "c", "d", "open"):
        server.create_database(name)
    hba = server.data_directory / "pg_hba.conf"
    hba.write_text("local a,b,c,d monitor reject\n" + hba.read_text(encoding="utf-8"), encoding="utf-8")
    server.execute("SELECT pg_reload_conf()")

    def refused() -> bool:
        with contextlib.suppress(psycopg.OperationalError):
            server.connect("a", "monitor").close()
            return False
        return True

    wait_until(refused, 10, "the reload")

    async def work() -> None:
        async with walker(tmp_path / "spool", server.conninfo("monitor")) as walk:
            report = await walk.rounds.walk()
            assert (report.reached, report.refused, report.end) == (2, 4, "whole"), "more than three in a row aren't the server"
            assert ("rounds", "postgres.auth", "c") in walk.stated().reasons()
            attempts = [(await walk.rounds.walk()).refused for _ in range(2)]
            assert attempts == [4, 4]
            assert not walk.stated().find("pgherd_probe_unknown", reason="postgres.auth"), "not asked again so soon"
            walk.clock.ahead_s += 3601
            await walk.rounds.walk()
            assert walk.stated().find("pgherd_probe_unknown", reason="postgres.auth")

    asyncio.run(work())


def test_a_server_that_lets_nobody_in_is_tried_once_at_a_time(private_postgres: Server, tmp_path: Path) -> None:
    server = private_postgres
    server.create_role("monitor", member_of=["pg_monitor"])
    server.create_database("a")

    async def work() -> None:
        settings = replace(GENEROUS, database_timeout=0.6)
        async with walker(tmp_path / "spool", server.conninfo("monitor"), rounds=settings) as walk:
            os.kill(server.pid, signal.SIGSTOP)  # the postmaster alone: sessions go on, new ones hang
            try:
                for _ in range(3):
                    report = await walk.rounds.walk()
                    assert (report.reached, report.end) == (0, "hung")
                assert len([task for task in asyncio.all_tasks() if task.get_name().startswith("connect ")]) == 1
            finally:
                os.kill(server.pid, signal.SIGCONT)
            report = await walk.rounds.walk()
            assert (report.reached, report.end) == (2, "whole")

    asyncio.run(work())


def test_a_session_given_up_is_waited_for_before_another_begins(private_postgres: Server, tmp_path: Path) -> None:
    """What was given up may hang at the server for long: the next database isn't visited beside it."""
    server = private_postgres
    server.create_role("monitor", member_of=["pg_monitor"])
    names = ["a", "b", "c"]
    for name in names:
        server.create_database(name)
    patient = replace(SAMPLING, statement_timeout=60.0, lock_timeout=60.0, answer_timeout=60.0)

    def ours() -> int:
        return len(server.execute("SELECT 1 FROM pg_stat_activity WHERE usename = 'monitor'"))

    async def work() -> None:
        settings = replace(GENEROUS, database_timeout=0.6)
        async with walker(tmp_path / "spool", server.conninfo("monitor"), settings=patient, rounds=settings) as walk:
            with contextlib.ExitStack() as stack:
                for name in names:
                    holder = stack.enter_context(contextlib.closing(server.connect(name)))
                    holder.execute("BEGIN; LOCK TABLE pg_sequence IN ACCESS EXCLUSIVE MODE")
                for _ in range(2):
                    report = await walk.rounds.walk()
                    assert report.end == "hung"
                    assert ours() <= 2
            wait_until(lambda: ours() == 1, 10, "the server to end what was given up")
            report = await walk.rounds.walk()
            assert (report.reached, report.end) == (4, "whole")
            assert ours() == 1

    asyncio.run(work())


def test_sessions_that_rounds_and_then_the_sampler_give_up_never_become_three(private_postgres: Server, tmp_path: Path) -> None:
    """Each of the two connections has one that hangs: a new one of either would be the third."""
    server = private_postgres
    server.create_role("monitor", member_of=["pg_monitor"])
    patient = replace(SAMPLING, statement_timeout=60.0, lock_timeout=60.0, answer_timeout=1.0)

    def ours() -> list[int]:
        rows = server.execute("SELECT pid FROM pg_stat_activity WHERE usename = 'monitor' ORDER BY application_name")
        return [int(pid) for (pid,) in rows]

    async def work() -> None:
        settings = replace(GENEROUS, database_timeout=0.6)
        async with walker(tmp_path / "spool", server.conninfo("monitor"), settings=patient, rounds=settings) as walk:
            (sampler,) = ours()
            with contextlib.closing(server.connect("postgres")) as holder:
                holder.execute("BEGIN; LOCK TABLE pg_sequence IN ACCESS EXCLUSIVE MODE")
                assert (await walk.rounds.walk()).end == "hung"
                assert len(ours()) == 2, "the sampler's and the one that rounds gave up"
                os.kill(sampler, signal.SIGSTOP)
                try:
                    for _ in range(3):
                        await walk.bench.cycle()
                        assert walk.bench.condition() == "hung"
                        assert len(ours()) == 2
                finally:
                    os.kill(sampler, signal.SIGCONT)
            wait_until(lambda: not ours(), 10, "the server to end what was given up")
            await walk.bench.cycle()
            assert walk.bench.condition() == "up"
            report = await walk.rounds.walk()
            assert (report.reached, report.end) == (1, "whole")

    asyncio.run(work())


def test_a_standby_is_walked_too_and_a_promotion_starts_anew(private_pair: Pair, tmp_path: Path) -> None:
    primary, standby = private_pair.primary, private_pair.standby
    primary.execute("CREATE TABLE t (id serial PRIMARY KEY); INSERT INTO t DEFAULT VALUES; CREATE UNLOGGED SEQUENCE u")
    primary.create_role("monitor", member_of=["pg_monitor", "pg_read_all_data"])
    private_pair.wait_caught_up()

    async def work() -> None:
        async with walker(tmp_path / "spool", standby.conninfo("monitor")) as walk:
            assert (await walk.rounds.walk()).end == "whole"
            seen = walk.stated()
            assert seen.find("pg_stat_user_tables_table_size_bytes", relname="t")
            assert seen.find("pgherd_sequence_used_ratio", sequencename="t_id_seq")
            assert not seen.find("pgherd_table_xid_age"), "a standby can't know it"
            standby.promote()
            await walk.bench.sampler.cycle()
            assert walk.bench.role() == "primary"
            await walk.rounds.walk()
            seen = walk.stated()
            assert seen.find("pgherd_table_xid_age", relname="t")

    asyncio.run(work())


def test_the_last_connection_slots_are_left_to_others(postgres_fleet: Fleet, tmp_path: Path) -> None:
    server = postgres_fleet.server(settings={"max_connections": "10", "superuser_reserved_connections": "2"})
    server.create_role("monitor", member_of=["pg_monitor"])
    server.create_role("app")

    async def work() -> None:
        async with walker(tmp_path / "spool", server.conninfo("monitor")) as walk:
            assert (await walk.rounds.walk()).end == "whole"
            guests = [psycopg.connect(server.conninfo("app")) for _ in range(5)]
            report = await walk.rounds.walk()
            assert (report.reached, report.end) == (0, "saturated")
            for guest in guests:
                guest.close()

    asyncio.run(work())
    server.stop()


def test_connections_that_come_and_go_leave_no_memory_behind(postgres: Server) -> None:
    """Walks open hundreds a day, an outage thousands: a few KiB each would end the agent within a week."""
    process = psutil.Process()

    async def connect(times: int, conninfo: str) -> None:
        for _ in range(times):
            with contextlib.suppress(ConnectFailed):
                (await dial(conninfo)).finish()

    async def work(conninfo: str) -> int:
        await connect(100, conninfo)
        gc.collect()
        before = process.memory_info().rss
        await connect(300, conninfo)
        gc.collect()
        return process.memory_info().rss - before

    for conninfo in (postgres.conninfo(), postgres.conninfo("nobody_of_that_name")):
        grown = asyncio.run(work(conninfo))
        print(f"{grown / 300:.0f} bytes a connection")
        assert grown < 300 * 2048, "psycopg's trace costs 4.5 KiB each"


@pytest.mark.parametrize(
    ("message", "text", "state"),
    [
        ('connection to server at "h", port 1 failed: Connection refused', None, ""),
        (
            "… failed: FATAL:  28P01: Passwort falsch\nORT:  auth_failed, auth.c:326",
            "… failed: FATAL:  Passwort falsch",
            "28P01",
        ),
        ("… failed: ФАТАЛЬНО:  53300: слишком много\nDETAIL:  x\nПОЛОЖЕНИЕ:  f, proc.c:1", None, "53300"),
        ("… failed: FATAL:  role does not exist", None, ""),
    ],
)
def test_why_a_connection_was_refused_is_known_in_any_language(message: str, text: str | None, state: str) -> None:
    assert told(message)[1] == state
    if text is not None:
        assert told(message)[0] == text


def test_what_is_known_is_repeated_with_its_age_and_ends_with_the_server(private_postgres: Server, tmp_path: Path) -> None:
    server = private_postgres
    server.create_role("monitor", member_of=["pg_monitor"])

    async def work() -> None:
        async with walker(tmp_path / "spool", server.conninfo("monitor")) as walk:
            task = asyncio.create_task(walk.rounds.run())
            try:
                await _seen(walk.stated, "pg_database_size_bytes")
                walk.clock.ahead_s += REPEAT_S
                seen = await _seen(walk.stated, "pg_database_size_bytes")
                assert REPEAT_S <= seen.value("pgherd_rounds_age_seconds", datname="postgres") < REPEAT_S + 60
                assert seen.find("pgherd_rounds_databases", state="reached")
                server.stop()
                await walk.bench.sampler.cycle()
                ended = await _seen(walk.stated, "pg_database_size_bytes", ended=True)
                assert ended.ended("pgherd_rounds_age_seconds", datname="postgres")
                server.start()
                await walk.bench.sampler.cycle()
                assert (await _seen(walk.stated, "pg_database_size_bytes")).points
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    asyncio.run(work())


async def _seen(stated: Callable[[], Stated], name: str, *, ended: bool = False) -> Stated:
    """What is stated as soon as `name` is stated, or ended."""
    gathered: list[Point] = []
    async with asyncio.timeout(20):
        while True:
            gathered += stated().points
            seen = Stated(gathered)
            if seen.ended(name) if ended else seen.find(name):
                return seen
            await asyncio.sleep(0.05)

"""Who runs long, who waits, who blocks whom: checked against sessions that do exactly that."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from support.postgres import Fleet, Server
from support.sampling import Decoded, cycle_until, sampling
from support.waiting import wait_until

pytestmark = pytest.mark.pg

MAJORS = [15, 17, 18]
SECRET = "hunter2secret"


@pytest.fixture
def server(request: pytest.FixtureRequest, postgres_fleet: Fleet) -> Iterator[Server]:
    made = postgres_fleet.server(request.param, settings={"max_prepared_transactions": "5", "autovacuum": "off"})
    made.create_role("monitor", member_of=["pg_monitor"])
    made.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
    made.execute("INSERT INTO t VALUES (1, 'x')")
    yield made
    made.stop()


def run_in_thread(connection: psycopg.Connection[object], statement: str) -> threading.Thread:
    def work() -> None:
        with contextlib.suppress(psycopg.Error):
            connection.execute(statement.encode())

    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.mark.parametrize("server", MAJORS, indirect=True)
def test_a_lock_pile_up_names_its_root_without_anybodys_data(server: Server, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        root, middle, leaf = (stack.enter_context(psycopg.connect(server.conninfo())) for _ in range(3))
        pids = {name: link.info.backend_pid for name, link in (("root", root), ("middle", middle), ("leaf", leaf))}
        root.execute(f"UPDATE t SET v = '{SECRET}' WHERE id = 1")
        threads = [run_in_thread(middle, f"UPDATE t SET v = '{SECRET}' || 7 WHERE id = 1 -- {SECRET}")]
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        wait_until(lambda: server.execute(waiting) == [(1,)], 10, "the first waiter")
        threads.append(run_in_thread(leaf, "LOCK TABLE t IN ACCESS EXCLUSIVE MODE"))
        wait_until(lambda: server.execute(waiting) == [(2,)], 10, "the second waiter")

        async def work() -> None:
            async with sampling(tmp_path / "spool", server.conninfo("monitor")) as bench:
                seen = await bench.cycle()
                assert seen.value("pgherd_blocked_sessions") == 2
                pairs = {(p.labels["blocked_pid"], p.labels["blocker_pid"]) for p in seen.find("pgherd_blocking")}
                assert (str(pids["middle"]), str(pids["root"])) in pairs
                assert (str(pids["leaf"]), str(pids["root"])) in pairs
                (first,) = seen.find("pgherd_blocking", blocked_pid=str(pids["middle"]))
                assert first.labels["blocker_state"] == "idle in transaction"
                assert first.labels["blocker_waits"] == "false"
                assert first.labels["blocker_query"] == "UPDATE t SET v = ? WHERE id = ?"
                assert first.labels["blocked_query"] == "UPDATE t SET v = ? || ? WHERE id = ?"
                assert first.value > 0
                events = {p.labels["wait_event"]: p.value for p in seen.find("pgherd_wait_events", wait_event_type="Lock")}
                assert sum(events.values()) == 2
                assert "transactionid" in events
                assert SECRET not in str(seen.points)
                longest = seen.value("pgherd_blocked_longest_seconds")
                (told,) = server.execute("SELECT extract(epoch FROM now() - min(waitstart)) FROM pg_locks WHERE NOT granted")[0]
                assert 0 < longest <= float(told) + 1
                locks = seen.value("pg_locks_count", datname="postgres", mode="accessexclusivelock")
                assert locks == 1, "waited for, not held"
                root.rollback()
                for link, thread in zip((middle, leaf), threads, strict=True):
                    await asyncio.to_thread(thread.join, 10)
                    link.rollback()
                free = await cycle_until(bench, lambda d: d.value("pgherd_blocked_sessions") == 0, "nobody waiting")
                assert free.value("pgherd_blocked_longest_seconds") == 0
                assert not free.find("pgherd_blocking")

        try:
            asyncio.run(work())
        finally:
            root.rollback()
            for link, thread in zip((middle, leaf), threads, strict=True):
                thread.join(10)
                link.rollback()


def ages(server: Server, seen: Decoded) -> None:
    """The ages that the server itself tells are those that were sampled, within what passed in between."""
    told = dict(
        server.execute(
            """
            SELECT 'transaction', extract(epoch FROM clock_timestamp() - min(xact_start))::float8 FROM pg_stat_activity
            WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'
            UNION ALL SELECT 'idle_in_transaction', extract(epoch FROM clock_timestamp() - min(state_change))::float8
            FROM pg_stat_activity WHERE state = 'idle in transaction'
            UNION ALL SELECT 'prepared', extract(epoch FROM clock_timestamp() - min(prepared))::float8 FROM pg_prepared_xacts
            """
        )
    )
    for kind, age in told.items():
        sampled = seen.value("pgherd_oldest_seconds", kind=kind)
        assert age - 5 < sampled <= age, kind


@pytest.mark.parametrize("server", [18], indirect=True)  # it has to wait for 10 s
def test_old_transactions_are_told_by_kind(server: Server, tmp_path: Path) -> None:
    with psycopg.connect(server.conninfo()) as idle, psycopg.connect(server.conninfo()) as sleeper:
        with psycopg.connect(server.conninfo()) as preparing:
            preparing.execute("INSERT INTO t VALUES (2, 'y')")
            preparing.execute("PREPARE TRANSACTION 'p'")
        idle.execute("INSERT INTO t VALUES (3, 'z')")
        idle.execute(f"SELECT '{SECRET}'")
        thread = run_in_thread(sleeper, f"SELECT pg_sleep(60), '{SECRET}'")

        async def work() -> None:
            async with sampling(tmp_path / "spool", server.conninfo("monitor")) as bench:
                seen = await bench.cycle()
                ages(server, seen)
                assert seen.value("pgherd_oldest_xmin_age", holder="session") >= 0
                assert seen.value("pgherd_oldest_xmin_age", holder="prepared") >= 1
                old = await cycle_until(
                    bench, lambda d: len(d.find("pgherd_long_query_seconds")) == 2, "both beyond 10 s", timeout_s=40
                )
                for kind in ("query", "idle_in_transaction", "prepared"):
                    assert old.value("pgherd_long_transactions", kind=kind) == 1
                assert old.value("pgherd_long_transactions", kind="transaction") == 2
                texts = {p.labels["state"]: p.labels["query"] for p in old.find("pgherd_long_query_seconds")}
                assert texts == {"active": "SELECT pg_sleep(?), ?", "idle in transaction": "SELECT ?"}
                assert all(p.value > 10 for p in old.find("pgherd_long_query_seconds"))
                assert SECRET not in str(old.points)

        try:
            asyncio.run(work())
        finally:
            sleeper.cancel()
            thread.join(10)
            idle.rollback()
    server.execute("ROLLBACK PREPARED 'p'")

"""Proofs of the rules about sessions that hinder each other."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import psycopg
import pytest

from support.postgres import Fleet, Server
from support.proving import Node, Proving, proving

pytestmark = [pytest.mark.pg, pytest.mark.fault, pytest.mark.slow, pytest.mark.peers, pytest.mark.timeout(240)]

SHORTENED = {
    "Deadlocks": {"[5m]": "[10s]"},
    "IdleInTransaction": {"> 300": "> 2", "> 900": "> 6"},
    "LongTransaction": {"> 3600": "> 8", "> 50000000": "> 50"},
}


@dataclass
class Site:
    herd: Proving
    server: Server


@pytest.fixture(scope="module")
def site(postgres_fleet: Fleet) -> Iterator[Site]:
    server = postgres_fleet.server(settings={"deadlock_timeout": "10ms", "max_prepared_transactions": "2"})
    server.execute("CREATE TABLE account (id int PRIMARY KEY, balance int); INSERT INTO account VALUES (1, 0), (2, 0)")
    with proving(SHORTENED) as herd:
        herd.agent("watcher", [Node("busy", "c1", server)])
        yield Site(herd, server)
    server.stop()


def waiting_for(server: Server, statement: str, count: int) -> contextlib.ExitStack:
    """That many sessions that run `statement` and wait; leaving the stack ends the sessions."""
    stack = contextlib.ExitStack()
    for _ in range(count):
        connection = stack.enter_context(server.connect())

        def run(connection: psycopg.Connection[object] = connection) -> None:
            with contextlib.suppress(psycopg.Error):
                connection.execute(statement)

        thread = threading.Thread(target=run)
        thread.start()
        stack.callback(thread.join, 20)
    return stack


def test_blocked_sessions(site: Site) -> None:
    """Six sessions wait for a row that a seventh holds."""
    labels = {"node": "busy", "cluster": "c1", "severity": "warning"}
    with site.server.connect(autocommit=False) as holder:
        holder.execute("UPDATE account SET balance = balance + 1 WHERE id = 1")
        with waiting_for(site.server, "UPDATE account SET balance = balance - 1 WHERE id = 1", 6):
            site.herd.fires("BlockedSessions", **labels)
            holder.rollback()
            site.herd.resolves("BlockedSessions", **labels)


def test_idle_in_transaction(site: Site) -> None:
    """A session begins a transaction, reads, and goes to lunch."""
    labels = {"node": "busy", "cluster": "c1"}
    with site.server.connect(autocommit=False) as idler:
        idler.execute("SELECT balance FROM account WHERE id = 1")
        site.herd.fires("IdleInTransaction", severity="warning", **labels)
        site.herd.fires("IdleInTransaction", severity="critical", **labels)
        idler.rollback()
        site.herd.resolves("IdleInTransaction", severity="critical", **labels)
        site.herd.resolves("IdleInTransaction", severity="warning", **labels)


def test_long_transaction(site: Site) -> None:
    """A report that runs and runs; a prepared transaction that nobody ends."""
    labels = {"node": "busy", "severity": "warning", "reason": "duration"}
    with waiting_for(site.server, "SELECT pg_sleep(60)", 1) as report, site.server.connect(autocommit=False) as forgetful:
        forgetful.execute("UPDATE account SET balance = 0 WHERE id = 2")
        forgetful.execute("PREPARE TRANSACTION 'forgotten'")
        site.herd.fires("LongTransaction", kind="transaction", **labels)
        site.herd.fires("LongTransaction", kind="prepared", **labels)
        site.server.execute("ROLLBACK PREPARED 'forgotten'")
        site.server.execute("SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(60)'")
        report.close()
        site.herd.resolves("LongTransaction", kind="prepared", **labels)
        site.herd.resolves("LongTransaction", kind="transaction", **labels)


def test_oldest_snapshot(site: Site) -> None:
    """A session keeps a snapshot while sixty transactions pass."""
    labels = {"node": "busy", "severity": "warning", "reason": "snapshot", "holder": "session"}
    with site.server.connect(autocommit=False) as reader:
        reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        reader.execute("SELECT count(*) FROM account")
        for _ in range(60):
            site.server.execute("UPDATE account SET balance = balance + 1 WHERE id = 1")
        site.herd.fires("LongTransaction", **labels)
        reader.rollback()
        site.herd.resolves("LongTransaction", **labels)


def test_deadlocks(site: Site) -> None:
    """Two sessions take two rows in opposite order, again and again."""
    labels = {"node": "busy", "datname": "postgres", "severity": "warning"}
    stop = threading.Event()

    def quarrel(first: int, second: int) -> None:
        with site.server.connect(autocommit=False) as connection:
            while not stop.is_set():
                with contextlib.suppress(psycopg.errors.DeadlockDetected):
                    connection.execute("UPDATE account SET balance = 0 WHERE id = %s", [first])
                    connection.execute("SELECT pg_sleep(0.05)")
                    connection.execute("UPDATE account SET balance = 0 WHERE id = %s", [second])
                connection.rollback()

    sessions = [threading.Thread(target=quarrel, args=rows) for rows in ((1, 2), (2, 1))]
    for session in sessions:
        session.start()
    try:
        site.herd.fires("Deadlocks", **labels)
    finally:
        stop.set()
        for session in sessions:
            session.join(20)
    site.herd.resolves("Deadlocks", **labels)

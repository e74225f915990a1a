"""Proofs of the four thresholds that pgherd is judged by: disk > 80 %, connections > 90 %, P99 > 1000 ms, lag > 10 s."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from support.link import Link
from support.postgres import Fleet, Server
from support.proving import Node, Proving, proving, small_volume
from support.waiting import wait_until

pytestmark = [pytest.mark.pg, pytest.mark.fault, pytest.mark.slow, pytest.mark.timeout(240)]


@dataclass
class Site:
    herd: Proving
    server: Server
    standby: Server
    link: Link


@pytest.fixture(scope="module")
def site(postgres_fleet: Fleet) -> Iterator[Site]:
    """A primary whose standby streams through a link that can be cut, watched with no more than pg_monitor."""
    server = postgres_fleet.server(settings={"max_connections": "30"})
    server.create_role("pgherd", member_of=["pg_monitor"])
    standby = postgres_fleet.standby(server, {"max_connections": "30"})
    with Link(server.port) as link, proving() as herd:
        standby.set(primary_conninfo=f"host=127.0.0.1 port={link.port} user=postgres application_name=standby")
        nodes = [Node("alone", "c1", server, role="pgherd"), Node("behind", "c1", standby, role="pgherd")]
        herd.agent("watcher", nodes)
        yield Site(herd, server, standby, link)
    standby.stop()
    server.stop()


@contextlib.contextmanager
def repeating(server: Server, *statements: str, sessions: int = 1) -> Iterator[None]:
    """Sessions that run the statements again and again beside the test."""
    done = threading.Event()

    def loop() -> None:
        with server.connect() as connection:
            while not done.is_set():
                for statement in statements:
                    connection.execute(statement)

    threads = [threading.Thread(target=loop) for _ in range(sessions)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join(20)


def test_disk_space(site: Site, home: Path) -> None:
    """A table in a tablespace on a volume of its own grows until the volume is nine tenths full, and is dropped."""
    volume = home / "volume"
    volume.mkdir()
    labels = {"node": "alone", "cluster": "c1", "mountpoint": str(volume)}
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(small_volume(volume, "size=64m,mode=0755"))
        except (PermissionError, FileNotFoundError) as refused:
            pytest.skip(f"needs the right to mount a tmpfs: {refused}")
        site.server.user.own(volume)
        site.server.execute(f"CREATE TABLESPACE small LOCATION '{volume}'")
        stack.callback(site.server.execute, "DROP TABLESPACE small")
        site.server.execute("CREATE UNLOGGED TABLE filler (payload text) TABLESPACE small")
        stack.callback(site.server.execute, "DROP TABLE filler; CHECKPOINT")
        site.server.execute("ALTER TABLE filler ALTER payload SET STORAGE PLAIN")

        def fill_to(ratio: float) -> None:
            while (stat := os.statvfs(volume)).f_bavail > (1 - ratio) * stat.f_blocks:
                site.server.execute("INSERT INTO filler SELECT repeat('x', 7000) FROM generate_series(1, 50)")

        fill_to(0.83)
        row = site.herd.fires("DiskSpace", severity="warning", **labels)
        assert 0.80 < row["value"] < 0.90
        assert site.herd.state("DiskSpace", severity="critical", **labels) == ""
        fill_to(0.93)
        site.herd.fires("DiskSpace", severity="critical", **labels)
        site.server.execute("TRUNCATE filler; CHECKPOINT")
        site.herd.resolves("DiskSpace", severity="critical", **labels)
        site.herd.resolves("DiskSpace", severity="warning", **labels)


def test_connections_high(site: Site) -> None:
    """Sessions take all that ordinary roles can have, also the agent's when its connection dies; then they leave."""
    labels = {"node": "alone", "cluster": "c1", "severity": "critical"}
    with contextlib.ExitStack() as sessions:
        for _ in range(30):
            try:
                sessions.enter_context(psycopg.connect(site.server.conninfo("pgherd")))
            except psycopg.OperationalError:  # full
                break
        else:
            raise AssertionError("the server took more sessions than it has slots")
        row = site.herd.fires("ConnectionsHigh", **labels)
        assert row["value"] > 0.9
        assert site.herd.state("InstanceDown", node="alone") in ("", "resolved")
    site.herd.resolves("ConnectionsHigh", **labels)


def test_p99_latency(site: Site) -> None:
    """Some 200 short statements a second; then a few in a hundred take 1.2 s, as after a plan flip; then no more."""
    labels = {"node": "alone", "cluster": "c1", "severity": "warning"}
    with repeating(site.server, "SELECT 1", "SELECT pg_sleep(0.01)", sessions=2):
        with repeating(site.server, "SELECT pg_sleep(1.2)", sessions=6):
            row = site.herd.fires("P99Latency", **labels)
            assert row["value"] > 0.01
        site.herd.resolves("P99Latency", **labels)


def test_replication_lag(site: Site) -> None:
    """The link is cut while the primary writes: what asks the standby alone says 0. Then it is mended."""
    labels = {"node": "behind", "cluster": "c1", "severity": "warning"}
    wait_until(lambda: site.herd.query('pgherd_replication_lag_seconds{node="behind"} < 1'), 30, "a standby that keeps up", 0.2)
    with repeating(site.server, "SELECT pg_logical_emit_message(true, 'proof', 'beat')", "SELECT pg_sleep(0.05)"):
        site.link.cut()
        row = site.herd.fires("ReplicationLag", **labels)
        assert row["value"] > 10
        site.herd.fires("ReplicationBroken", node="behind", severity="critical")
        site.link.mend()
        site.herd.resolves("ReplicationLag", **labels)
        site.herd.resolves("ReplicationBroken", node="behind")

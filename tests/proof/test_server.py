"""Proofs of the rules about what keeps one server's data: slots, archive, pages, transaction ids."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from pgherd.runtime.process import run
from support.postgres import Fleet, Server
from support.proving import Node, Proving, proving

pytestmark = [pytest.mark.pg, pytest.mark.fault, pytest.mark.slow, pytest.mark.peers, pytest.mark.timeout(240)]

SHORTENED = {
    "SlotRetention": {
        "[15m]": "[4s]",
        "offset 15m": "offset 4s",
        "0.5 * min": "0.000001 * min",  # of the machine's free space: nobody fills half of that in a test
    },
    "ArchiverFailing": {"[10m]": "[6s]"},
}


@dataclass
class Site:
    herd: Proving
    slots: Server
    archive: Server
    pages: Server
    old: Server


@pytest.fixture(scope="module")
def site(postgres_fleet: Fleet) -> Iterator[Site]:
    slots = postgres_fleet.server(settings={"max_slot_wal_keep_size": "16MB", "min_wal_size": "32MB", "max_wal_size": "32MB"})
    archive = postgres_fleet.server(settings={"archive_mode": "on", "archive_command": "true"})
    pages = postgres_fleet.server()  # with data checksums, as initdb of the tests makes it
    old = postgres_fleet.server(settings={"wal_level": "logical"})
    with proving(SHORTENED) as herd:
        servers = {"slots": slots, "archive": archive, "pages": pages, "old": old}
        herd.agent("watcher", [Node(alias, alias, server) for alias, server in servers.items()])
        yield Site(herd, slots, archive, pages, old)
    for server in (slots, archive, pages, old):
        server.stop()


@contextlib.contextmanager
def slot(server: Server, name: str) -> Iterator[None]:
    """A physical slot that reserves WAL from now on and has no consumer."""
    server.execute("SELECT pg_create_physical_replication_slot(%s, true)", [name])
    try:
        yield
    finally:
        server.execute("SELECT pg_drop_replication_slot(%s)", [name])


def write_wal(server: Server, segments: int) -> None:
    for _ in range(segments):
        server.execute("SELECT pg_logical_emit_message(false, 'proof', repeat('x', 1000000)); SELECT pg_switch_wal()")


def test_slot_retention_lost(site: Site) -> None:
    """A slot without consumer, WAL beyond max_slot_wal_keep_size, a checkpoint that removes what it needs."""
    labels = {"node": "slots", "slot_name": "forgotten", "reason": "lost", "severity": "critical"}
    with slot(site.slots, "forgotten"):
        write_wal(site.slots, 6)
        site.slots.execute("CHECKPOINT")
        site.herd.fires("SlotRetention", **labels)
    site.herd.resolves("SlotRetention", **labels)


def test_slot_retention_space(site: Site) -> None:
    """A slot without consumer holds back more than the (shortened) share of what is free."""
    labels = {"node": "archive", "slot_name": "greedy", "reason": "space", "severity": "critical"}
    with slot(site.archive, "greedy"):
        write_wal(site.archive, 4)
        site.herd.fires("SlotRetention", **labels)
    site.herd.resolves("SlotRetention", **labels)


def test_slot_retention_inactive(site: Site) -> None:
    """Nobody uses the slot for the whole (shortened) window."""
    labels = {"node": "pages", "slot_name": "unused", "reason": "inactive", "severity": "warning"}
    with slot(site.pages, "unused"):
        site.herd.fires("SlotRetention", **labels)
    site.herd.resolves("SlotRetention", **labels)


def test_archiver_failing(site: Site) -> None:
    """archive_command fails, then works again."""
    labels = {"node": "archive", "severity": "critical", "reason": "failing"}
    site.archive.set(archive_command="false")
    write_wal(site.archive, 1)
    site.herd.fires("ArchiverFailing", **labels)
    site.archive.set(archive_command="true")
    write_wal(site.archive, 1)
    site.herd.resolves("ArchiverFailing", **labels)  # the archiver pauses for a minute after three failures


def test_archiver_behind(site: Site) -> None:
    """Archiving takes longer than writing, and never fails."""
    labels = {"node": "archive", "severity": "warning", "reason": "backlog"}
    site.archive.set(archive_command="sleep 4")
    write_wal(site.archive, 11)
    done = threading.Event()

    def keep_writing() -> None:
        while not done.wait(0.5):
            write_wal(site.archive, 1)

    writer = threading.Thread(target=keep_writing)
    writer.start()
    try:
        site.herd.fires("ArchiverFailing", **labels)
    finally:
        done.set()
        writer.join(20)
    site.archive.set(archive_command="true")
    site.herd.resolves("ArchiverFailing", **labels)


def test_checksum_failure(site: Site) -> None:
    """Bytes of a page on disk are flipped under a stopped server, and read."""
    labels = {"node": "pages", "datname": "postgres", "severity": "critical"}
    site.pages.execute("CREATE TABLE victim AS SELECT g AS id, repeat('v', 500) AS payload FROM generate_series(1, 200) AS g")
    (path,) = site.pages.execute("SELECT pg_relation_filepath('victim')")[0]
    site.pages.stop()
    with (site.pages.data_directory / path).open("r+b") as file:
        file.seek(8192 + 4000)
        byte = file.read(1)
        file.seek(8192 + 4000)
        file.write(bytes([byte[0] ^ 0xFF]))
    site.pages.start()
    with pytest.raises(psycopg.errors.DataCorrupted):
        site.pages.execute("SELECT count(*) FROM victim WHERE payload <> ''")
    site.herd.fires("ChecksumFailure", **labels)
    site.pages.execute("DROP TABLE victim; SELECT pg_stat_reset()")
    site.herd.resolves("ChecksumFailure", **labels)


# Far enough to use 79 % of the ids, and the segment of the commit log that it lies in.
_NEXT_XID = 1_700_000_000
_XIDS_PER_SEGMENT = 8192 * 4 * 32


def test_wraparound(site: Site) -> None:
    """A logical slot without consumer holds back vacuum for 1.7 billion transactions; it is dropped, and all is frozen."""
    labels = {"node": "old", "kind": "xid"}
    site.old.execute("SELECT pg_create_logical_replication_slot('abandoned', 'pgoutput')")
    site.old.stop()
    segment = site.old.data_directory / "pg_xact" / f"{_NEXT_XID // _XIDS_PER_SEGMENT:04X}"
    segment.write_bytes(bytes(256 * 1024))
    site.old.user.own(segment)
    argv: list[str | Path] = [
        site.old.binaries.program("pg_resetwal"),
        "--next-transaction-id",
        str(_NEXT_XID),
        "-D",
        site.old.data_directory,
    ]
    run(argv, timeout_s=60, user=site.old.user.child_user, group=site.old.user.child_group).require_success()
    site.old.start()
    site.herd.fires("Wraparound", severity="warning", **labels)
    row = site.herd.fires("Wraparound", severity="critical", **labels)
    assert 0.75 < row["value"] < 0.85
    site.old.execute("SELECT pg_drop_replication_slot('abandoned')")
    site.old.execute("ALTER DATABASE template0 ALLOW_CONNECTIONS true")
    for (database,) in site.old.execute("SELECT datname FROM pg_database"):
        site.old.execute("VACUUM (FREEZE)", dbname=database)
    site.herd.resolves("Wraparound", severity="critical", **labels)
    site.herd.resolves("Wraparound", severity="warning", **labels)

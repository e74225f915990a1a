"""Families whose values can be checked against the server: what is sampled is what the server says, on every tested major."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from support.postgres import Fleet, Server
from support.sampling import Decoded, cycle_until, sampling
from support.waiting import wait_until

pytestmark = pytest.mark.pg

MAJORS = [15, 17, 18]
SETTINGS = {
    "wal_level": "logical",
    "archive_mode": "on",
    "archive_command": "false",
    "autovacuum": "off",
    "max_logical_replication_workers": "4",
    "track_io_timing": "on",
}


@pytest.fixture(scope="module", params=MAJORS)
def server(request: pytest.FixtureRequest, postgres_fleet: Fleet) -> Iterator[Server]:
    made = postgres_fleet.server(request.param, settings=SETTINGS)
    made.create_role("monitor", member_of=["pg_monitor"])
    yield made
    made.stop()


def sampled(server: Server, directory: Path, work: Callable[[Decoded], None]) -> None:
    async def once() -> None:
        async with sampling(directory, server.conninfo("monitor")) as bench:
            work(await bench.cycle())

    asyncio.run(once())


def number(server: Server, query: str) -> float:
    return float(server.execute(query)[0][0])


def test_checkpoints_and_buffers_have_one_spelling_on_every_major(server: Server, tmp_path: Path) -> None:
    server.execute("CREATE TABLE big AS SELECT generate_series(1, 20000) AS id")
    for _ in range(2):
        server.execute("CHECKPOINT")
        server.execute("INSERT INTO big SELECT generate_series(1, 100)")
    if server.major >= 17:
        view, columns = "pg_stat_checkpointer", {"requested": "num_requested", "written": "buffers_written"}
    else:
        view, columns = "pg_stat_bgwriter", {"requested": "checkpoints_req", "written": "buffers_checkpoint"}
    told = {name: number(server, f"SELECT {column} FROM {view}") for name, column in columns.items()}

    def judge(seen: Decoded) -> None:
        assert seen.value("pg_stat_checkpointer_num_requested_total") == told["requested"] >= 2
        assert seen.value("pg_stat_bgwriter_checkpoints_req_total") == told["requested"]
        assert seen.value("pg_stat_bgwriter_buffers_checkpoint_total") == told["written"] > 0
        assert seen.value("pg_stat_checkpointer_buffers_written_total") == told["written"]
        assert seen.value("pg_stat_bgwriter_checkpoint_write_time_total") == seen.value("pg_stat_checkpointer_write_time_total")
        told_alloc = number(server, "SELECT buffers_alloc FROM pg_stat_bgwriter")
        assert 0 <= seen.value("pg_stat_bgwriter_buffers_alloc_total") <= told_alloc
        assert seen.value("pg_stat_bgwriter_buffers_backend_fsync_total") >= 0
        grown = number(server, "SELECT pg_relation_size('big') / 8192")
        assert seen.value("pg_stat_bgwriter_buffers_backend_total") >= grown, "a backend made the table that long itself"
        assert all(p.counter and p.start_unix_ns for p in seen.find("pg_stat_bgwriter_buffers_alloc_total"))

    sampled(server, tmp_path / "spool", judge)


def test_io_slru_and_wal(server: Server, tmp_path: Path) -> None:
    def judge(seen: Decoded) -> None:
        assert seen.find("pg_stat_slru_blks_hit_total")
        records = number(server, "SELECT wal_records FROM pg_stat_wal")
        assert 0 < seen.value("pg_stat_wal_records_total") <= records
        assert 0 < seen.value("pg_stat_wal_bytes_total") <= number(server, "SELECT wal_bytes FROM pg_stat_wal")
        if server.major < 16:
            assert not seen.find("pg_stat_io_reads_total")
            return
        where = {"backend_type": "client backend", "object": "relation", "context": "normal"}
        what = "FROM pg_stat_io WHERE backend_type = 'client backend' AND object = 'relation' AND context = 'normal'"
        assert 0 < seen.value("pg_stat_io_hits_total", **where) <= number(server, f"SELECT hits {what}")
        extended = "extends * 8192" if server.major < 18 else "extend_bytes"
        assert seen.value("pg_stat_io_extend_bytes_total", **where) == number(server, f"SELECT {extended} {what}")

    sampled(server, tmp_path / "spool", judge)


def test_the_archivers_backlog_is_counted_and_its_failure_told(server: Server, tmp_path: Path) -> None:
    server.execute("SELECT pg_switch_wal()")
    wait_until(lambda: server.execute("SELECT failed_count > 0 FROM pg_stat_archiver") == [(True,)], 30, "a failure")

    def judge(seen: Decoded) -> None:
        told = number(server, "SELECT count(*) FROM pg_ls_archive_statusdir() WHERE name LIKE '%.ready'")
        assert 1 <= seen.value("pgherd_wal_ready_segments") <= told
        assert seen.value("pgherd_stat_archiver_failing") == 1
        assert seen.value("pg_stat_archiver_failed_count") >= 1

    sampled(server, tmp_path / "spool", judge)


def test_wraparound_positions_and_pending_restarts(server: Server, tmp_path: Path) -> None:
    server.set(max_connections="61")
    try:

        def judge(seen: Decoded) -> None:
            oldest = number(server, "SELECT max(age(datfrozenxid)) FROM pg_database")
            ratio = seen.value("pgherd_wraparound_ratio", kind="xid")
            assert oldest - 50 <= ratio * 2**31 <= oldest
            assert seen.value("pgherd_xid_age", datname="postgres") <= oldest
            assert seen.value("pgherd_mxid_age", datname="postgres") == number(
                server, "SELECT mxid_age(datminmxid) FROM pg_database WHERE datname = 'postgres'"
            )
            assert 0 <= seen.value("pgherd_wraparound_ratio", kind="mxid") < 1
            assert seen.value("pgherd_settings_pending_restart") >= 1
            position = seen.value("pgherd_wal_position_bytes", position="flush")
            assert position <= number(server, "SELECT pg_current_wal_lsn() - '0/0'")
            assert seen.value("pgherd_wal_position_bytes", position="insert") >= position
            assert not seen.find("pgherd_wal_position_bytes", position="replay")
            assert seen.value("pgherd_timeline") == 1
            assert seen.value("pgherd_temp_bytes") == 0
            assert seen.value("pgherd_sync_standbys_required") == 0

        wait_until(lambda: bool(server.execute("SELECT 1 FROM pg_settings WHERE pending_restart")), 10, "the reload")
        sampled(server, tmp_path / "spool", judge)
    finally:
        server.execute("ALTER SYSTEM RESET max_connections")
        server.execute("SELECT pg_reload_conf()")


def test_a_running_vacuum_shows_how_far_it_is(server: Server, tmp_path: Path) -> None:
    server.execute("CREATE TABLE IF NOT EXISTS slow AS SELECT generate_series(1, 40000) AS id")

    async def work() -> None:
        async with sampling(tmp_path / "spool", server.conninfo("monitor")) as bench:
            with psycopg.connect(
                server.conninfo(options="-c vacuum_cost_delay=100 -c vacuum_cost_limit=1"), autocommit=True
            ) as link:
                thread = threading.Thread(target=lambda: cancelled(link, "VACUUM (FREEZE) slow"))
                thread.start()
                try:
                    seen = await cycle_until(bench, lambda d: bool(d.find("pgherd_progress_ratio", kind="vacuum")), "progress")
                    (vacuum,) = seen.find("pgherd_progress_ratio", kind="vacuum")
                    assert 0 <= vacuum.value < 1
                    assert vacuum.labels["pid"] == str(link.info.backend_pid)
                    assert vacuum.labels["datname"] == "postgres"
                    pages = number(server, "SELECT pg_relation_size('slow') / 8192")
                    assert seen.value("pgherd_progress_total", kind="vacuum") == pages
                finally:
                    link.cancel()
                    thread.join(10)

    asyncio.run(work())


def cancelled(link: psycopg.Connection[object], statement: str) -> None:
    """Run what will be cancelled."""
    try:
        link.execute(statement.encode())
    except psycopg.errors.QueryCanceled:
        return


def test_subscriptions_and_decoding(server: Server, tmp_path: Path) -> None:
    source, target = server.create_database("source"), server.create_database("target")
    try:
        server.execute("CREATE TABLE t (id int PRIMARY KEY)", dbname=source)
        server.execute("CREATE PUBLICATION p FOR TABLE t", dbname=source)
        server.execute("SELECT pg_create_logical_replication_slot('sub', 'pgoutput')", dbname=source)
        server.execute("CREATE TABLE t (id int PRIMARY KEY)", dbname=target)
        server.execute("INSERT INTO t VALUES (7)", dbname=target)
        conninfo = server.conninfo(dbname=source).replace("'", "''")
        server.execute(
            f"CREATE SUBSCRIPTION sub CONNECTION '{conninfo}' PUBLICATION p WITH (create_slot = false, copy_data = false)",
            dbname=target,
        )
        server.execute("INSERT INTO t VALUES (1)", dbname=source)
        wait_until(lambda: bool(server.execute("SELECT 1 FROM t WHERE id = 1", dbname=target)), 30, "logical replication")

        async def work() -> None:
            async with sampling(tmp_path / "spool", server.conninfo("monitor")) as bench:
                seen = await cycle_until(
                    bench, lambda d: d.value("pgherd_subscription_running", subname="sub") == 1, "the worker to be seen"
                )
                assert seen.value("pgherd_subscription_enabled", datname="target", subname="sub") == 1
                assert seen.value("pgherd_subscription_heard_age_seconds", subname="sub") < 30
                assert seen.value("pgherd_subscription_apply_errors_total", subname="sub") == 0
                (active,) = seen.find("pg_replication_slots_active", slot_name="sub")
                assert active.labels["database"] == "source"
                server.execute("INSERT INTO t VALUES (7)", dbname=source)  # a conflict
                errors = "SELECT apply_error_count > 0 FROM pg_stat_subscription_stats"
                wait_until(lambda: server.execute(errors) == [(True,)], 30, "an apply error")
                broken = await bench.cycle()
                assert broken.value("pgherd_subscription_apply_errors_total", subname="sub") >= 1
                if server.major >= 18:
                    assert broken.value("pgherd_subscription_conflicts_total", subname="sub") >= 1

        asyncio.run(work())
        server.execute("ALTER SUBSCRIPTION sub DISABLE", dbname=target)

        def judge(seen: Decoded) -> None:
            assert seen.value("pgherd_subscription_enabled", subname="sub") == 0
            assert seen.find("pgherd_replication_slot_decoded_txns_total", slot_name="sub")

        wait_until(
            lambda: server.execute("SELECT pid FROM pg_stat_subscription WHERE subname = 'sub'") == [(None,)], 10, "its end"
        )
        sampled(server, tmp_path / "again", judge)
    finally:
        server.execute("ALTER SUBSCRIPTION sub SET (slot_name = NONE)", dbname=target)
        server.execute("DROP SUBSCRIPTION sub", dbname=target)
        wait_until(lambda: not server.execute("SELECT 1 FROM pg_replication_slots WHERE active"), 10, "the slot to be free")
        server.execute("SELECT pg_drop_replication_slot('sub')")
        server.drop_database(source)
        server.drop_database(target)


@pytest.mark.parametrize(
    ("names", "required"),
    [("standby", 1), ("FIRST 2 (standby, other)", 2), ("any 1 (*)", 1), ("a, b", 1), ("2 (a, b)", 2), ("", 0)],
)
def test_missing_synchronous_standbys_can_be_counted(
    postgres_pair_sync: Server, tmp_path: Path, names: str, required: int
) -> None:
    primary = postgres_pair_sync
    primary.set(synchronous_standby_names=names)
    wait_until(lambda: primary.execute("SHOW synchronous_standby_names") == [(names,)], 10, "the reload")
    streams = 1 if "standby" in names or "*" in names else 0
    count = "SELECT count(*) FROM pg_stat_replication WHERE sync_state IN ('sync', 'quorum')"
    wait_until(lambda: primary.execute(count) == [(streams,)], 10, "the walsender to know")

    def judge(seen: Decoded) -> None:
        assert seen.value("pgherd_sync_standbys_required") == required
        assert seen.value("pgherd_sync_standbys_streaming") == streams

    sampled(primary, tmp_path / "spool", judge)


@pytest.fixture(scope="module")
def postgres_pair_sync(postgres_fleet: Fleet) -> Iterator[Server]:
    pair = postgres_fleet.pair()
    pair.primary.execute("ALTER ROLE postgres SET synchronous_commit = local")  # nobody waits for who isn't there
    pair.primary.execute("SET synchronous_commit = local; CREATE ROLE monitor LOGIN IN ROLE pg_monitor")
    yield pair.primary
    pair.standby.stop()
    pair.primary.stop()

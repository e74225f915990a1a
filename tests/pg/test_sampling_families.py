"""Every metric family on every tested major, on a primary and its standby, by a role that has only pg_monitor."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from pgherd.agent.probes.catalog import load_catalog
from pgherd.agent.sampler import version_sample
from support.postgres import Fleet, Pair, Server
from support.sampling import Decoded, cycle_until, sampling

pytestmark = pytest.mark.pg

MAJORS = [15, 17, 18]

# What Grafana 9628 and 14114 read of the families that this version samples.
DASHBOARD_NAMES = {
    "pg_up", "pg_static", "pg_postmaster_start_time_seconds", "pg_exporter_last_scrape_duration_seconds",
    "pg_exporter_last_scrape_error", "pg_settings_max_connections", "pg_settings_shared_buffers_bytes",
    "pg_settings_effective_cache_size_bytes", "pg_settings_maintenance_work_mem_bytes", "pg_settings_work_mem_bytes",
    "pg_settings_max_wal_size_bytes", "pg_settings_random_page_cost", "pg_settings_seq_page_cost",
    "pg_settings_max_worker_processes", "pg_settings_max_parallel_workers", "pg_settings_superuser_reserved_connections",
    "pg_settings_max_locks_per_transaction", "pg_stat_activity_count", "pg_stat_activity_max_tx_duration",
    "pg_stat_database_numbackends", "pg_stat_database_xact_commit", "pg_stat_database_xact_rollback",
    "pg_stat_database_tup_fetched", "pg_stat_database_tup_inserted", "pg_stat_database_tup_updated",
    "pg_stat_database_tup_deleted", "pg_stat_database_tup_returned", "pg_stat_database_blks_hit",
    "pg_stat_database_blks_read", "pg_stat_database_conflicts", "pg_stat_database_deadlocks",
    "pg_stat_database_temp_bytes", "pg_stat_database_checksum_failures", "pg_stat_database_session_time",
    "pg_stat_database_active_time_seconds_total", "pg_replication_lag_seconds", "pg_replication_is_replica",
    "pg_stat_archiver_archived_count", "pg_stat_archiver_failed_count", "pg_wal_segments", "pg_wal_size_bytes",
    "pg_wal_lsn_location_bytes", "process_cpu_seconds_total", "process_open_fds", "process_resident_memory_bytes",
    "process_virtual_memory_bytes", "pgherd_disk_total_bytes", "pgherd_disk_used_bytes", "pgherd_disk_avail_bytes",
    "pgherd_connections_used", "pgherd_connections_usable",
}  # fmt: skip


def sample_once(directory: Path, server: Server, body: Callable[[Decoded], None]) -> None:
    async def work() -> None:
        async with sampling(directory, server.conninfo("monitor")) as bench:
            body(await bench.cycle())

    asyncio.run(work())


@pytest.fixture
def monitored_pair(postgres_pair: Pair) -> Pair:
    if not postgres_pair.primary.execute("SELECT 1 FROM pg_roles WHERE rolname = 'monitor'"):
        postgres_pair.primary.create_role("monitor", member_of=["pg_monitor"])
    postgres_pair.wait_caught_up()
    return postgres_pair


@pytest.mark.parametrize("postgres_pair", MAJORS, indirect=True)
def test_primary(monitored_pair: Pair, tmp_path: Path) -> None:
    primary = monitored_pair.primary
    slot = "a_slot"
    primary.execute("SELECT pg_create_physical_replication_slot('a_slot', true)")
    try:
        sample_once(tmp_path / "spool", primary, lambda decoded: judge_primary(primary, decoded, slot))
    finally:
        primary.execute("SELECT pg_drop_replication_slot('a_slot')")


def judge_primary(primary: Server, seen: Decoded, slot: str) -> None:
    assert seen.unknown() == {}
    assert DASHBOARD_NAMES - seen.names() == set()
    assert seen.value("pg_up") == 1
    assert seen.value("pgherd_server_tested", major=str(primary.major)) == 1
    assert seen.value("pg_replication_is_replica") == 0
    assert seen.value("pg_replication_lag_seconds") == 0
    assert seen.value("pg_settings_max_connections") == 60
    assert seen.value("pg_settings_shared_buffers_bytes") == 16 * 1024 * 1024
    assert seen.value("pg_settings_checkpoint_timeout_seconds") == 300
    assert seen.value("pg_settings_wal_segment_size_bytes") == 16 * 1024 * 1024
    assert seen.value("pgherd_connections_usable") == 57
    assert 1 <= seen.value("pgherd_connections_used") < 20
    short = seen.find("pg_static")[0].labels["short_version"]
    assert short.split(".")[0] == str(primary.major)
    assert seen.value("pg_wal_size_bytes") == seen.value("pg_wal_segments") * 16 * 1024 * 1024 > 0
    data = seen.value("pgherd_disk_total_bytes", path_kind="data_directory")
    avail = seen.value("pgherd_disk_avail_bytes", path_kind="data_directory")
    used = seen.value("pgherd_disk_used_bytes", path_kind="data_directory")
    assert 0 < avail < data
    assert used + avail <= data
    (standby,) = seen.find("pg_stat_replication_pg_wal_lsn_diff")
    assert standby.labels["application_name"] == "standby"
    assert standby.labels["state"] == "streaming"
    assert standby.value >= 0
    assert seen.value("pg_replication_slots_active", slot_name=slot) == 0
    assert seen.value("pg_replication_slot_slot_is_active", slot_name=slot, slot_type="physical") == 0
    assert seen.value("pg_replication_slots_pg_wal_lsn_diff", slot_name=slot) >= 0
    assert seen.find("pg_replication_slots_wal_status", slot_name=slot)[0].labels["wal_status"] == "reserved"
    assert seen.find("pg_replication_slot_wal_status", slot_name=slot)
    counters = seen.find("pg_stat_database_xact_commit", datname="postgres")
    assert counters[0].counter
    assert counters[0].value > 0
    assert seen.resource["service.name"] == "pgherd"
    assert seen.resource["pgherd.node"] == "n1"
    assert seen.resource["service.instance.id"].endswith(f":{primary.port}")
    assert len({point.unix_ns for point in seen.points}) == 1
    keys = [(point.name, tuple(sorted(point.labels.items()))) for point in seen.points]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("postgres_pair", MAJORS, indirect=True)
def test_standby_catches_up_to_lag_zero(monitored_pair: Pair, tmp_path: Path) -> None:
    async def work() -> None:
        async with sampling(tmp_path / "spool", monitored_pair.standby.conninfo("monitor")) as bench:
            first = await bench.cycle()
            assert first.unknown() == {}
            assert DASHBOARD_NAMES - {"pg_replication_lag_seconds"} - first.names() == set()
            assert bench.role() == "standby"
            caught_up = lambda seen: [p.value for p in seen.find("pg_replication_lag_seconds")] == [0.0]  # noqa: E731
            seen = await cycle_until(bench, caught_up, "the standby's lag to be 0 on an idle primary")
            assert seen.value("pg_replication_is_replica") == 1
            (status,) = seen.find("pg_stat_wal_receiver_status")
            assert status.value == 2
            assert seen.value("pgherd_replication_receive_lsn_bytes") <= seen.value("pgherd_replication_replay_lsn_bytes")
            assert not seen.find("pgherd_wal_insert_bytes_total")
            assert seen.value("pgherd_wal_receiver_streaming") == 1
            assert 0 <= seen.value("pgherd_wal_receiver_heard_age_seconds") < 60
            assert seen.value("pgherd_recovery_min_apply_delay_seconds") == 0
            assert seen.value("pgherd_timeline") == 1
            position = "SELECT pg_last_wal_replay_lsn() - '0/0'"
            replayed = seen.value("pgherd_wal_position_bytes", position="replay")
            assert 0 < replayed <= float(monitored_pair.standby.execute(position)[0][0])
            assert not seen.find("pgherd_wal_position_bytes", position="insert")

    asyncio.run(work())


def test_damage_to_a_shared_catalog_is_counted_for_no_database(postgres_fleet: Fleet, tmp_path: Path) -> None:
    """A page of pg_shdescription, which belongs to no database: the row of pg_stat_database that counts it has no name.

    Before 18 a query's reading counts for its own database, whatever it reads; only a base backup's counts there.
    """
    server = postgres_fleet.server(18)  # with data checksums, as initdb of the tests makes it
    server.create_role("monitor", member_of=["pg_monitor"])
    (relation,) = server.execute("SELECT pg_relation_filepath('pg_shdescription')")[0]
    server.execute("CHECKPOINT")
    server.stop()
    with (server.data_directory / relation).open("r+b") as file:
        file.seek(4096)
        damaged = bytes(byte ^ 0xFF for byte in file.read(64))
        file.seek(4096)
        file.write(damaged)
    server.start()
    with pytest.raises(psycopg.Error):
        server.execute("SELECT * FROM pg_shdescription")

    def counted(seen: Decoded) -> bool:
        return seen.value("pg_stat_database_checksum_failures", datid="0", datname="") >= 1

    async def work() -> None:
        async with sampling(tmp_path / "spool", server.conninfo("monitor")) as bench:
            seen = await cycle_until(bench, counted, "the damage to be counted")
            assert seen.value("pg_stat_database_checksum_failures", datname="postgres") == 0
            assert not seen.find("pg_stat_database_xact_commit", datname="")

    asyncio.run(work())


def test_a_cut_stream_is_unknown_never_zero(private_pair: Pair, tmp_path: Path) -> None:
    private_pair.primary.create_role("monitor", member_of=["pg_monitor"])
    private_pair.wait_caught_up()

    async def work() -> None:
        async with sampling(tmp_path / "spool", private_pair.standby.conninfo("monitor")) as bench:
            await cycle_until(bench, lambda seen: bool(seen.find("pg_replication_lag_seconds")), "a lag while streaming")
            private_pair.primary.stop()
            cut = await cycle_until(bench, lambda seen: "replication" in seen.unknown(), "the cut to be noticed")
            assert not cut.find("pg_replication_lag_seconds")
            assert cut.unknown()["replication"] == "no_wal_receiver"
            assert cut.value("pg_up") == 1

    asyncio.run(work())


def test_promotion_restart_and_reset_are_followed(private_pair: Pair, tmp_path: Path) -> None:
    private_pair.primary.create_role("monitor", member_of=["pg_monitor"])
    private_pair.wait_caught_up()
    standby = private_pair.standby

    async def work() -> None:
        async with sampling(tmp_path / "spool", standby.conninfo("monitor")) as bench:
            await bench.cycle()
            assert bench.role() == "standby"
            identifier = bench.sampler.status.system_identifier
            standby.promote()
            promoted = await bench.cycle()
            assert bench.role() == "primary"
            assert promoted.value("pg_replication_is_replica") == 0
            assert promoted.find("pgherd_wal_insert_bytes_total")
            assert promoted.value("pgherd_timeline") == 2, "at once, not after the next checkpoint"
            assert not promoted.find("pgherd_wal_receiver_streaming")
            assert {p.labels["position"] for p in promoted.find("pgherd_wal_position_bytes")} == {"insert", "write", "flush"}
            assert promoted.find("pg_settings_max_connections"), "the slow tier is asked again after a role change"
            standby.restart()
            again = await bench.cycle()  # the first statement on the dead connection fails; the cycle doesn't
            assert again.value("pg_up") == 1
            assert again.value("pg_exporter_last_scrape_error") == 0
            assert bench.sampler.status.system_identifier == identifier
            standby.execute("SELECT pg_stat_reset()")
            reset = (await bench.cycle()).find("pg_stat_database_xact_commit", datname="postgres")[0]
            (expected,) = standby.execute(
                "SELECT extract(epoch FROM stats_reset) FROM pg_stat_database WHERE datname = 'postgres'"
            )[0]
            assert abs(reset.start_unix_ns / 1e9 - float(expected)) < 0.01

    asyncio.run(work())


def test_names_in_a_foreign_encoding_are_shown_not_fatal(private_postgres: Server, tmp_path: Path) -> None:
    postgres = private_postgres  # pg_stat_statements keeps the text, which no UTF-8 client can read any more
    postgres.create_role("monitor", member_of=["pg_monitor"])
    name = b"caf\xe9"  # Latin-1 in a shared catalog, as a SQL_ASCII database lets it in
    with psycopg.connect(postgres.conninfo(), autocommit=True) as connection:
        connection.execute("CREATE DATABASE ascii ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0")
    with psycopg.connect(postgres.conninfo(dbname="ascii"), autocommit=True) as connection:
        connection.execute("SET client_encoding TO 'SQL_ASCII'")
        connection.pgconn.exec_(b'CREATE DATABASE "' + name + b"\" ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0")

    def judge(seen: Decoded) -> None:
        assert seen.unknown() == {}
        assert seen.find("pg_stat_database_xact_commit", datname="caf\N{REPLACEMENT CHARACTER}")

    sample_once(tmp_path / "spool", postgres, judge)


def test_unprivileged_role_gets_unknown_not_zero(postgres: Server, tmp_path: Path) -> None:
    if not postgres.execute("SELECT 1 FROM pg_roles WHERE rolname = 'nobody_special'"):
        postgres.create_role("nobody_special")

    async def work() -> None:
        async with sampling(tmp_path / "spool", postgres.conninfo("nobody_special")) as bench:
            seen = await bench.cycle()
            assert seen.value("pg_up") == 1
            assert seen.unknown()["wal_directory"] == "postgres.privilege"
            assert not seen.find("pg_wal_size_bytes")
            assert seen.unknown()["disk_data_directory"] == "data_directory_hidden"
            assert not seen.find("pgherd_disk_avail_bytes")
            assert seen.unknown()["connections"] == "sessions_hidden"
            assert not seen.find("pgherd_connections_used")
            assert not seen.find("pg_stat_activity_count")
            assert seen.value("pg_exporter_last_scrape_error") == 1
            for hidden in ("blocked", "wait_events", "long_running", "long_queries", "blocking", "xmin_holders"):
                assert seen.unknown()[hidden] == "sessions_hidden"
            assert seen.unknown()["wal_ready"] == "postgres.privilege" or not seen.find("pgherd_wal_ready_segments")
            for name in ("pgherd_blocked_sessions", "pgherd_wait_events", "pgherd_long_transactions", "pgherd_oldest_seconds"):
                assert not seen.find(name), "hidden isn't none"
            grants = {p.labels["probe"]: p.labels.get("grant") for p in seen.find("pgherd_probe_unknown")}
            assert {grants[probe] for probe in ("wal_directory", "connections", "blocked", "long_queries")} == {"pg_monitor"}

    asyncio.run(work())


# Families that a version doesn't have; everything else has one spelling on every major.
SINCE = {"stat_wal": 14, "decoding": 14, "subscription_errors": 15, "io": 16}


def test_the_catalogue_covers_every_major_and_newer_ones() -> None:
    catalog = load_catalog()
    names = {probe.name for probe in catalog.for_major(18)}
    for major in (13, 14, 15, 16, 17, 18, 25):
        chosen = [probe.name for probe in catalog.for_major(major)]
        assert set(chosen) == {name for name in names if SINCE.get(name, 0) <= major}
        assert len(chosen) == len(set(chosen)), "a major must have one spelling of each probe"


def test_a_server_newer_than_all_that_was_tested_is_sampled_and_says_so() -> None:
    assert version_sample(180006).value == 1
    newer = version_sample(190000)
    assert (newer.value, newer.labels) == (0, {"major": "19"})


def test_a_series_belongs_to_one_probe() -> None:
    """Else one of them would end what the other one states."""
    for major in (13, 14, 15, 16, 17, 18):
        owners: dict[tuple[str, str], str] = {}
        for probe in load_catalog().for_major(major):
            for column in probe.columns:
                for metric in column.metrics:
                    key = (metric.name, str(column.constants))
                    assert owners.setdefault(key, probe.name) in {probe.name, *SHARED.get(metric.name, ())}, metric.name


# One metric of two probes whose labels never meet.
SHARED = {"pg_stat_database_checksum_failures": ("stat_database", "shared_checksum_failures")}

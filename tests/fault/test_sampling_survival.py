"""Sampling goes on over a failover behind its address, a rotated password, a lock that nobody gives back."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from pgherd.agent.probes.rhythm import PAUSE_MAX_S
from pgherd.runtime.clock import SystemClock
from support.postgres import Fleet, Server
from support.sampling import SAMPLING, cycle_until, sampling

pytestmark = [pytest.mark.pg, pytest.mark.fault]


class ShiftedClock(SystemClock):
    """The system's clock, set forward at will."""

    ahead_s = 0.0

    def mono_s(self) -> float:
        return super().mono_s() + self.ahead_s


class HeldClock(SystemClock):
    """Monotonic time that passes only when the test says so."""

    held_s = 1000.0

    def mono_s(self) -> float:
        return self.held_s


def lead_to(server: Server, address: Path) -> None:
    """From now on the UNIX socket `address` is the server's."""
    link = address / ".s.PGSQL.5432"
    link.unlink(missing_ok=True)
    link.symlink_to(server.socket_directory / f".s.PGSQL.{server.port}")


def test_another_server_behind_the_address_is_told_apart_and_nothing_of_the_old_one_stays(
    postgres_fleet: Fleet, tmp_path: Path
) -> None:
    old, new = postgres_fleet.server(18), postgres_fleet.server(15, own_identifier=True)
    for server in (old, new):
        server.create_role("monitor", member_of=["pg_monitor"])
    old.create_database("only_there")
    address = tmp_path / "address"
    address.mkdir()
    lead_to(old, address)

    async def work() -> None:
        async with sampling(tmp_path / "spool", f"host={address} port=5432 user=monitor") as bench:
            before = await bench.cycle()
            identifier = bench.sampler.status.system_identifier
            assert before.find("pg_stat_io_hits_total")
            assert before.find("pg_stat_database_xact_commit", datname="only_there")
            lead_to(new, address)
            old.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'monitor'")
            after = await bench.cycle()
            assert bench.condition() == "up", "the dead connection is replaced within the tick"
            assert bench.sampler.status.system_identifier != identifier
            assert after.value("pgherd_server_tested", major="15") == 1
            stale = {(p.name, p.labels.get("datname", "")) for p in after.points if p.stale}
            assert ("pg_stat_database_xact_commit", "only_there") in stale
            assert "pg_stat_io_hits_total" in {name for name, _ in stale}, "not even of what 15 doesn't have"
            assert after.find("pg_settings_max_connections"), "the slow tier is asked anew"

    try:
        asyncio.run(work())
    finally:
        old.stop()
        new.stop()


def test_a_password_rotated_while_we_are_connected(private_postgres: Server, tmp_path: Path) -> None:
    private_postgres.create_role("monitor", "old", member_of=["pg_monitor"])
    secret = tmp_path / "password"
    secret.touch(0o600)
    secret.write_text("old\n")

    async def work() -> None:
        conninfo = private_postgres.conninfo("monitor", tcp=True)
        async with sampling(tmp_path / "spool", conninfo, password_file=secret) as bench:
            await bench.cycle()
            private_postgres.execute("ALTER ROLE monitor PASSWORD 'new'")
            assert (await bench.cycle()).value("pg_up") == 1, "who is in stays in"
            secret.write_text("new\n")
            private_postgres.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'monitor'")
            seen = await bench.cycle()
            assert seen.value("pg_up") == 1
            assert seen.value("pgherd_connection_attempts_total") == 2

    asyncio.run(work())


def test_a_lock_that_nobody_gives_back_is_asked_for_ever_more_rarely(private_postgres: Server, tmp_path: Path) -> None:
    private_postgres.create_role("monitor", member_of=["pg_monitor"])
    clock = ShiftedClock()
    settings = replace(SAMPLING, server_share_max=0.005)  # the budget as it is by default

    async def work() -> None:
        async with sampling(tmp_path / "spool", private_postgres.conninfo("monitor"), settings=settings, clock=clock) as bench:
            await bench.cycle()
            with psycopg.connect(private_postgres.conninfo()) as blocker:
                blocker.execute("LOCK TABLE pg_database, pg_authid, pg_subscription IN ACCESS EXCLUSIVE MODE")
                timeouts = []
                for _ in range(12):
                    clock.ahead_s += 10.0
                    seen = await bench.cycle()
                    assert seen.value("pg_up") == 1
                    assert seen.find("pgherd_connections_used"), "running out of connections stays visible"
                    assert seen.value("pgherd_sampling_shed", tier="cycle") == 0, "one lock doesn't cost a whole tier"
                    timeouts.append(seen.value("pgherd_probe_errors_total", probe="stat_database", code="postgres.timeout"))
                assert timeouts[:2] == [1.0, 2.0]
                assert timeouts[-1] <= 5, "two minutes of cycles, and few of them waited"
                blocker.rollback()
            clock.ahead_s += PAUSE_MAX_S
            back = await cycle_until(bench, lambda d: bool(d.find("pg_stat_database_xact_commit")), "the probe to be back")
            assert "stat_database" not in back.unknown()
            assert back.value("pgherd_connection_attempts_total") == 1

    asyncio.run(work())


def test_ticks_in_between_ask_only_the_live_tier_and_end_nothing(private_postgres: Server, tmp_path: Path) -> None:
    private_postgres.create_role("monitor", member_of=["pg_monitor"])
    clock = HeldClock()

    async def work() -> None:
        async with sampling(tmp_path / "spool", private_postgres.conninfo("monitor"), clock=clock) as bench:
            names = []
            for _ in range(12):
                report = await bench.sampler.tick()
                clock.held_s += 1.0
                names.append(report.points)
            assert names[0] > 300
            assert names[10] > 100, "the cycle, ten seconds later"
            assert max(names[1:10]) == names[11] < 15, "the live tier and whether the server answers"

    asyncio.run(work())

"""The sampler beside a server in trouble: it says what is so, holds at most two connections, and goes on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import psycopg
import pytest

from pgherd.agent.config import NodeConfig
from pgherd.agent.probes.connection import APPLICATION_NAME, NodeConnection
from pgherd.agent.probes.pipeline import Question
from pgherd.runtime.clock import SystemClock
from support.postgres import Fleet, Server
from support.sampling import SAMPLING, Bench, Decoded, cycle_until, sampling, until

pytestmark = [pytest.mark.pg, pytest.mark.fault]

QUICK = replace(SAMPLING, interval=0.2, statement_timeout=0.5, connect_timeout=0.5, answer_timeout=0.7)


@pytest.fixture
def server(private_postgres: Server) -> Server:
    private_postgres.create_role("monitor", "right", member_of=["pg_monitor"])
    return private_postgres


async def healthy(bench: Bench) -> Decoded:
    return await cycle_until(bench, lambda _: bench.condition() == "up", "healthy cycle")


def stale_names(seen: Decoded) -> set[str]:
    return {point.name for point in seen.points if point.stale}


def our_backends(server: Server) -> list[psutil.Process]:
    """Server processes that serve the sampler's role, listed without asking the server."""
    found = []
    for process in psutil.Process(server.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            if " monitor " in process.cmdline()[0]:
                found.append(process)
    return found


def test_down_is_told_once_per_series_and_comes_back(server: Server, tmp_path: Path) -> None:
    async def work() -> None:
        async with sampling(tmp_path / "spool", server.conninfo("monitor")) as bench:
            up = await bench.cycle()
            server.stop()
            down = await bench.cycle()
            assert bench.condition() == "down"
            assert bench.role() == "unknown"
            assert down.value("pg_up") == 0
            assert down.unknown() == {"connection": "postgres.unreachable"}
            server_names = {name for name in up.names() if name.startswith(("pg_stat_", "pg_settings_"))}
            assert server_names <= stale_names(down), "every series of the server ends, none stays frozen"
            assert not server_names & down.names()
            still = await bench.cycle()
            assert not stale_names(still) & server_names, "the end of a series is told once"
            server.start()
            back = await bench.cycle()
            assert back.value("pg_up") == 1
            assert server_names <= back.names(), "the slow tier is asked again at once"

    asyncio.run(work())


def test_hung_server_is_hung_with_one_connection_lost_and_one_attempt_pending(server: Server, tmp_path: Path) -> None:
    async def work() -> None:
        async with sampling(tmp_path / "spool", server.conninfo("monitor"), settings=QUICK) as bench:
            await bench.cycle()
            assert len(our_backends(server)) == 1
            server.pause()
            try:
                started = time.monotonic()
                hung = await bench.cycle()
                assert time.monotonic() - started < 5
                assert bench.condition() == "hung"
                assert hung.value("pg_up") == 0
                assert hung.unknown()["connection"] == "postgres.timeout.answer"
                for _ in range(5):
                    assert (await bench.cycle()).unknown() == {"connection": "postgres.timeout.connect"}
                    assert open_sockets(server) <= 2, "the one given up, until the server has ended it, and the attempt"
            finally:
                server.resume()
            seen = await healthy(bench)
            assert seen.value("pgherd_connection_attempts_total") == 2, "the pending attempt was used, no new one made"
            await until(lambda: len(our_backends(server)) == 1, 10, "end of the abandoned backend")

    asyncio.run(work())


def open_sockets(server: Server) -> int:
    """This process's connected UNIX sockets that lead to the server."""
    peer = str(server.socket_directory / f".s.PGSQL.{server.port}")
    mine = {link.fd for link in psutil.Process().net_connections("unix")}
    count = 0
    for fd in mine:
        with contextlib.suppress(OSError):
            twin = socket.socket(fileno=os.dup(fd))
            try:
                count += twin.getpeername() == peer
            finally:
                twin.close()
    return count


def test_hung_backend_alone_costs_the_connection_and_the_next_cycle_works(server: Server, tmp_path: Path) -> None:
    async def work() -> None:
        async with sampling(tmp_path / "spool", server.conninfo("monitor"), settings=QUICK) as bench:
            await bench.cycle()
            (backend,) = our_backends(server)
            os.kill(backend.pid, signal.SIGSTOP)
            try:
                await bench.cycle()
                assert bench.condition() == "hung"
                await bench.cycle()
                assert bench.condition() == "up"
                assert len(our_backends(server)) == 2, "the stopped one and the new one"
            finally:
                os.kill(backend.pid, signal.SIGCONT)

    asyncio.run(work())


def test_backends_that_hang_one_after_the_other_never_become_a_third(server: Server, tmp_path: Path) -> None:
    """A volume that hangs: each session stops at the same question, hears no timeout and doesn't see us go."""

    async def work() -> None:
        async with sampling(tmp_path / "spool", server.conninfo("monitor"), settings=QUICK) as bench:
            stopped: set[int] = set()
            try:
                for _ in range(6):
                    await bench.cycle()
                    backends = our_backends(server)
                    assert len(backends) <= 2
                    for backend in backends:
                        stopped.add(backend.pid)
                        os.kill(backend.pid, signal.SIGSTOP)
                assert bench.condition() == "hung"
                assert len(stopped) == 2
            finally:
                for pid in stopped:
                    os.kill(pid, signal.SIGCONT)
            await healthy(bench)
            await until(lambda: len(our_backends(server)) == 1, 10, "end of the abandoned backends")

    asyncio.run(work())


def test_wrong_password_is_not_down_and_a_rotated_one_is_read_again(server: Server, tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("wrong\n")
    secret.chmod(0o600)

    async def work() -> None:
        conninfo = server.conninfo("monitor", tcp=True)
        async with sampling(tmp_path / "spool", conninfo, settings=QUICK, password_file=secret) as bench:
            refused = await bench.cycle()
            assert bench.condition() == "auth_failed"
            assert refused.value("pg_up") == 0
            assert refused.unknown() == {"connection": "postgres.auth"}
            again = await bench.cycle()
            assert again.value("pgherd_connection_attempts_total") == 1, "a refused role isn't tried every cycle"
            secret.write_text("right\n")
            seen = await healthy(bench)
            assert seen.value("pg_up") == 1
            assert all("right" not in str(point) and "wrong" not in str(point) for point in seen.points)

    asyncio.run(work())


def test_saturated_is_up_and_saturated(postgres_fleet: Fleet, tmp_path: Path) -> None:
    server = postgres_fleet.server(
        settings={"max_connections": "6", "superuser_reserved_connections": "2", "max_wal_senders": "0"}
    )
    server.create_role("monitor", member_of=["pg_monitor"])
    server.create_role("greedy")

    async def work(*, take_reserved: bool) -> None:
        async with sampling(tmp_path / f"spool-{take_reserved}", server.conninfo("monitor")) as bench:
            with contextlib.ExitStack() as stack:
                for _ in range(4):
                    stack.enter_context(contextlib.closing(server.connect(role="greedy")))
                if take_reserved:
                    for _ in range(2):
                        stack.enter_context(contextlib.closing(server.connect()))
                full = await bench.cycle()
                assert bench.condition() == "saturated"
                assert full.value("pg_up") == 1, "saturated isn't down"
                assert full.value("pgherd_node_saturated") == 1
                assert full.unknown() == {"connection": "postgres.saturated"}
                assert not full.find("pgherd_connections_used")
            seen = await healthy(bench)
            assert seen.value("pgherd_node_saturated") == 0
            with contextlib.ExitStack() as stack:  # an established connection sees it through
                for _ in range(3):
                    stack.enter_context(contextlib.closing(server.connect(role="greedy")))
                used = await bench.cycle()
                assert used.value("pgherd_connections_used") / used.value("pgherd_connections_usable") == 1.0

    for take_reserved in (False, True):
        asyncio.run(work(take_reserved=take_reserved))
    server.stop()


def test_saturation_is_recognised_in_any_language() -> None:
    """A server that answers as PostgreSQL does, in German: only the SQLSTATE tells."""
    fields = b"SFATAL\0VFATAL\0C53300\0Mtut mir leid, schon zu viele Verbindungen\0\0"
    answer = b"E" + (len(fields) + 4).to_bytes(4, "big") + fields

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1024)
        writer.write(answer)
        await writer.drain()
        writer.close()

    async def work() -> None:
        from pgherd.agent.config import NodeConfig
        from pgherd.agent.probes.connection import NodeConnection
        from pgherd.proto.errors import TransientError
        from pgherd.runtime.clock import SystemClock

        listener = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        node = NodeConfig("n", "c", f"host=127.0.0.1 port={port} user=x sslmode=disable gssencmode=disable")
        connection = NodeConnection(node, SAMPLING, SystemClock())
        with pytest.raises(TransientError, match="schon zu viele") as caught:
            await connection.open()
        assert caught.value.code == "postgres.saturated"
        await connection.close()
        listener.close()
        await listener.wait_closed()

    asyncio.run(work())


def test_lock_on_a_shared_catalogue_costs_the_probes_that_need_it_only(server: Server, tmp_path: Path) -> None:
    async def work() -> None:
        async with sampling(tmp_path / "spool", server.conninfo("monitor")) as bench:
            await bench.cycle()
            with psycopg.connect(server.conninfo()) as blocker:
                blocker.execute("LOCK TABLE pg_database IN ACCESS EXCLUSIVE MODE")
                started = time.monotonic()
                seen = await bench.cycle()
                assert time.monotonic() - started < 2.5, "lock_timeout per probe, not the blocker's patience"
                assert bench.condition() == "up"
                assert seen.unknown()["stat_database"] == "postgres.timeout.lock"
                assert not seen.find("pg_stat_database_xact_commit")
                assert seen.find("pgherd_connections_used"), "running out of connections stays visible"
                assert seen.find("pg_replication_is_replica")
                blocker.rollback()
            after = await bench.cycle()
            assert after.unknown() == {}
            assert after.value("pgherd_connection_attempts_total") == 1, "the connection was kept"

    asyncio.run(work())


def test_a_slow_server_costs_probes_not_the_rhythm(server: Server, tmp_path: Path) -> None:
    """Every probe at its lock timeout must not add up beyond the cycle's budget."""
    slow = replace(SAMPLING, interval=0.3, lock_timeout=0.25, statement_timeout=0.3)

    async def work() -> None:
        async with sampling(tmp_path / "spool", server.conninfo("monitor"), settings=slow) as bench:
            with psycopg.connect(server.conninfo()) as blocker:
                await bench.cycle()
                blocker.execute("LOCK TABLE pg_database, pg_authid IN ACCESS EXCLUSIVE MODE")
                seen = await bench.cycle()
                assert "cycle_budget" in seen.unknown().values()

    asyncio.run(work())


def test_read_only_and_invisible_to_statement_logs(server: Server, tmp_path: Path) -> None:
    async def work() -> None:
        async with sampling(tmp_path / "spool", server.conninfo("monitor")) as bench:
            await bench.cycle()
            row = server.execute(
                "SELECT application_name, state, xact_start, query FROM pg_stat_activity WHERE usename = 'monitor'"
            )[0]
            assert row[:3] == (APPLICATION_NAME, "idle", None), "no transaction stays open between cycles"

    asyncio.run(work())


def test_timeouts_of_the_role_dont_cut_the_connection(server: Server, tmp_path: Path) -> None:
    server.execute("ALTER ROLE monitor SET idle_session_timeout = '150ms'")
    server.execute("ALTER ROLE monitor SET statement_timeout = '1ms'")

    async def work() -> None:
        async with sampling(tmp_path / "spool", server.conninfo("monitor")) as bench:
            assert (await bench.cycle()).unknown() == {}
            await asyncio.sleep(0.4)  # idle for longer than the role's timeout: that is what is tested
            seen = await bench.cycle()
            assert seen.unknown() == {}
            assert seen.value("pgherd_connection_attempts_total") == 1

    asyncio.run(work())


def test_a_server_that_got_a_hundred_times_slower_is_asked_less_within_three_cycles(server: Server, tmp_path: Path) -> None:
    """Somebody takes a catalog's lock over and over: no timeout is reached, every question takes a hundred times as long."""
    normal = replace(SAMPLING, live_interval=1.0, interval=1.0, lock_timeout=2.0, server_share_max=0.05)
    stop, held = threading.Event(), threading.Event()

    def hold_locks() -> None:
        with psycopg.connect(server.conninfo()) as holder:
            while not stop.is_set():
                with holder.transaction():
                    holder.execute("LOCK TABLE pg_database, pg_authid IN ACCESS EXCLUSIVE MODE")
                    held.set()
                    holder.execute("SELECT pg_sleep(0.15)")

    async def work() -> None:
        async with sampling(tmp_path / "spool", server.conninfo("monitor"), settings=normal) as bench:
            for _ in range(3):
                seen = await bench.cycle()
            assert seen.value("pgherd_sampling_shed", tier="cycle") == 0
            assert 0 < seen.value("pgherd_sampling_budget_ratio") < 1
            thread = threading.Thread(target=hold_locks)
            thread.start()
            try:
                assert held.wait(10)
                cycles = 0
                while seen.value("pgherd_sampling_shed", tier="cycle") == 0:
                    seen = await bench.cycle()
                    cycles += 1
                assert cycles <= 3
                for tier in ("tables", "statements", "slow", "latency"):
                    assert seen.value("pgherd_sampling_shed", tier=tier) == 1, "the order: what a DBA needs goes last"
                shed = await bench.cycle()
                assert shed.unknown()["stat_database"] == "shed"
                assert {p.name for p in shed.points if p.stale} | {p.name for p in seen.points if p.stale} >= {
                    "pg_stat_database_xact_commit"
                }, "nothing of a shed tier stays frozen"
                assert shed.value("pg_up") == 1
                assert shed.find("pgherd_wal_position_bytes", position="insert"), "the live tier goes on"
            finally:
                stop.set()
                thread.join()

    asyncio.run(work())


def spin() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "while True: pass"])


def test_a_busy_machine_alone_sheds_nothing(server: Server, tmp_path: Path) -> None:
    """A backend that waits for a CPU takes long and costs little; /proc tells the two apart."""

    async def work() -> None:
        node = NodeConfig("n", "c", server.conninfo("monitor"))
        connection = NodeConnection(node, replace(SAMPLING, statement_timeout=20.0, answer_timeout=20.0), SystemClock())
        await connection.open()
        (backend,) = our_backends(server)
        (core,) = backend.cpu_affinity()[:1]
        backend.cpu_affinity([core])
        busy = [spin() for _ in range(3)]
        try:
            for process in busy:
                psutil.Process(process.pid).cpu_affinity([core])
            (answer,) = await connection.fetch_many([Question("SELECT count(*) FROM generate_series(1, 2000000)")])
        finally:
            for process in busy:
                process.kill()
                process.wait()
        assert answer.error is None
        assert answer.cost_s < 0.7 * answer.duration_s, "three others had the core"
        assert answer.cost_s >= 0.9 * connection.cpu_s > 0
        await connection.close()

    asyncio.run(work())

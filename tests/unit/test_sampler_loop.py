"""The sampler's loop without a server: rhythm, skipped cycles, the agent's own figures."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path

from pgherd.agent.probes.disk import ask_volume, is_local
from support.sampling import SAMPLING, decode, sampling, until

NOWHERE = "host=/nonexistent-pgherd user=x"


def test_the_agent_reports_itself_with_the_server_away(tmp_path: Path) -> None:
    async def work() -> None:
        async with sampling(tmp_path / "spool", NOWHERE) as bench:
            seen = await bench.cycle()
            assert seen.value("pg_up") == 0
            assert seen.value("pgherd_node_condition", condition="down") == 1
            assert seen.value("process_resident_memory_bytes") > 1e6
            second = await bench.cycle()
            assert second.value("pgherd_points_sampled_total") == len(seen.points)
            assert second.value("pgherd_points_acked_total") == len(seen.points)
            assert second.value("pgherd_probe_errors_total", probe="connection", code="postgres.unreachable") == 2

    asyncio.run(work())


def test_the_loop_keeps_its_rhythm_and_counts_what_it_left_out(tmp_path: Path) -> None:
    async def work() -> None:
        async with sampling(tmp_path / "spool", NOWHERE, settings=replace(SAMPLING, interval=0.05)) as bench:
            task = asyncio.create_task(bench.sampler.run())
            await until(lambda: bench.spool.status.pending_batches >= 3, 10, "three cycles")
            threading.Event().wait(0.3)  # blocks the event loop over several cycles on purpose
            waiting = bench.spool.status.pending_batches
            await until(lambda: bench.spool.status.pending_batches >= waiting + 3, 10, "three more cycles")
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            times = []
            last = None
            while (batch := bench.spool.head()) is not None:
                last = decode(batch.payload)
                times.append(last.points[0].unix_ns)
                bench.spool.release(batch, "acked")
            assert last is not None
            assert last.value("pgherd_sampling_cycles_skipped_total") >= 4
            assert times == sorted(set(times))

    asyncio.run(work())


def test_unreachable_paths_have_a_reason(tmp_path: Path) -> None:
    assert ask_volume(tmp_path / "missing").reason == "not_found"
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert ask_volume(loop).reason == "unreadable"
    assert ask_volume(tmp_path).total_bytes > 0


def test_only_a_local_servers_directory_is_looked_at() -> None:
    assert is_local("/run/postgresql", "")
    assert is_local("localhost", "127.0.0.1")
    assert is_local("x", "::1")
    assert not is_local("db.example.org", "203.0.113.9", dict)
    assert not is_local("db.example.org", "")

"""The soak of all shipped rules: a primary and its standby under a mixed load, and nothing fires.

Half a minute in CI; nightly `PGHERD_SOAK_S=7200`. Rules wait a thirtieth of their `for` here, so the soak is harder to bear than
the product's own pace, and two hours of it stand for two days of pending.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import psutil
import pytest

from pgherd.runtime.process import run, running
from support.postgres import Fleet
from support.proving import Node, proving

SECONDS = float(os.environ.get("PGHERD_SOAK_S", "30"))

pytestmark = [pytest.mark.pg, pytest.mark.slow, pytest.mark.peers, pytest.mark.timeout(SECONDS + 180)]


def test_a_mixed_load_fires_nothing(postgres_fleet: Fleet) -> None:
    """pgbench's read-write mix, its read-only one, and pauses; half-way a checkpoint and a vacuum."""
    pair = postgres_fleet.pair()
    program = pair.primary.binaries.program("pgbench")
    target = ["-h", str(pair.primary.socket_directory), "-p", str(pair.primary.port), "-U", "postgres", "postgres"]
    run([program, "-i", "-q", "-s", "2", *target], timeout_s=60).require_success()
    loads: list[list[str | Path]] = [
        [program, "-n", "-c", "3", "-R", "60", "-T", f"{SECONDS:.0f}", *target],
        [program, "-n", "-S", "-c", "2", "-R", "100", "-T", f"{SECONDS:.0f}", *target],
    ]
    # The machine's own disk is real: one that is full rightly says so.
    expected = {"DiskSpace"} if psutil.disk_usage(str(pair.primary.data_directory)).percent > 77 else set()
    seen: set[str] = set()
    with proving() as herd, contextlib.ExitStack() as stack:
        nodes = [Node("primary", "c1", pair.primary), Node("standby", "c1", pair.standby)]
        herd.agent("watcher", nodes)
        for load in loads:
            stack.enter_context(running(load, new_session=True))
        until_mono_s, half = time.monotonic() + SECONDS, False
        while (left_s := until_mono_s - time.monotonic()) > 0:
            seen |= {row["rule"] for row in herd.alerts() if row["fired_unix_ns"]}
            if left_s < SECONDS / 2 and not half:
                half = True
                pair.primary.execute("CHECKPOINT")
                pair.primary.execute("VACUUM ANALYZE pgbench_accounts")
            time.sleep(min(0.5, left_s))
        evaluated = {
            rule["name"] for group in herd.get("/prometheus/api/v1/rules")["data"]["groups"] for rule in group["rules"]
        }
    assert len(evaluated) >= 25
    assert seen - expected == set()
    pair.standby.stop()
    pair.primary.stop()

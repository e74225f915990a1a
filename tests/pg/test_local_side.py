"""Volumes and host figures of real servers on this machine, also of several under one agent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import tempfile
from pathlib import Path

import pytest

from pgherd.agent.config import AgentConfig, BackupConfig, NodeConfig
from pgherd.agent.preflight.gather import gather
from pgherd.agent.preflight.judge import judge
from pgherd.agent.probes.catalog import load_catalog
from pgherd.agent.probes.host import HostProbe
from pgherd.agent.sampler import NodeSampler
from pgherd.runtime.clock import SystemClock
from support.postgres import Fleet, Server
from support.sampling import AGENT_ID, SAMPLING, Decoded, decode, sampling
from support.spooling import open_spool

pytestmark = pytest.mark.pg


def test_every_directory_is_measured_on_its_own_volume(postgres_fleet: Fleet, tmp_path: Path) -> None:
    server = postgres_fleet.server(settings={"logging_collector": "on", "log_directory": "our_log"})
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        server.user.own(Path(directory))
        server.execute(f"CREATE TABLESPACE fast LOCATION '{directory}'")

        async def work() -> None:
            async with sampling(tmp_path / "spool", server.conninfo()) as bench:
                seen = await bench.cycle()
                assert seen.unknown() == {}
                for kind, path in {
                    "data_directory": server.data_directory,
                    "pg_wal": server.data_directory / "pg_wal",
                    "log_directory": server.data_directory / "our_log",
                    "tablespace:fast": Path(directory),
                }.items():
                    stat = os.statvfs(path)
                    assert seen.value("pgherd_disk_total_bytes", path_kind=kind) == stat.f_blocks * stat.f_frsize
                    used, avail = (seen.value(f"pgherd_disk_{what}_bytes", path_kind=kind) for what in ("used", "avail"))
                    assert seen.value("pgherd_disk_used_ratio", path_kind=kind) == pytest.approx(used / (used + avail))
                    assert seen.value("pgherd_disk_inodes_total", path_kind=kind) == stat.f_files
                assert seen.find("pgherd_disk_avail_bytes", path_kind="tablespace:fast", mountpoint="/dev/shm")
                assert seen.value("pgherd_host_cpus") == os.cpu_count()
                server.stop()
                down = await bench.cycle()
                assert down.value("pg_up") == 0
                assert down.find("pgherd_disk_used_ratio", path_kind="pg_wal"), "the disk that took the server down"
                assert down.find("pgherd_host_load1")

        asyncio.run(work())
        server.start()
        server.execute("DROP TABLESPACE fast")


def test_two_instances_of_one_agent_have_labels_of_their_own(postgres_fleet: Fleet, tmp_path: Path) -> None:
    clock = SystemClock()
    host = HostProbe(clock)
    spool = open_spool(tmp_path / "spool", size_max=1 << 24, segment_max=1 << 18)

    def sampler(alias: str, server: Server) -> NodeSampler:
        node = NodeConfig(alias, "c1", server.conninfo("postgres"))
        return NodeSampler(
            agent_id=AGENT_ID,
            node_id=f"id-{alias}",
            node=node,
            sampling=SAMPLING,
            catalog=load_catalog(),
            spool=spool,
            clock=clock,
            host=host,
        )

    async def work() -> list[Decoded]:
        servers = {alias: postgres_fleet.server() for alias in ("one", "two")}
        async with contextlib.AsyncExitStack() as stack:
            seen = []
            for alias, server in servers.items():
                one = sampler(alias, server)
                stack.push_async_callback(one.close)
                await one.cycle()
                batch = spool.head()
                assert batch is not None
                seen.append(decode(batch.payload))
                spool.release(batch, "acked")
            return seen

    try:
        one, two = asyncio.run(work())
    finally:
        spool.close()
    assert (one.resource["pgherd.node"], two.resource["pgherd.node"]) == ("one", "two")
    assert one.resource["service.instance.id"] != two.resource["service.instance.id"]
    assert one.resource["pgherd.node.id"] != two.resource["pgherd.node.id"]
    # The host is the same one, and says so: max by (host) counts it once.
    for seen in (one, two):
        assert {point.labels["host"] for point in seen.points if point.name.startswith("pgherd_host_")} == {
            socket.gethostname()
        }
    assert one.value("pgherd_host_memory_total_bytes") == two.value("pgherd_host_memory_total_bytes")


def test_a_managed_server_has_everything_but_the_host(postgres: Server, tmp_path: Path) -> None:
    async def work() -> None:
        async with sampling(tmp_path / "spool", postgres.conninfo(), host="remote") as bench:
            seen = await bench.cycle()
            assert seen.unknown() == {"disk": "remote_server", "host": "remote_server"}
            assert not [name for name in seen.names() if name.startswith(("pgherd_disk_", "pgherd_host_"))]
            assert {"pg_stat_database_xact_commit", "pg_stat_activity_count", "pg_wal_size_bytes"} <= seen.names()

    asyncio.run(work())
    config = AgentConfig(state_directory=tmp_path / "state", backup=BackupConfig(enabled=False))
    (finding,) = [
        finding
        for finding in judge(gather(config, NodeConfig("n1", "c1", postgres.conninfo(), host="remote")))
        if finding.check == "sampling.host"
    ]
    assert finding.severity == "info"
    assert "no disk and host series" in finding.message

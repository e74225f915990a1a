"""Where a server's files are: from its own words, the owner's, and never from a guess."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

from pgherd.agent.config import NodeConfig
from pgherd.agent.probes.disk import DiskProbe, Volume, ask_volume
from pgherd.agent.probes.host import HostProbe, parse_pressure
from pgherd.agent.probes.local import LocalProbe
from pgherd.agent.probes.places import TABLESPACES_MAX, places_of
from pgherd.runtime.clock import SystemClock

DATA = Path("/srv/pg/data")


def rows(**facts: str) -> list[dict[str, str]]:
    return [{"fact": name.replace("__", ":"), "value": value} for name, value in facts.items()]


def test_every_place_that_the_server_names() -> None:
    places = places_of(
        rows(
            data_directory=str(DATA), logging_collector="on", log_directory="log", tablespace__fast="/mnt/fast", backend_pid="1"
        )
    )
    assert places.paths == {
        "data_directory": DATA,
        "pg_wal": DATA / "pg_wal",
        "log_directory": DATA / "log",
        "tablespace:fast": Path("/mnt/fast"),
    }
    assert places.unknown == {}


def test_a_role_that_sees_no_settings_knows_only_the_tablespaces() -> None:
    places = places_of(rows(tablespace__fast="/mnt/fast", tablespace__inplace="pg_tblspc/16385"))
    assert places.paths == {"tablespace:fast": Path("/mnt/fast")}
    assert places.unknown == {
        "data_directory": "data_directory_hidden",
        "pg_wal": "data_directory_hidden",
        "log_directory": "log_directory_hidden",
        "tablespace:inplace": "data_directory_hidden",
    }


def test_the_owner_s_word_wins() -> None:
    stated = {"pg_wal": Path("/mnt/wal"), "log_directory": Path("/var/log/pg")}
    places = places_of(rows(data_directory="/inside/container"), data_directory=DATA, stated=stated)
    assert places.paths == {"data_directory": DATA, **stated}
    assert places.unknown == {}


def test_logs_without_a_collector_are_where_stderr_goes() -> None:
    facts = rows(data_directory=str(DATA), logging_collector="off", log_directory="log")
    assert places_of(facts, stderr_directory=Path("/var/log/pg")).paths["log_directory"] == Path("/var/log/pg")
    assert places_of(facts, stderr_directory="hidden").unknown == {"log_directory": "stderr_hidden"}
    nowhere = places_of(facts, stderr_directory="none")
    assert "log_directory" not in nowhere.paths
    assert nowhere.unknown == {}


def test_too_many_tablespaces_are_said_to_be() -> None:
    facts = rows(
        data_directory=str(DATA),
        logging_collector="off",
        **{f"tablespace__t{number:03}": f"/mnt/{number}" for number in range(TABLESPACES_MAX + 1)},
    )
    places = places_of(facts, stderr_directory="none")
    assert sum(kind.startswith("tablespace:") for kind in places.paths) == TABLESPACES_MAX
    assert places.unknown == {"tablespace": "too_many"}


def test_a_volume_is_asked_where_the_path_really_is(tmp_path: Path) -> None:
    (tmp_path / "pg_wal").symlink_to("/dev/shm")
    volume = ask_volume(tmp_path / "pg_wal")
    assert volume.mountpoint == "/dev/shm"
    stat = os.statvfs("/dev/shm")
    assert volume.total_bytes == stat.f_blocks * stat.f_frsize
    assert ask_volume(tmp_path / "gone").reason == "not_found"
    (tmp_path / "round").symlink_to(tmp_path / "round")
    assert ask_volume(tmp_path / "round").reason == "unreadable"


def test_blocks_that_only_root_may_use_count_as_gone() -> None:
    volume = Volume(total_bytes=100, used_bytes=76, avail_bytes=19)  # 5 are root's
    assert volume.used_ratio == pytest.approx(0.8)
    assert Volume().used_ratio is None


def test_a_hung_volume_hangs_nobody_and_is_asked_once(tmp_path: Path) -> None:
    release, asked = threading.Event(), []

    def ask(path: Path) -> Volume:
        asked.append(path)
        if path.name == "dead":
            release.wait(20)
        return Volume(total_bytes=10, used_bytes=5, avail_bytes=5, mountpoint="/")

    async def work() -> None:
        probe = DiskProbe(0.2, ask)
        places = {"data_directory": tmp_path / "live", "pg_wal": tmp_path / "dead", "tablespace:x": tmp_path / "dead"}
        async with asyncio.timeout(8):  # waiting for the stuck one every time would take 20 s
            for _ in range(100):
                samples, unknown = await probe.sample(places)
                assert unknown == {"pg_wal": "hung", "tablespace:x": "hung"}
                assert {sample.labels["path_kind"] for sample in samples} == {"data_directory"}
        assert asked.count(tmp_path / "dead") == 1
        release.set()
        async with asyncio.timeout(8):
            unknown = {"not": "yet"}
            while unknown:
                await asyncio.sleep(0.01)
                _, unknown = await probe.sample(places)
        assert asked.count(tmp_path / "dead") <= 3

    try:
        asyncio.run(work())
    finally:
        release.set()


def test_pressure_as_the_kernel_writes_it() -> None:
    text = "some avg10=1.50 avg60=0.10 avg300=0.00 total=2500000\nfull avg10=0.25 avg60=0.00 avg300=0.00 total=1000000\n"
    assert parse_pressure(text) == {"some": (0.015, 2.5), "full": (0.0025, 1.0)}


def test_a_kernel_without_pressure_says_so(tmp_path: Path) -> None:
    samples, unknown = HostProbe(SystemClock(), proc=tmp_path).sample()
    assert unknown == {"pressure": "not_supported"}
    assert {"pgherd_host_load1", "pgherd_host_memory_available_bytes"} <= {sample.metric.name for sample in samples}
    (tmp_path / "pressure").mkdir()
    for resource in ("cpu", "memory", "io"):
        (tmp_path / "pressure" / resource).write_text("nonsense\n", encoding="ascii")
    assert HostProbe(SystemClock(), proc=tmp_path).sample()[1] == {"pressure": "unreadable"}


def test_nodes_of_one_agent_share_a_reading() -> None:
    class Clock:
        now = 100.0

        def mono_s(self) -> float:
            return self.now

        def wall_unix_ns(self) -> int:
            return 0

    clock = Clock()
    host = HostProbe(clock)
    first = host.sample()
    assert host.sample() is first
    clock.now += 10
    assert host.sample() is not first


@pytest.mark.parametrize(
    ("node", "endpoint", "reason"),
    [
        (NodeConfig("n", "c", host="remote"), ("/run/postgresql", ""), "remote_server"),
        (NodeConfig("n", "c"), ("db.example", "203.0.113.9"), "remote_server"),
        (NodeConfig("n", "c"), ("127.0.0.1", "127.0.0.1"), "remote_server"),  # the pid below is no server's here
        (NodeConfig("n", "c", host="local"), ("db.example", "203.0.113.9"), ""),
        (NodeConfig("n", "c", data_directory=Path("/")), ("127.0.0.1", "127.0.0.1"), ""),
    ],
)
def test_only_a_server_that_runs_here_has_our_disks(node: NodeConfig, endpoint: tuple[str, str], reason: str) -> None:
    async def work() -> None:
        local = LocalProbe(node, DiskProbe(5.0), HostProbe(SystemClock()))
        local.locate(rows(data_directory="/", logging_collector="off", backend_pid=str(os.getpid())), *endpoint)
        samples, unknown = await local.sample()
        assert unknown.get("disk", "") == reason
        assert any(sample.metric.name == "pgherd_disk_avail_bytes" for sample in samples) == (not reason)
        assert any(sample.metric.name == "pgherd_host_load1" for sample in samples) == (not reason)

    asyncio.run(work())

"""Proofs of the rules about volumes that run full in other ways than DiskSpace sees: inodes, and the forecast."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pgherd.postgres.scratch import workspace
from support.postgres import PARENT, Fleet
from support.proving import Node, Proving, proving, small_volume

pytestmark = [pytest.mark.pg, pytest.mark.fault, pytest.mark.slow, pytest.mark.peers, pytest.mark.timeout(240)]

# The forecast's hours as seconds: the envelope of 15 minutes is 3 s, and so on.
SHORTENED = {
    "pgherd:disk_avail_bytes:min15m": {"[15m]": "[3s]"},
    "DiskForecast": {"[1h]": "[12s]", "[30m]": "[6s]", "offset 45m": "offset 9s"},
}


@dataclass
class Site:
    herd: Proving
    volume: Path
    labels: dict[str, str]


@pytest.fixture(scope="module")
def site(postgres_fleet: Fleet) -> Iterator[Site]:
    """A server with a tablespace on a small volume of its own."""
    server = postgres_fleet.server()
    with contextlib.ExitStack() as stack:
        stack.callback(server.stop)
        volume = stack.enter_context(workspace(PARENT)) / "volume"
        volume.mkdir()
        try:
            stack.enter_context(small_volume(volume, "size=64m,nr_inodes=400,mode=0755"))
        except (PermissionError, FileNotFoundError) as refused:
            pytest.skip(f"needs the right to mount a tmpfs: {refused}")
        server.user.own(volume)
        server.execute(f"CREATE TABLESPACE small LOCATION '{volume}'")
        stack.callback(server.execute, "DROP TABLESPACE small")
        herd = stack.enter_context(proving(SHORTENED))
        herd.agent("watcher", [Node("alone", "c1", server)])
        yield Site(herd, volume, {"node": "alone", "mountpoint": str(volume), "severity": "warning"})


@contextlib.contextmanager
def every(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    """Act again and again beside the test."""
    done = threading.Event()

    def loop() -> None:
        while not done.wait(seconds):
            act()

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(10)


def test_inodes(site: Site) -> None:
    """Small files take nine tenths of the volume's inodes, hardly any space; then they are removed."""
    litter = site.volume / "litter"
    litter.mkdir()
    while (stat := os.statvfs(site.volume)).f_favail > 0.1 * stat.f_files:
        (litter / f"{stat.f_favail}").touch()
    site.herd.fires("Inodes", **site.labels)
    assert site.herd.state("DiskSpace", node="alone", mountpoint=str(site.volume)) == ""
    for file in litter.iterdir():
        file.unlink()
    site.herd.resolves("Inodes", **site.labels)


def test_disk_forecast(site: Site) -> None:
    """A volume used to 65 % grows steadily, and stops growing. (What isn't forecast: tests/unit/test_alert_forecast.py.)"""
    growing = site.volume / "growing"
    size = os.statvfs(site.volume).f_blocks * os.statvfs(site.volume).f_frsize
    growing.write_bytes(bytes(int(size * 0.65)))
    with every(0.5, lambda: _append(growing, 64 * 1024)):
        row = site.herd.fires("DiskForecast", **site.labels)
    assert 0 < row["value"] < 86_400
    site.herd.resolves("DiskForecast", **site.labels)


def _append(file: Path, size: int) -> None:
    with file.open("ab") as out:
        out.write(bytes(size))

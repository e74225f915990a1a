"""The volumes that a server writes to, as it would see them: data directory, pg_wal, log directory, tablespaces.

`f_bavail` is what is left for an unprivileged writer like PostgreSQL; any of these is often a symbolic link
to another volume, so each path is asked where it really is, and `mountpoint` says which volume that was. A
path that can't be reached gives no sample and a reason, never 0. statvfs can block for ever (a dead NFS
server): each asking has a thread of its own, at most one is out per path, and the loop never waits for a
stuck one twice.

Source: POSIX fstatvfs; PostgreSQL docs "Database File Layout".
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from pgherd.proto.samples import Metric, MetricKind, Sample

_HELP: Final = "of the volume that holds the path"
TOTAL: Final = Metric("pgherd_disk_total_bytes", MetricKind.GAUGE, f"Size {_HELP}", "By")
USED: Final = Metric("pgherd_disk_used_bytes", MetricKind.GAUGE, f"Used bytes {_HELP}", "By")
AVAIL: Final = Metric("pgherd_disk_avail_bytes", MetricKind.GAUGE, f"Bytes that PostgreSQL can still write, {_HELP}", "By")
USED_RATIO: Final = Metric(
    "pgherd_disk_used_ratio",
    MetricKind.GAUGE,
    f"Used share of what PostgreSQL can use, 1 when it can write no more, {_HELP}",
    "1",
)
INODES_TOTAL: Final = Metric("pgherd_disk_inodes_total", MetricKind.GAUGE, f"Inodes {_HELP} (none where it has no such limit)")
INODES_FREE: Final = Metric("pgherd_disk_inodes_free", MetricKind.GAUGE, f"Inodes that PostgreSQL can still use, {_HELP}")


@dataclass(frozen=True, slots=True)
class Volume:
    """One answer: sizes in bytes, inodes (0 in all: no limit), or why there is none (`reason`)."""

    total_bytes: int = 0
    used_bytes: int = 0
    avail_bytes: int = 0
    inodes_total: int = 0
    inodes_free: int = 0
    mountpoint: str = ""
    reason: str = ""

    @property
    def used_ratio(self) -> float | None:
        """1 - avail/(used + avail), what df calls Use%: blocks reserved for root count as gone."""
        usable = self.used_bytes + self.avail_bytes
        return 1 - self.avail_bytes / usable if usable else None


def ask_volume(path: Path) -> Volume:
    """statvfs of where `path` really is. Blocks; never raises."""
    try:
        place = path.resolve(strict=True)
        stat = os.statvfs(place)
        mountpoint = _mountpoint(place)
    except PermissionError:
        return Volume(reason="permission_denied")
    except FileNotFoundError:
        return Volume(reason="not_found")
    except (OSError, RuntimeError):  # RuntimeError: a loop of symbolic links
        return Volume(reason="unreadable")
    block = stat.f_frsize
    return Volume(
        total_bytes=stat.f_blocks * block,
        used_bytes=(stat.f_blocks - stat.f_bfree) * block,
        avail_bytes=stat.f_bavail * block,
        inodes_total=stat.f_files,
        inodes_free=stat.f_favail,
        mountpoint=mountpoint,
    )


def _mountpoint(place: Path) -> str:
    """The topmost directory above `place` on the same volume."""
    device = place.stat().st_dev
    while place != place.parent and place.parent.stat().st_dev == device:
        place = place.parent
    return str(place)


def volume_samples(kind: str, volume: Volume) -> list[Sample]:
    """What one answered volume says."""
    labels = {"path_kind": kind, "mountpoint": volume.mountpoint}
    samples = [
        Sample(TOTAL, labels, float(volume.total_bytes)),
        Sample(USED, labels, float(volume.used_bytes)),
        Sample(AVAIL, labels, float(volume.avail_bytes)),
    ]
    if volume.used_ratio is not None:
        samples.append(Sample(USED_RATIO, labels, volume.used_ratio))
    if volume.inodes_total:
        samples.append(Sample(INODES_TOTAL, labels, float(volume.inodes_total)))
        samples.append(Sample(INODES_FREE, labels, float(volume.inodes_free)))
    return samples


class DiskProbe:
    """Asks the volumes of a node, all at once, with a deadline."""

    def __init__(self, timeout_s: float, ask: Callable[[Path], Volume] = ask_volume) -> None:
        self._timeout_s = timeout_s
        self._ask = ask
        self._stuck: dict[Path, asyncio.Future[Volume]] = {}

    async def sample(self, places: Mapping[str, Path]) -> tuple[list[Sample], dict[str, str]]:
        """(samples, reasons by path_kind) for the places by path_kind."""
        fresh = {path: self._start(path) for path in set(places.values()) if path not in self._stuck}
        if fresh:
            await asyncio.wait(fresh.values(), timeout=self._timeout_s)
        asked = {**self._stuck, **fresh}
        self._stuck = {path: answer for path, answer in asked.items() if not answer.done()}
        samples: list[Sample] = []
        unknown: dict[str, str] = {}
        for kind, path in places.items():
            volume = asked[path].result() if asked[path].done() else Volume(reason="hung")
            if volume.reason:
                unknown[kind] = volume.reason
            else:
                samples += volume_samples(kind, volume)
        return samples, unknown

    def _start(self, path: Path) -> asyncio.Future[Volume]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Volume] = loop.create_future()

        def deliver(volume: Volume) -> None:
            if not answer.done():
                answer.set_result(volume)

        def work() -> None:
            volume = self._ask(path)
            if not loop.is_closed():
                loop.call_soon_threadsafe(deliver, volume)

        threading.Thread(target=work, name=f"statvfs {path.name}", daemon=True).start()
        return answer


def is_local(host: str, hostaddr: str, own_addresses: Callable[[], Mapping[str, object]] = psutil.net_if_addrs) -> bool:
    """Whether a libpq endpoint is on this machine: only then is the server's data directory ours to look at."""
    if not host and not hostaddr:
        return True
    if host.startswith(("/", "@")):
        return True
    try:
        address = ipaddress.ip_address(hostaddr)
    except ValueError:
        return False
    if address.is_loopback:
        return True
    found = own_addresses()
    own = {entry.address.split("%")[0] for entries in found.values() for entry in entries}  # type: ignore[attr-defined]
    return str(address) in own

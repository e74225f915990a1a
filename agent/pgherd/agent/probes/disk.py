"""The volumes of the data directory and of pg_wal, as the server would see them.

`f_bavail` is what is left for an unprivileged writer like PostgreSQL; `pg_wal` is often a symbolic link
to another volume, so each path is asked where it really is. A path that can't be reached gives no
sample and a reason, never 0. statvfs can block for ever (a dead NFS server): each asking has a thread
of its own, at most one is out at a time, and the loop never waits for a stuck one twice.

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


@dataclass(frozen=True, slots=True)
class Volume:
    """One answer: sizes in bytes, or why there is none (`reason`)."""

    total_bytes: int = 0
    used_bytes: int = 0
    avail_bytes: int = 0
    reason: str = ""


def ask_volume(path: Path) -> Volume:
    """statvfs of where `path` really is. Blocks; never raises."""
    try:
        stat = os.statvfs(path.resolve(strict=True))
    except PermissionError:
        return Volume(reason="permission_denied")
    except FileNotFoundError:
        return Volume(reason="not_found")
    except (OSError, RuntimeError):  # RuntimeError: a loop of symbolic links
        return Volume(reason="unreadable")
    block = stat.f_frsize
    return Volume(stat.f_blocks * block, (stat.f_blocks - stat.f_bfree) * block, stat.f_bavail * block)


class DiskProbe:
    """Asks both volumes of a node with a deadline."""

    def __init__(self, timeout_s: float, ask: Callable[[Path], Volume] = ask_volume) -> None:
        self._timeout_s = timeout_s
        self._ask = ask
        self._stuck: dict[str, asyncio.Future[Volume]] = {}

    async def sample(self, data_directory: Path) -> tuple[list[Sample], dict[str, str]]:
        """(samples, reasons by path_kind) for data_directory and its pg_wal."""
        samples: list[Sample] = []
        unknown: dict[str, str] = {}
        for kind, path in (("data_directory", data_directory), ("pg_wal", data_directory / "pg_wal")):
            volume = await self._volume(kind, path)
            if volume.reason:
                unknown[kind] = volume.reason
                continue
            labels = {"path_kind": kind}
            samples.append(Sample(TOTAL, labels, float(volume.total_bytes)))
            samples.append(Sample(USED, labels, float(volume.used_bytes)))
            samples.append(Sample(AVAIL, labels, float(volume.avail_bytes)))
        return samples, unknown

    async def _volume(self, kind: str, path: Path) -> Volume:
        asked = self._stuck.pop(kind, None) or self._start(path)
        done, _ = await asyncio.wait({asked}, timeout=self._timeout_s)
        if not done:
            self._stuck[kind] = asked
            return Volume(reason="hung")
        return asked.result()

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

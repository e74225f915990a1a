"""What this machine knows about one node: its volumes and the host's figures, or why they can't be had.

A server is on this host when its address is, and the process that serves us is: a container's mapped port
and a pooler's socket have a local address too, and their volumes would be somebody else's. The owner's word
(`host = "local"`, `data_directory`, `disk_paths`) wins.

Places are kept while the server is away: a disk that filled up and took the server down is what must be seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import psutil

from pgherd.agent.config import NodeConfig
from pgherd.agent.probes.disk import DiskProbe, is_local
from pgherd.agent.probes.host import HostProbe
from pgherd.agent.probes.places import Places, nowhere, places_of
from pgherd.proto.samples import Sample

REMOTE: Final = "remote_server"
NOT_YET: Final = "never_connected"


def served_from_here(pid: int) -> bool:
    """Whether `pid`, as the server calls its own process, is a PostgreSQL process of this machine.

    True also where other users' processes are hidden from us (hidepid): then the address alone must do.
    """
    try:
        return psutil.Process(pid).name().startswith("postgres")
    except psutil.AccessDenied:
        return True
    except psutil.Error:
        return not Path("/proc/1").exists()


def stderr_directory(pid: int) -> Path | Literal["none", "hidden"]:
    """Where the postmaster of backend `pid` writes its stderr: "none" when that is no file, "hidden" from other users."""
    try:
        target = Path(f"/proc/{psutil.Process(pid).ppid()}/fd/2").readlink()
        # By its name: asking the volume might hang, and this runs in the agent's loop.
        is_file = target.is_absolute() and target.parts[1] not in ("dev", "proc") and not target.name.endswith(" (deleted)")
        return target.parent if is_file else "none"
    except (OSError, psutil.Error):
        return "hidden"


class LocalProbe:
    """One node's volumes, and the figures of the host they are in."""

    def __init__(self, node: NodeConfig, disk: DiskProbe, host: HostProbe) -> None:
        self._node = node
        self._disk = disk
        self._host = host
        stated = node.data_directory is not None or bool(node.disk_paths)
        self._trusted = node.host == "local" or (node.host == "auto" and stated)
        self._places = self._stated() if self._trusted else nowhere(REMOTE if node.host == "remote" else NOT_YET)

    def locate(self, rows: Iterable[Mapping[str, Any]], host: str, hostaddr: str) -> None:
        """Take the server's answer to PLACES_SQL, given over a connection to that libpq endpoint."""
        if self._node.host == "remote":
            return
        facts = list(rows)
        pid = next((int(row["value"]) for row in facts if row["fact"] == "backend_pid"), 0)
        here = is_local(host, hostaddr) and served_from_here(pid)
        if not here and not self._trusted:
            self._places = nowhere(REMOTE)
            return
        self._places = places_of(
            facts,
            data_directory=self._node.data_directory,
            stated=self._node.disk_paths,
            stderr_directory=stderr_directory(pid) if here else "hidden",
        )

    def _stated(self) -> Places:
        root = self._node.data_directory
        paths = {"data_directory": root, "pg_wal": root / "pg_wal"} if root is not None else {}
        return Places({**paths, **self._node.disk_paths})

    async def sample(self) -> tuple[list[Sample], dict[str, str]]:
        """(samples, reasons by probe)."""
        places = self._places
        if "" in places.unknown:  # before the first connection that is reason enough by itself
            reason = places.unknown[""]
            return [], {} if reason == NOT_YET else {"disk": reason, "host": reason}
        samples, unknown = await self._disk.sample(places.paths)
        figures, unknown_figures = self._host.sample()
        reasons = {f"disk_{kind}": reason for kind, reason in {**places.unknown, **unknown}.items()}
        return [*samples, *figures], {**reasons, **{f"host_{what}": why for what, why in unknown_figures.items()}}

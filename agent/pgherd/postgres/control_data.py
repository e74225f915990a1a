"""What pg_control says about a data directory, read by pg_controldata (the server may be down)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pgherd.postgres.binaries import Binaries
from pgherd.proto.errors import PreconditionError
from pgherd.proto.lsn import Lsn, Timeline
from pgherd.runtime.process import run


@dataclass(frozen=True, slots=True)
class ControlData:
    """The members that decisions need; `state` is PostgreSQL's wording ("in production", "shut down" …)."""

    system_identifier: str
    state: str
    checkpoint_lsn: Lsn
    timeline: Timeline
    checksums: bool
    wal_log_hints: bool
    wal_segment_bytes: int


def parse(text: str) -> Mapping[str, str]:
    """Label → value of pg_controldata's lines (locale C)."""
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {label.strip(): value.strip() for label, value in pairs}


def read_control_data(binaries: Binaries, data_directory: Path) -> ControlData:
    """Read pg_control. Raises PreconditionError child.failed; postgres.failed when a label is missing."""
    finished = run([binaries.program("pg_controldata"), "-D", data_directory], timeout_s=10.0).require_success(
        hint="the programs must be of the data directory's own major version"
    )
    lines = parse(finished.stdout.decode("utf-8", "replace"))
    try:
        return ControlData(
            system_identifier=lines["Database system identifier"],
            state=lines["Database cluster state"],
            checkpoint_lsn=Lsn.parse(lines["Latest checkpoint location"]),
            timeline=Timeline(int(lines["Latest checkpoint's TimeLineID"])),
            checksums=lines["Data page checksum version"] != "0",
            wal_log_hints=lines["wal_log_hints setting"] == "on",
            wal_segment_bytes=int(lines["Bytes per WAL segment"]),
        )
    except (KeyError, ValueError) as error:
        raise PreconditionError("postgres.failed", f"pg_controldata's answer isn't understood: {error}") from error

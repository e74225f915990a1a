"""`collector init`: a state directory with the herd's CA and an empty control store; safe to repeat."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pgherd.collector.config import CollectorConfig
from pgherd.collector.identity.ca import CertificateAuthority
from pgherd.proto.clock import Clock
from pgherd.proto.errors import PreconditionError
from pgherd.runtime.durable import private_directory
from pgherd.storage.control.store import ControlStore


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things are in the collector's state directory."""

    root: Path

    @property
    def ca(self) -> Path:
        return self.root / "ca"

    @property
    def tls(self) -> Path:
        return self.root / "tls"

    @property
    def control(self) -> Path:
        return self.root / "control.db"

    @property
    def series(self) -> Path:
        return self.root / "series.duckdb"

    @property
    def forward(self) -> Path:
        return self.root / "forward"

    @property
    def lock(self) -> Path:
        return self.root / "lock"


def initialise(config: CollectorConfig, clock: Clock) -> tuple[CertificateAuthority, bool]:
    """The herd's CA and whether it was made now. Raises ConfigError, TransientError disk.*, IntegrityError."""
    layout = Layout(private_directory(config.state_directory))
    private_directory(layout.ca)
    ControlStore.open(layout.control).close()
    try:
        return CertificateAuthority.load(layout.ca), False
    except PreconditionError as error:
        if error.code != "ca.missing":
            raise
        return CertificateAuthority.create(layout.ca, clock.wall_unix_ns()), True

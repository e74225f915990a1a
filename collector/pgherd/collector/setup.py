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


def initialise(config: CollectorConfig, clock: Clock, *, new_control_store: bool = False) -> tuple[CertificateAuthority, bool]:
    """The herd's CA and whether it was made now.

    A herd that has a CA had a control store: an empty one is made only on request. Raises ConfigError, PreconditionError
    store.missing, TransientError disk.*, IntegrityError.
    """
    layout = Layout(private_directory(config.state_directory))
    private_directory(layout.ca)
    try:
        ca: CertificateAuthority | None = CertificateAuthority.load(layout.ca)
    except PreconditionError as error:
        if error.code != "ca.missing":
            raise
        ca = None
    ControlStore.open(layout.control, create=ca is None or new_control_store).close()
    if ca is not None:
        return ca, False
    return CertificateAuthority.create(layout.ca, clock.wall_unix_ns()), True

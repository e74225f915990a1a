"""The agent's configuration: what it may be told by its file, environment and flags.

Frozen standard dataclasses; `pgherd.runtime.config.load` validates them (environment prefix
`PGHERD_AGENT__`). Secrets are only ever referenced by file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pgherd.runtime.config import Duration, Size

ENVIRONMENT_PREFIX = "PGHERD_AGENT__"
DEFAULT_FILE = Path("/etc/pgherd/agent.toml")

PolicyAnswer = Literal["allow", "deny"]


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """One PostgreSQL instance that this agent serves."""

    alias: str  # what people call it; unique in the herd's cluster
    cluster: str  # alias of its cluster, the same on primary and standbys
    conninfo: str = "host=/var/run/postgresql"  # libpq keywords or service=NAME; never a password
    password_file: Path | None = None  # first line is the password
    instance: str = ""  # host:port label; default: taken from the connection
    data_directory: Path | None = None  # default: asked from the server
    bin_directory: Path | None = None  # default: found by the server's major version
    host: Literal["auto", "local", "remote"] = "auto"  # where it runs; "remote" (managed clouds): no disk and host series
    disk_paths: dict[str, Path] = field(
        default_factory=dict
    )  # path_kind → path on that volume, if the real one is closed to us


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """How the sampler asks the server: in tiers, each as rarely as its facts change and its questions cost."""

    live_interval: Duration = 1.0  # WAL positions, receiver, waiters
    interval: Duration = 10.0  # counters, activity, replication
    slow_interval: Duration = 60.0  # settings, pg_wal, locks by mode, checkpoints and I/O
    rare_interval: Duration = 300.0  # sizes and what walks over databases; 5 to 15 minutes
    server_share_max: float = 0.005  # of one of the server's cores; above it, tiers are shed: tables first, positions last
    statement_timeout: Duration = 2.0
    lock_timeout: Duration = 0.5
    connect_timeout: Duration = 5.0
    answer_timeout: Duration = 5.0  # a server that accepts but doesn't answer for this long is hung
    latency: bool = True  # look at the sessions ten times a second, for percentiles of statement durations (docs/latency.md)
    latency_window: Duration = 60.0  # how often they are estimated; shorter windows know less
    latency_threshold: Duration = 1.0  # statements above it are counted, for the P99 alert


@dataclass(frozen=True, slots=True)
class RoundsConfig:
    """Walks over all databases, every sampling.rare_interval: tables, indexes, sequences and sizes.

    One database at a time, over a second connection that lives for that one only. What the budget doesn't reach
    waits for the next walk; `pgherd_rounds_age_seconds` tells how old what is known of a database is.
    """

    enabled: bool = True
    cost_max: float = 0.003  # share of a core of the server that walks may take
    walk_timeout: Duration = 60.0
    database_timeout: Duration = 4.0  # DROP DATABASE waits five seconds for visitors to leave
    tables_max: int = 50  # tables with series, and as many indexes, per database: those that changed most, and the largest
    series_max: int = 10_000  # of all databases of a node together; each keeps room for a few tables, if there is so much


@dataclass(frozen=True, slots=True)
class StatementsConfig:
    """Statements from pg_stat_statements, every sampling.slow_interval: totals per database and those that take most time."""

    enabled: bool = True
    top: int = 50  # statements with series of their own
    texts: bool = True  # their texts too, literals removed


@dataclass(frozen=True, slots=True)
class SpoolConfig:
    """The bounded queue on disk between sampler and collector; the oldest segment goes first."""

    size_max: Size = 256 * 1024 * 1024
    segment_max: Size = 256 * 1024


@dataclass(frozen=True, slots=True)
class BackupConfig:
    """Logical backups of every node that this agent serves."""

    enabled: bool = True
    repository: Path = Path("/var/lib/pgherd-agent/backups")
    interval: Duration = 3600.0
    compression: Literal["zstd", "gzip", "none"] = "zstd"
    level: int = 3
    keep: int = 168  # backups per node; the newest verified one is kept whatever this says
    timeout: Duration = 7200.0
    lock_wait_timeout: Duration = 30.0
    give_way_after: Duration = 5.0  # a session that waits so long for a table's lock behind a backup ends the backup
    free_min: Size = 1024 * 1024 * 1024  # stays free where backups and scratch servers write: PostgreSQL may live there too
    verify_after: bool = True  # read every backup back as soon as it is taken
    scratch_directory: Path | None = None  # for scratch servers; default: below the state directory
    # OS user of scratch servers when the agent runs as root; default: "pgherd-scratch" if it exists, else "nobody".
    # Not the owner of a live data directory: functions of the restored databases run as this user.
    scratch_user: str = ""
    role_passwords: bool = True  # False: accept backups without them where the role may not read pg_authid


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """What the owner of this host lets the collector ask for. The collector can't change it.

    Keys are policy names: ping, backup.run, backup.verify, restore.scratch, restore.directory,
    diagnostics. A name that isn't listed keeps its default; everything unknown is denied.
    """

    verbs: dict[str, PolicyAnswer] = field(default_factory=dict)
    restore_roots: dict[str, Path] = field(default_factory=dict)  # name → directory for new data directories


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """The whole file."""

    nodes: tuple[NodeConfig, ...] = ()
    state_directory: Path = Path("/var/lib/pgherd-agent")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rounds: RoundsConfig = field(default_factory=RoundsConfig)
    statements: StatementsConfig = field(default_factory=StatementsConfig)
    spool: SpoolConfig = field(default_factory=SpoolConfig)
    backup: BackupConfig = field(default_factory=BackupConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)

"""The collector's configuration: what it may be told by its file, environment and flags.

Frozen standard dataclasses; `pgherd.runtime.config.load` validates them (environment prefix
`PGHERD_COLLECTOR__`). Secrets are only ever referenced by file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pgherd.runtime.config import Duration, Size

ENVIRONMENT_PREFIX = "PGHERD_COLLECTOR__"
DEFAULT_FILE = Path("/etc/pgherd/collector.toml")


@dataclass(frozen=True, slots=True)
class HttpConfig:
    """Own API, Prometheus API, health and metrics."""

    listen: str = "127.0.0.1:7432"
    socket: Path | None = None  # local CLI; default: collector.sock in the state directory
    socket_uids: tuple[int, ...] = ()  # besides root and the collector's own user
    anonymous_read: bool = False  # reads without a token; writes are never anonymous


@dataclass(frozen=True, slots=True)
class GrpcConfig:
    """Agents and OTLP clients; mTLS required."""

    listen: str = "127.0.0.1:7433"
    request_bytes_max: Size = 4 * 1024 * 1024
    heartbeat_interval: Duration = 5.0


@dataclass(frozen=True, slots=True)
class OtlpConfig:
    """OTLP over HTTPS for foreign exporters; a client certificate of `pgherd clients issue` is required."""

    listen: str = "127.0.0.1:7436"  # "" turns it off


@dataclass(frozen=True, slots=True)
class IngestConfig:
    """What each agent and each OTLP client may take; what is more is refused for a while."""

    points_per_second: int = 50_000
    bytes_per_second: Size = 8 * 1024 * 1024
    burst: Duration = 10.0  # so much of both may come at once, as after an outage
    series_per_sender: int = 200_000


@dataclass(frozen=True, slots=True)
class EnrolConfig:
    """Joining and renewal over HTTPS."""

    listen: str = "127.0.0.1:7434"
    names: tuple[str, ...] = ("localhost", "127.0.0.1")  # SANs of the server certificate; the first is advertised
    certificate_lifetime: Duration = 86400.0
    renewal_grace: Duration = 14 * 86400.0
    token_lifetime: Duration = 900.0


@dataclass(frozen=True, slots=True)
class SeriesConfig:
    """The DuckDB store of time series."""

    retention: Duration = 15 * 86400.0
    memory_limit: Size = 512 * 1024 * 1024
    threads: int = 2
    series_max: int = 1_000_000
    future_max: Duration = 600.0  # samples stamped further ahead are rejected
    past_max: Duration = 7 * 86400.0  # and further behind


@dataclass(frozen=True, slots=True)
class QueryConfig:
    """Limits of one PromQL query."""

    timeout: Duration = 30.0
    lookback: Duration = 300.0
    subquery_step: Duration = 60.0  # of subqueries without a resolution
    samples_max: int = 50_000_000
    points_per_series_max: int = 11_000
    concurrency: int = 4


@dataclass(frozen=True, slots=True)
class MailConfig:
    """The mail server of a receiver of kind smtp."""

    host: str = ""
    port: int = 587
    security: Literal["starttls", "tls", "none"] = "starttls"
    user: str = ""
    password_file: Path | None = None
    ca_file: Path | None = None  # besides the system's authorities
    sender: str = ""
    recipients: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ReceiverConfig:
    """Where notifications go. Each has its own line in the outbox, except alertmanager, which is pushed the state itself."""

    name: str
    kind: Literal["log", "webhook", "slack", "discord", "smtp", "apprise", "alertmanager"]
    url: str = ""
    url_file: Path | None = None  # when the URL itself is a secret, as with slack, discord and apprise
    timeout: Duration = 10.0  # of each step; a whole delivery by mail or apprise may take four times as long
    mail: MailConfig = field(default_factory=MailConfig)


@dataclass(frozen=True, slots=True)
class RouteConfig:
    """Which alerts go to a receiver; tried in order, the first that matches takes the alert."""

    receiver: str
    matchers: tuple[str, ...] = ()  # all must hold: severity="critical", node=~"db.*"
    continue_matching: bool = False  # the routes after it may take the alert too
    group_by: tuple[str, ...] | None = None  # these four: as in [alerts], unless stated
    group_wait: Duration | None = None
    group_interval: Duration | None = None
    repeat_interval: Duration | None = None


@dataclass(frozen=True, slots=True)
class InhibitConfig:
    """While an alert of `source` fires, those of `target` with equal `equal` labels are mute."""

    source: tuple[str, ...]
    target: tuple[str, ...]
    equal: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AlertsConfig:
    """Rules, receivers, and who is told what."""

    rule_files: tuple[Path, ...] = ()  # besides the built-in pack
    builtin_rules: bool = True
    interval: Duration = 15.0  # of groups that don't state one
    external_url: str = ""  # where receivers' readers reach this collector; goes into notifications
    receivers: tuple[ReceiverConfig, ...] = (ReceiverConfig(name="log", kind="log"),)
    routes: tuple[RouteConfig, ...] = ()
    default_receivers: tuple[str, ...] = ()  # of alerts that no route takes; empty: every receiver
    group_by: tuple[str, ...] = ("alertname", "cluster")  # one message for alerts that agree in these; "..." for every label
    group_wait: Duration = 0.0  # from a group's first alert to its first message
    group_interval: Duration = 15.0  # from a group's message to its next, when something changed
    repeat_interval: Duration = 4 * 3600.0  # and when nothing did
    inhibit: tuple[InhibitConfig, ...] = ()


@dataclass(frozen=True, slots=True)
class RemoteWriteConfig:
    """A Prometheus remote write receiver: Prometheus, VictoriaMetrics, Mimir, Thanos."""

    name: str  # of its queue, and in metrics; letters, digits, - and _
    url: str
    header_files: dict[str, Path] = field(default_factory=dict)  # header → file that holds its value
    ca_file: Path | None = None  # instead of the system's authorities
    certificate_file: Path | None = None  # with key_file: our client certificate
    key_file: Path | None = None
    timeout: Duration = 15.0
    queue_size: Size = 1024 * 1024 * 1024  # the oldest goes first
    queue_age: Duration = 86400.0  # what is older isn't sent any more


@dataclass(frozen=True, slots=True)
class OtlpForwardConfig:
    """An OTLP receiver: another collector, Datadog, New Relic."""

    name: str  # of its queue, and in metrics; letters, digits, - and _
    endpoint: str  # HTTP: the whole URL; gRPC: https://host:port, or http:// without TLS
    protocol: Literal["http", "grpc"] = "http"
    service_name: str = "pgherd"  # of our agents' series; another pgherd collector takes any but this one
    header_files: dict[str, Path] = field(default_factory=dict)  # header → file that holds its value
    ca_file: Path | None = None  # instead of the system's authorities
    certificate_file: Path | None = None  # with key_file: our client certificate
    key_file: Path | None = None
    timeout: Duration = 15.0
    queue_size: Size = 1024 * 1024 * 1024  # the oldest goes first
    queue_age: Duration = 86400.0  # what is older isn't sent any more


@dataclass(frozen=True, slots=True)
class ForwardConfig:
    """Where all that is stored is sent as well."""

    remote_write: tuple[RemoteWriteConfig, ...] = ()
    otlp: tuple[OtlpForwardConfig, ...] = ()


@dataclass(frozen=True, slots=True)
class CollectorConfig:
    """The whole file."""

    state_directory: Path = Path("/var/lib/pgherd-collector")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    http: HttpConfig = field(default_factory=HttpConfig)
    grpc: GrpcConfig = field(default_factory=GrpcConfig)
    otlp: OtlpConfig = field(default_factory=OtlpConfig)
    ingest: IngestConfig = field(default_factory=IngestConfig)
    enrol: EnrolConfig = field(default_factory=EnrolConfig)
    series: SeriesConfig = field(default_factory=SeriesConfig)
    query: QueryConfig = field(default_factory=QueryConfig)
    alerts: AlertsConfig = field(default_factory=AlertsConfig)
    forward: ForwardConfig = field(default_factory=ForwardConfig)

    @property
    def socket(self) -> Path:
        """The UNIX socket of the local CLI."""
        return self.http.socket or self.state_directory / "collector.sock"

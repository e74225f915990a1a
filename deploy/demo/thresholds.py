"""The four thresholds of the demo: the faults that cross them, and the rules that say so.

The thresholds are the shipped ones and are crossed for real; what the demo lowers is the time that rules wait before they fire
(4 s for 30 s to 2 min) and the window of the latency estimate (5 s for 60 s): nobody watches a demo that long. Where this user
may not mount a small volume (not root), the disk rule is lowered too, and says so.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator

import psycopg
from servers import MAX_CONNECTIONS, RESERVED_CONNECTIONS, Pair, Server, Volume

DISK, CONNECTIONS, LATENCY, LAG = "DemoDiskSpace", "DemoConnectionsHigh", "DemoP99Latency", "DemoReplicationLag"
CROSSED = {
    DISK: "a disk is more than 80 % full",
    CONNECTIONS: "more than 90 % of the usable connections are taken",
    LATENCY: "P99 is above 1000 ms",
    LAG: "replication is more than 10 s behind",
}
LOWERED = (
    "rules wait 4 s instead of 30 s to 2 min, latency windows are 5 s instead of 60 s; the thresholds are the shipped ones"
)
LOWERED_DISK = "LOWERED: this user may not mount a small volume, so 'full' means 768 MiB more than at the start instead of 80 % of the volume"
_LOWERED_BYTES = 768 << 20
_SLEEPERS = 12

_RULES = """\
groups:
  - name: demo
    interval: 2s
    rules:
      - alert: DemoDiskSpace
        expr: {disk}
        for: 4s
        labels: {{severity: warning}}
        annotations:
          summary: "{{{{ $labels.node }}}}: the volume of its {{{{ $labels.path_kind }}}} runs full"
      - alert: DemoConnectionsHigh
        expr: pgherd_connections_used / pgherd_connections_usable > 0.9
        for: 4s
        labels: {{severity: critical}}
        annotations:
          summary: "{{{{ $labels.node }}}} uses {{{{ $value | humanizePercentage }}}} of its connections"
      - alert: DemoP99Latency
        expr: pgherd_statements_over_ratio_low > 0.01 and on (instance) pgherd_statements_window >= 100
        for: 4s
        labels: {{severity: warning}}
        annotations:
          summary: "{{{{ $labels.node }}}}: more than 1 % of the statements take longer than 1000 ms"
      - alert: DemoReplicationLag
        expr: pgherd_replication_lag_seconds > 10
        for: 4s
        labels: {{severity: warning}}
        annotations:
          summary: "{{{{ $labels.node }}}} is {{{{ $value | humanizeDuration }}}} behind"
"""


def rules(volume: Volume) -> str:
    """The demo's rule file."""
    if volume.is_small:
        disk = "pgherd_disk_used_ratio{path_kind='log_directory',node='primary'} > 0.80"
    else:
        used = shutil.disk_usage(volume.path).used
        disk = f"pgherd_disk_used_bytes{{path_kind='log_directory',node='primary'}} > {used + _LOWERED_BYTES}"
    return _RULES.format(disk=disk)


def note(alert: str, volume: Volume) -> str:
    """What the demo lowered for this alert."""
    return f"{LOWERED_DISK}; {LOWERED}" if alert == DISK and not volume.is_small else LOWERED


@contextlib.contextmanager
def crossed(pair: Pair) -> Iterator[None]:
    """All four thresholds are crossed while inside."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_replay_paused(pair.standby))
        stack.enter_context(_slow_statements(pair.primary))
        stack.enter_context(_log_grown(pair.volume))
        stack.enter_context(_connections_taken(pair.primary))
        yield


@contextlib.contextmanager
def _replay_paused(standby: Server) -> Iterator[None]:
    """The primary's load goes on, and the standby replays nothing."""
    with psycopg.connect(standby.conninfo(), autocommit=True) as connection:
        connection.execute("SELECT pg_wal_replay_pause()")
        try:
            yield
        finally:
            connection.execute("SELECT pg_wal_replay_resume()")


@contextlib.contextmanager
def _slow_statements(primary: Server) -> Iterator[None]:
    """Some statements in a hundred take 1.2 s, beside the load's short ones."""
    done = threading.Event()

    def sleeper() -> None:
        with contextlib.suppress(psycopg.OperationalError), psycopg.connect(primary.conninfo(), autocommit=True) as connection:
            while not done.is_set():
                connection.execute("SELECT pg_sleep(1.2)")

    threads = [threading.Thread(target=sleeper, daemon=True) for _ in range(_SLEEPERS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join(10)


@contextlib.contextmanager
def _log_grown(volume: Volume) -> Iterator[None]:
    """A file beside the server's log takes what is allowed and more."""
    usage = shutil.disk_usage(volume.path)
    size = int(usage.total * 0.86) - usage.used if volume.is_small else _LOWERED_BYTES + (_LOWERED_BYTES >> 2)
    file = volume.path / "grown.log"
    with file.open("wb") as out:
        for _ in range(size >> 20):
            out.write(bytes(1 << 20))
        out.flush()
        os.fsync(out.fileno())
    try:
        yield
    finally:
        file.unlink()


@contextlib.contextmanager
def _connections_taken(primary: Server) -> Iterator[None]:
    """Idle sessions take 92 % of what ordinary roles can have."""
    usable = MAX_CONNECTIONS - RESERVED_CONNECTIONS
    with psycopg.connect(primary.conninfo(), autocommit=True) as watch, contextlib.ExitStack() as sessions:
        while client_backends(watch) <= usable * 0.92:
            sessions.enter_context(psycopg.connect(primary.conninfo()))
        yield


def client_backends(connection: psycopg.Connection[tuple[int]]) -> int:
    """How many there are."""
    row = connection.execute("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'").fetchone()
    assert row is not None
    return int(row[0])

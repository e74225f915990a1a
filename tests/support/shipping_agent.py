"""An agent that has nothing but its telemetry: a real emitter, spool and shipper over mTLS, sampling numbers quickly.

    shipping_agent.py <state directory of a joined agent> <port of localhost to ship to> <cycles a second>

Each cycle's number goes into `sampled` (one write, before anything else can happen to it), then as values into the spool:
the live tier's series each cycle, the others' every tenth. SIGTERM ends the sampling; the process ends when all is shipped.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import grpc.aio

from pgherd.agent.config import SpoolConfig
from pgherd.agent.identity.files import require_identity
from pgherd.agent.telemetry.convert import Source
from pgherd.agent.telemetry.emit import Emitter, Statement
from pgherd.agent.telemetry.ship import Shipper, ShipSettings
from pgherd.proto.samples import Metric, MetricKind, Sample
from pgherd.runtime.clock import SystemClock
from pgherd.runtime.queue.spool import Spool
from pgherd.runtime.tls import channel_credentials

LIVE, CYCLE = Metric("test_live", MetricKind.GAUGE, "h"), Metric("test_cycle_total", MetricKind.COUNTER, "h")
LIVE_SERIES, CYCLE_SERIES, TENTH = 5, 100, 10
_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
)


def statement(number: int) -> Statement:
    """What cycle `number` says."""
    live = [Sample(LIVE, {"i": str(i)}, float(number)) for i in range(LIVE_SERIES)]
    if number % TENTH:
        return {"live": live}
    return {"live": live, "cycle": [Sample(CYCLE, {"i": str(i)}, float(number)) for i in range(CYCLE_SERIES)]}


def points_of(number: int) -> int:
    """How many."""
    return LIVE_SERIES + (0 if number % TENTH else CYCLE_SERIES)


async def main(state: Path, port: int, rate: float) -> None:
    identity, clock, stop = require_identity(state), SystemClock(), asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    spool = Spool.open(state / "spool", SpoolConfig(), clock)
    credentials = channel_credentials(
        ca_file=identity.ca_file, key_file=identity.key_file, certificate_file=identity.certificate_file
    )
    shipper = Shipper(
        spool,
        lambda: grpc.aio.secure_channel(f"localhost:{port}", credentials, options=_OPTIONS),
        clock,
        ShipSettings(deadline_s=3.0, backoff_min_s=0.05, backoff_max_s=0.2, idle_poll_s=1.0),
    )
    shipping = asyncio.create_task(shipper.run())
    emitter = Emitter(Source(identity.agent_id, "", "", "", "test"), spool, shipper.notify)
    log = state / "sampled"
    number = int(log.read_text().split()[-1]) if log.exists() else 0
    with log.open("ab", buffering=0) as sampled:
        while not stop.is_set():
            number += 1
            sampled.write(b"%d\n" % number)
            await emitter.emit(statement(number), clock.wall_unix_ns())
            await asyncio.sleep(1 / rate)
    while spool.status.pending_batches:
        shipper.hurry()
        await asyncio.sleep(0.05)
    shipping.cancel()
    await asyncio.gather(shipping, return_exceptions=True)
    spool.close()


if __name__ == "__main__":
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))

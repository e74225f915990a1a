"""From an event to the webhook: how long after a threshold is crossed the receiver has been told.

    python tests/perf/bench_event.py [--events 20] [--interval 2]

Prints JSON; asserts nothing. A real collector process with a rule without `for`, a real OTLP client with a certificate of its own,
a real HTTP receiver. Every event is a sample over the threshold, sent at a random phase of the evaluation, and a notification group of its own
(an alert that joins a group told a moment ago waits for `group_interval`). What is left after one evaluation interval is storing, evaluating, delivering.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource

from pgherd.runtime.tls import channel_credentials
from support.collector import collector
from support.webhook import Webhook, webhook

_RULES = """\
groups:
  - name: bench
    interval: {interval:g}s
    rules:
      - alert: BenchHigh
        expr: bench_value > 1
"""
_ALERTS = """\
[alerts]
builtin_rules = false
rule_files = ["{rules}"]
group_by = ["alertname", "event"]
[[alerts.receivers]]
name = "bench"
kind = "webhook"
url = "{url}"
"""
_TIMEOUT_S = 60.0


def told(receiver: Webhook, status: str) -> int:
    """How many alerts arrived with this status."""
    return sum(alert["status"] == status for call in receiver.accepted for alert in call.payload["alerts"])


def wait(receiver: Webhook, status: str, count: int) -> None:
    deadline_s = time.monotonic() + _TIMEOUT_S
    while told(receiver, status) < count:
        if time.monotonic() > deadline_s:
            raise SystemExit(f"the receiver wasn't told of {status} number {count}")
        time.sleep(0.005)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=20)
    parser.add_argument("--interval", type=float, default=2.0, help="of the rule's group, seconds")
    options = parser.parse_args()
    delays = []
    with tempfile.TemporaryDirectory() as directory, webhook() as receiver, collector() as herd:
        rules = Path(directory) / "rules.yaml"
        rules.write_text(_RULES.format(interval=options.interval))
        with (herd.directory / "c.toml").open("a") as config:
            config.write(_ALERTS.format(rules=rules, url=receiver.url))
        herd.start()
        client = Path(directory) / "client"
        herd.ask("clients", "issue", "bench", "--directory", str(client))
        exporter = OTLPMetricExporter(
            endpoint=f"https://localhost:{herd.ports['grpc']}",
            credentials=channel_credentials(
                ca_file=client / "ca.crt", key_file=client / "client.key", certificate_file=client / "client.crt"
            ),
        )
        reader = PeriodicExportingMetricReader(exporter, export_interval_millis=3_600_000)
        provider = MeterProvider([reader], Resource({"service.name": "bench", "service.instance.id": "bench:1"}))
        gauge = provider.get_meter("bench").create_gauge("bench_value")

        for event in range(1, options.events + 1):
            time.sleep(random.uniform(0.0, options.interval))
            started = time.monotonic()
            gauge.set(2.0, {"event": str(event)})
            reader.force_flush()
            wait(receiver, "firing", event)
            delays.append(time.monotonic() - started)
            print(f"event {event}: {delays[-1]:.2f} s", file=sys.stderr)
            gauge.set(0.0, {"event": str(event)})
        provider.shutdown()
        herd.stop()
    answer: dict[str, Any] = {
        "bench": "event",
        "events": options.events,
        "interval_s": options.interval,
        "event_to_webhook_p50_s": round(statistics.median(delays), 3),
        "event_to_webhook_max_s": round(max(delays), 3),
        "beyond_one_interval_max_s": round(max(delays) - options.interval, 3),
    }
    print(json.dumps(answer, indent=2))


if __name__ == "__main__":
    main()

"""The collector's own metrics in Prometheus' text format (`/metrics`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from pgherd.alerts.gotemplate.gofmt import go_float
from pgherd.collector.alerting.alertmanager import AlertmanagerPush
from pgherd.collector.alerting.evaluation import Evaluator
from pgherd.collector.alerting.notifier import Notifier
from pgherd.collector.alerting.outbox import OutboxWorker
from pgherd.collector.control.herd import Herd
from pgherd.collector.forward.forwarder import Forwarder, ForwardStatus
from pgherd.collector.identity.gate import PeerGate
from pgherd.collector.ingest.service import MetricsService
from pgherd.storage.series.store import SeriesStore

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Family:
    """One metric family; `samples` maps label pairs to values."""

    name: str
    kind: str
    help: str
    samples: Mapping[tuple[tuple[str, str], ...], float] = field(default_factory=dict)


def single(name: str, kind: str, help_text: str, value: float) -> Family:
    """A family of one sample without labels."""
    return Family(name, kind, help_text, {(): float(value)})


def render(families: Iterable[Family]) -> str:
    """Prometheus' text format 0.0.4."""
    lines = []
    for family in families:
        lines += [f"# HELP {family.name} {family.help}", f"# TYPE {family.name} {family.kind}"]
        for labels, value in sorted(family.samples.items()):
            inside = ",".join(f'{name}="{_escaped(text)}"' for name, text in labels)
            lines.append(f"{family.name}{{{inside}}} {go_float(value)}" if inside else f"{family.name} {go_float(value)}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def collector_families(
    series: SeriesStore,
    ingest: MetricsService,
    herd: Herd,
    gate: PeerGate,
    evaluator: Evaluator,
    outbox: OutboxWorker,
    notifier: Notifier,
    alertmanagers: Sequence[AlertmanagerPush],
    forwarder: Forwarder,
) -> Callable[[], list[Family]]:
    """A function that reads everything now. Call it from a thread: it asks the file system."""
    process = psutil.Process()

    def read() -> list[Family]:
        gauges, written, counters = series.gauges(), series.counters, ingest.counters
        groups = evaluator.status()
        with process.oneshot():
            memory, cpu, descriptors = process.memory_info(), process.cpu_times(), process.num_fds()
        return [
            single("pgherd_collector_ingest_requests_total", "counter", "OTLP requests received.", counters.requests),
            single("pgherd_collector_ingest_request_bytes_total", "counter", "Bytes of OTLP requests.", counters.request_bytes),
            single("pgherd_collector_ingest_points_total", "counter", "Points accepted and durable.", counters.points_accepted),
            _by(
                "pgherd_collector_ingest_points_rejected_total",
                "Points not taken, by reason.",
                "reason",
                counters.points_rejected,
            ),
            _by("pgherd_collector_ingest_refused_total", "Requests refused, by error code.", "code", counters.requests_refused),
            single("pgherd_collector_ingest_repeated_total", "counter", "Requests seen before.", counters.requests_repeated),
            single("pgherd_collector_ingest_gaps_total", "counter", "Sequence numbers skipped by agents.", counters.gaps),
            single(
                "pgherd_collector_ingest_deltas_repeated_total",
                "counter",
                "Increases no later than what was stored, not added again.",
                counters.deltas_repeated,
            ),
            single("pgherd_collector_ingest_in_flight", "gauge", "Requests being served.", counters.in_flight),
            single("pgherd_collector_points_stored_total", "counter", "Points committed since start.", written.points_stored),
            single("pgherd_collector_series", "gauge", "Series known.", gauges.series),
            single("pgherd_collector_queued_points", "gauge", "Points waiting for the writer.", gauges.queued_points),
            single("pgherd_collector_store_bytes", "gauge", "Size of the series file.", gauges.file_bytes),
            single("pgherd_collector_store_wal_bytes", "gauge", "Size of the series file's log.", gauges.wal_bytes),
            single("pgherd_collector_store_writable", "gauge", "1 while the writer works.", gauges.is_writable),
            _by(
                "pgherd_store_quarantined",
                "Files of a store that were set aside and wait for somebody.",
                "store",
                {"series": gauges.set_aside},
                kind="gauge",
            ),
            _by(
                "pgherd_store_damaged", "1 while a part can't be read.", "store", {"series": bool(gauges.damage)}, kind="gauge"
            ),
            single("pgherd_collector_agents_connected", "gauge", "Agents heard lately.", herd.connected),
            single("pgherd_collector_live_calls", "gauge", "RPCs being served.", gate.live_calls),
            single(
                "pgherd_collector_rule_evaluations_total",
                "counter",
                "Evaluations of groups.",
                sum(g.evaluations for g in groups),
            ),
            single(
                "pgherd_collector_rule_failures_total", "counter", "Evaluations that failed.", sum(g.failures for g in groups)
            ),
            single(
                "pgherd_collector_rule_slots_missed_total",
                "counter",
                "Evaluations skipped.",
                sum(g.slots_missed for g in groups),
            ),
            single(
                "pgherd_collector_rule_points_lost_total",
                "counter",
                "Samples of rules that the series store didn't take.",
                evaluator.points_lost,
            ),
            _by(
                "pgherd_collector_notifications_total",
                "Delivered.",
                "receiver",
                {
                    **{n: c.delivered for n, c in outbox.counters.items()},
                    **{push.name: push.counters.delivered for push in alertmanagers},
                },
            ),
            _by(
                "pgherd_collector_notifications_failed_total",
                "Failed.",
                "receiver",
                {
                    **{n: c.failed for n, c in outbox.counters.items()},
                    **{push.name: push.counters.failed for push in alertmanagers},
                },
            ),
            single(
                "pgherd_collector_notifications_given_up_total",
                "counter",
                "Dropped because a receiver's outbox was full.",
                notifier.counters.letters_given_up,
            ),
            single(
                "pgherd_collector_notifier_failures_total",
                "counter",
                "Turns in which nothing could be decided or kept.",
                notifier.counters.turns_failed,
            ),
            *forward_families(forwarder.status()),
            single("process_resident_memory_bytes", "gauge", "Resident memory.", memory.rss),
            single("process_virtual_memory_bytes", "gauge", "Virtual memory.", memory.vms),
            single("process_cpu_seconds_total", "counter", "CPU time.", cpu.user + cpu.system),
            single("process_open_fds", "gauge", "Open file descriptors.", descriptors),
            single("process_start_time_seconds", "gauge", "Start, Unix time.", process.create_time()),
        ]

    return read


def forward_families(status: Sequence[ForwardStatus]) -> list[Family]:
    """How forwarding stands, by destination; nothing when nothing is forwarded."""
    if not status:
        return []
    said: list[tuple[str, str, str, Callable[[ForwardStatus], float]]] = [
        ("sent_points_total", "counter", "Samples that the receiver took.", lambda one: one.sent_points),
        (
            "dropped_points_total",
            "counter",
            "Samples dropped: too many, too old, or unreadable.",
            lambda one: one.dropped_points,
        ),
        ("failed_points_total", "counter", "Samples that the receiver refused for ever.", lambda one: one.failed_points),
        ("queue_bytes", "gauge", "Size of the queue on disk.", lambda one: one.queue_bytes),
        ("lag_seconds", "gauge", "Age of the oldest sample that waits.", lambda one: one.lag_s),
    ]
    return [
        Family(f"pgherd_forward_{name}", kind, text, {(("destination", one.name),): float(value(one)) for one in status})
        for name, kind, text, value in said
    ]


def _by(name: str, help_text: str, label: str, values: Mapping[Any, float], *, kind: str = "counter") -> Family:
    return Family(name, kind, help_text, {((label, str(key)),): float(value) for key, value in values.items()})

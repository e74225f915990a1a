"""The agent's own figures, under the names that postgres_exporter's dashboards read (`process_*`)."""

from __future__ import annotations

from typing import Final

import psutil

from pgherd.proto.samples import Metric, MetricKind, Sample
from pgherd.runtime.queue.spool import SpoolStatus

_GAUGE, _COUNTER = MetricKind.GAUGE, MetricKind.COUNTER
_CPU: Final = Metric("process_cpu_seconds_total", _COUNTER, "Total user and system CPU time of the agent in seconds", "s")
_RSS: Final = Metric("process_resident_memory_bytes", _GAUGE, "Resident memory size of the agent in bytes", "By")
_VMS: Final = Metric("process_virtual_memory_bytes", _GAUGE, "Virtual memory size of the agent in bytes", "By")
_FDS: Final = Metric("process_open_fds", _GAUGE, "Number of open file descriptors of the agent")
_START: Final = Metric("process_start_time_seconds", _GAUGE, "Start time of the agent since unix epoch in seconds", "s")
_SPOOL_BYTES: Final = Metric("pgherd_spool_bytes", _GAUGE, "Bytes of the agent's spool", "By")
_SPOOL_BATCHES: Final = Metric("pgherd_spool_pending_batches", _GAUGE, "Batches that wait for the collector")
_SAMPLED: Final = Metric("pgherd_points_sampled_total", _COUNTER, "Points that the agent sampled, all nodes")
_ACKED: Final = Metric("pgherd_points_acked_total", _COUNTER, "Points that the collector acknowledged as stored")
_DROPPED: Final = Metric("pgherd_points_dropped_total", _COUNTER, "Points that the agent dropped, by reason")
_CORRUPT: Final = Metric("pgherd_spool_corrupt_segments_total", _COUNTER, "Spool segments set aside as damaged")


class OwnFigures:
    """Reads this process; construct once."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._start_unix_ns = int(self._process.create_time() * 1_000_000_000)

    def samples(self, spool: SpoolStatus) -> list[Sample]:
        with self._process.oneshot():
            cpu, memory, fds = self._process.cpu_times(), self._process.memory_info(), self._process.num_fds()
        counts = spool.counts
        dropped = {
            "refused": counts.refused_points,
            "evicted": counts.evicted_points,
            "poisoned": counts.poisoned_points,
            "lost": counts.lost_points,
        }
        return [
            Sample(_CPU, {}, cpu.user + cpu.system, self._start_unix_ns),
            Sample(_RSS, {}, float(memory.rss)),
            Sample(_VMS, {}, float(memory.vms)),
            Sample(_FDS, {}, float(fds)),
            Sample(_START, {}, self._start_unix_ns / 1e9),
            Sample(_SPOOL_BYTES, {}, float(spool.size_bytes)),
            Sample(_SPOOL_BATCHES, {}, float(spool.pending_batches)),
            Sample(_SAMPLED, {}, float(counts.sampled_points)),
            Sample(_ACKED, {}, float(counts.acked_points)),
            Sample(_CORRUPT, {}, float(counts.corrupt_segments)),
            *(Sample(_DROPPED, {"reason": reason}, float(points)) for reason, points in dropped.items()),
        ]

"""The host's figures: CPU, memory, swap, load and pressure. Asked once, shown under every node that is on it.

The label `host` says which machine it was, so that `max by (host)` counts each once when an agent serves
several nodes. Figures of a remote server's host can't be had from here: the sampler names the reason.

Source: proc(5); kernel documentation "Pressure Stall Information" (absent without CONFIG_PSI or with psi=0).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final

import psutil

from pgherd.proto.clock import Clock
from pgherd.proto.samples import Metric, MetricKind, Sample

_GAUGE, _COUNTER = MetricKind.GAUGE, MetricKind.COUNTER
CPU: Final = Metric("pgherd_host_cpu_seconds_total", _COUNTER, "CPU time of the host by mode, all cores", "s")
CPUS: Final = Metric("pgherd_host_cpus", _GAUGE, "CPUs of the host that are online")
MEMORY_TOTAL: Final = Metric("pgherd_host_memory_total_bytes", _GAUGE, "Memory of the host", "By")
MEMORY_AVAILABLE: Final = Metric(
    "pgherd_host_memory_available_bytes", _GAUGE, "Memory that can be had without swapping, as the kernel estimates it", "By"
)
SWAP_TOTAL: Final = Metric("pgherd_host_swap_total_bytes", _GAUGE, "Swap of the host", "By")
SWAP_FREE: Final = Metric("pgherd_host_swap_free_bytes", _GAUGE, "Swap of the host that isn't used", "By")
SWAP_IN: Final = Metric("pgherd_host_swap_in_bytes_total", _COUNTER, "Bytes read back from swap since boot", "By")
SWAP_OUT: Final = Metric("pgherd_host_swap_out_bytes_total", _COUNTER, "Bytes written to swap since boot", "By")
LOADS: Final = tuple(
    Metric(f"pgherd_host_load{minutes}", _GAUGE, f"Load average of the host over {minutes} min") for minutes in (1, 5, 15)
)
PRESSURE: Final = Metric(
    "pgherd_host_pressure_ratio", _GAUGE, "Share of the last 10 s in which some or all tasks waited for the resource", "1"
)
PRESSURE_TOTAL: Final = Metric(
    "pgherd_host_pressure_seconds_total", _COUNTER, "Time in which some or all tasks waited for the resource, since boot", "s"
)

RESOURCES: Final = ("cpu", "memory", "io")
_MODES: Final = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
_SAME_READING_S: Final = 0.5  # nodes of one agent that are sampled together share a reading


def parse_pressure(text: str) -> dict[str, tuple[float, float]]:
    """kind ("some", "full") → (share of the last 10 s, seconds in all) of one /proc/pressure file. Pure; ValueError."""
    found = {}
    for line in text.splitlines():
        kind, *fields = line.split()
        facts = dict(part.split("=", 1) for part in fields)
        found[kind] = (float(facts["avg10"]) / 100, int(facts["total"]) / 1e6)
    return found


class HostProbe:
    """Reads this machine; one for all nodes of an agent."""

    def __init__(self, clock: Clock, proc: Path = Path("/proc"), hostname: Callable[[], str] = socket.gethostname) -> None:
        self._clock = clock
        self._proc = proc
        self._host = hostname()
        self._read_mono_s = float("-inf")
        self._last: tuple[list[Sample], dict[str, str]] = ([], {})

    def sample(self) -> tuple[list[Sample], dict[str, str]]:
        """(samples, reasons by what is unknown). Reads memory only, no disk: doesn't block."""
        now_mono_s = self._clock.mono_s()
        if now_mono_s - self._read_mono_s >= _SAME_READING_S:
            self._read_mono_s = now_mono_s
            self._last = self._read()
        return self._last

    def _read(self) -> tuple[list[Sample], dict[str, str]]:
        labels = {"host": self._host}
        boot_unix_ns = int(psutil.boot_time() * 1_000_000_000)
        cpu, memory, swap = psutil.cpu_times(), psutil.virtual_memory(), psutil.swap_memory()
        samples = [
            *(
                Sample(CPU, {**labels, "mode": mode}, float(getattr(cpu, mode)), boot_unix_ns)
                for mode in _MODES
                if hasattr(cpu, mode)
            ),
            Sample(CPUS, labels, float(psutil.cpu_count() or 1)),
            Sample(MEMORY_TOTAL, labels, float(memory.total)),
            Sample(MEMORY_AVAILABLE, labels, float(memory.available)),
            Sample(SWAP_TOTAL, labels, float(swap.total)),
            Sample(SWAP_FREE, labels, float(swap.free)),
            Sample(SWAP_IN, labels, float(swap.sin), boot_unix_ns),
            Sample(SWAP_OUT, labels, float(swap.sout), boot_unix_ns),
            *(Sample(metric, labels, value) for metric, value in zip(LOADS, os.getloadavg(), strict=True)),
        ]
        unknown: dict[str, str] = {}
        for resource in RESOURCES:
            try:
                pressure = parse_pressure((self._proc / "pressure" / resource).read_text(encoding="ascii"))
            except FileNotFoundError:
                unknown["pressure"] = "not_supported"
            except (OSError, ValueError, KeyError):  # EOPNOTSUPP with psi=0; a kernel with another format
                unknown["pressure"] = "unreadable"
            else:
                for kind, (share, total_s) in pressure.items():
                    these = {**labels, "resource": resource, "kind": kind}
                    samples.append(Sample(PRESSURE, these, share))
                    samples.append(Sample(PRESSURE_TOTAL, these, total_s, boot_unix_ns))
        return samples, unknown

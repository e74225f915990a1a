"""What a local backend has really used: its time on a CPU and its time waiting for one, from /proc.

Only the kernel's own count tells work from waiting: on a server whose CPUs are all busy a statement takes many times
its cost. Remote servers have no /proc here: then a statement's cost is the time that the server took for it.

Source: Linux, Documentation/scheduler/sched-stats (/proc/<pid>/schedstat: ns on the CPU, ns runnable but waiting).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Usage:
    """A process's account since its start, in seconds."""

    cpu_s: float
    queued_s: float  # runnable, and no CPU free


class BackendMeter:
    """Reads one backend's account; `open` it when the connection is new, `close` it with the connection."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def open(cls, pid: int) -> BackendMeter | None:
        """None where there is no such process, no such count, or another program under that number."""
        with contextlib.suppress(OSError):
            fd = os.open(f"/proc/{pid}/schedstat", os.O_RDONLY | os.O_CLOEXEC)
            try:  # after opening: the file stays that process's whatever the number becomes
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"postgres"):
                    return cls(fd)
            except OSError:
                os.close(fd)
                raise
            os.close(fd)
        return None

    def read(self) -> Usage | None:
        """The account now; None once the process is gone."""
        try:
            cpu_ns, queued_ns, _ = os.pread(self._fd, 128, 0).split()
        except (OSError, ValueError):
            return None
        return Usage(int(cpu_ns) / 1e9, int(queued_ns) / 1e9)

    def close(self) -> None:
        os.close(self._fd)


def cost_s(took_s: float, before: Usage | None, after: Usage | None) -> float:
    """What statements that took `took_s` of the server's time cost it.

    The time they took, without waiting for a CPU but with waiting for locks and disks (a backend that waits holds on to
    something); never less than the CPU they used. Without the account: the time they took.
    """
    if before is None or after is None:
        return took_s
    return max(after.cpu_s - before.cpu_s, took_s - (after.queued_s - before.queued_s))


def cost_shares(took_s: Sequence[float], before: Usage | None, after: Usage | None) -> Iterator[float]:
    """What each of a pipeline's statements cost, by the time that each took.

    Evenly when they took no time that we could see: a busy agent reads all answers at once, the backend worked nevertheless.
    """
    total_s = sum(took_s)
    cost = cost_s(total_s, before, after)
    return (cost * (each_s / total_s if total_s else 1 / len(took_s)) for each_s in took_s)

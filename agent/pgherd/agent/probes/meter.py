"""What statements really cost a server: the backend's time on a CPU and its time waiting for one, from /proc; and ours.

Only the kernel's own count tells work from waiting: on a machine whose CPUs are all busy a statement takes many times
its cost, and we look at its answer late. Remote servers have no /proc here: then it is the time that they took.

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
    """An account of CPU time, since the start of its process or over a while, in seconds."""

    cpu_s: float
    queued_s: float  # runnable, and no CPU free


class Meter:
    """Reads one backend's or thread's account; close it with what it belongs to."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def of_backend(cls, pid: int) -> Meter | None:
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

    @classmethod
    def of_this_thread(cls) -> Meter | None:
        """The calling thread's own account; None where the kernel keeps none."""
        with contextlib.suppress(OSError):
            return cls(os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC))
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


def cost_s(took_s: float, backend: Usage | None, own: Usage | None) -> float:
    """What statements that took `took_s` by our clock cost the server, from both sides' accounts of that time.

    The time they took, without the backend's waiting for a CPU and without what we ourselves worked or waited for one
    before we looked at the answer; with its waiting for locks and disks (a backend that waits holds on to something). Never
    less than the CPU that the backend used. A side whose account isn't known counts as idle.
    """
    rest_s = took_s
    if own is not None:
        rest_s -= own.cpu_s + own.queued_s
    if backend is None:
        return max(0.0, rest_s)
    return max(backend.cpu_s, rest_s - backend.queued_s)


def since(before: Usage | None, after: Usage | None) -> Usage | None:
    """What was added to an account; None when either reading is missing."""
    if before is None or after is None:
        return None
    return Usage(after.cpu_s - before.cpu_s, after.queued_s - before.queued_s)


def cost_shares(took_s: Sequence[float], backend: Usage | None, own: Usage | None) -> Iterator[float]:
    """What each of a pipeline's statements cost, by the time that each took.

    Evenly when they took no time that we could see: a busy agent reads all answers at once, the backend worked nevertheless.
    """
    total_s = sum(took_s)
    cost = cost_s(total_s, backend, own)
    return (cost * (each_s / total_s if total_s else 1 / len(took_s)) for each_s in took_s)

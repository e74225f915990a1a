"""The demo starts only the real commands: this is how, and what they cost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil

from pgherd.runtime.durable import is_locked

BIN = Path(sys.executable).parent


class CommandError(Exception):
    """A command of the demo didn't do what it should; carries its last words."""


def call(argv: Sequence[str | Path], *, stdin: str | None = None, timeout_s: float = 120.0) -> Any:
    """Run one of our verbs with `--json` and return the decoded answer."""
    line = [str(BIN / str(argv[0])), *map(str, argv[1:])]
    finished = subprocess.run(
        line, check=False, input=stdin, capture_output=True, text=True, timeout=timeout_s, start_new_session=True
    )
    if finished.returncode != 0:
        raise CommandError(
            f"{' '.join(map(str, argv))} exited with {finished.returncode}: {(finished.stderr or finished.stdout).strip()[-1500:]}"
        )
    return json.loads(finished.stdout) if finished.stdout.strip() else None


@dataclass
class Service:
    """A long-running command: started, killed, restarted, measured, stopped."""

    name: str
    argv: list[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    rss_peak_bytes: int = 0
    cpu_before_s: float = 0.0
    cpu_s: float = 0.0
    started_mono_s: float = field(default_factory=time.monotonic)
    _children_cpu_s: dict[int, float] = field(default_factory=dict)

    def start(self) -> None:
        """Start it, again after `stop` or `kill`; its CPU time is summed over all of them."""
        self.cpu_before_s += self.cpu_s
        self.cpu_s = 0.0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=self.log.parent
            )

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> int | None:
        """SIGTERM and twenty seconds' patience; returns the exit status."""
        if self.process is None:
            return None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait(10)

    def measure(self) -> None:
        """Take memory (with children) and CPU as they are now."""
        if not self.running or self.process is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.process.pid)
            family = [own, *own.children(recursive=True)]
            rss = 0
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    rss += member.memory_info().rss
                    times = member.cpu_times()
                    if member.pid == own.pid:
                        self.cpu_s = times.user + times.system
                    else:
                        self._children_cpu_s[member.pid] = times.user + times.system
            self.rss_peak_bytes = max(self.rss_peak_bytes, rss)

    def figures(self) -> dict[str, Any]:
        """What it costs: resident memory now, the peak with children, CPU seconds and share."""
        elapsed_s = time.monotonic() - self.started_mono_s
        resident = psutil.Process(self.process.pid).memory_info().rss if self.running and self.process else None
        total_s = self.cpu_before_s + self.cpu_s
        return {
            "name": self.name,
            "pid": self.process.pid if self.process else None,
            "resident_bytes": resident,
            "peak_bytes_with_children": self.rss_peak_bytes,
            "cpu_seconds": round(total_s, 2),
            "cpu_seconds_children_seen": round(sum(self._children_cpu_s.values()), 2),
            "cpu_share_of_one_core": round(total_s / elapsed_s, 4) if elapsed_s else None,
            "elapsed_seconds": round(elapsed_s, 1),
        }

    def tail(self, lines: int = 12) -> str:
        """The last lines of its log, for a failure."""
        try:
            return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
        except OSError:
            return ""


class Herdlike(Protocol):
    """What runs services, more of them as time goes on."""

    @property
    def services(self) -> list[Service]: ...


@contextlib.contextmanager
def measuring(herd: Herdlike, interval_s: float = 0.5) -> Iterator[None]:
    """Measure all services while inside."""
    done = threading.Event()

    def loop() -> None:
        while not done.wait(interval_s):
            for service in herd.services:
                service.measure()

    thread = threading.Thread(target=loop, name="measure", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(5)


def survivors(workspace: Path) -> list[int]:
    """Processes whose command line names the workspace: after the end there must be none."""
    return [
        process.pid
        for process in psutil.process_iter(["pid", "cmdline"])
        if process.pid != os.getpid() and any(str(workspace) in part for part in process.info["cmdline"] or [])
    ]


def end_orphans(parent: Path) -> None:
    """End what a demo that was killed with -9 left running: processes of workspaces that nobody holds any more."""
    for lock in parent.glob("s-*.lock"):
        if is_locked(lock):
            continue
        for pid in survivors(lock.with_suffix("")):
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                process.terminate()
                try:
                    process.wait(10)
                except psutil.TimeoutExpired:
                    process.kill()

"""The demo as a newcomer runs it: every step of its JSON true, and nothing left whatever ends it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from support.waiting import wait_until

pytestmark = [pytest.mark.pg, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
DEMO = [sys.executable, str(ROOT / "deploy" / "demo" / "demo.py")]
STEPS = [
    "replication streams",
    "collector runs",
    "agents joined with tokens over mTLS",
    "samples are ingested",
    "series are there",
    "a range query answers",
    "a disk is more than 80 % full: an alert fires",
    "more than 90 % of the usable connections are taken: an alert fires",
    "P99 is above 1000 ms: an alert fires",
    "replication is more than 10 s behind: an alert fires",
    "the four alerts resolve",
    "a backup is commanded and taken",
    "the backup is verified",
    "it is restored and its content is equal",
    "the backup is listed with its grade",
    "the collector is killed with -9 and comes back",
    "samples counted = samples stored",
    "the herd goes on",
    "nothing is left running or behind",
]


@pytest.mark.timeout(300)
def test_the_story_is_all_true() -> None:
    finished = subprocess.run([*DEMO, "--for", "1s", "--json"], capture_output=True, text=True, timeout=280)
    summary: dict[str, Any] = json.loads(finished.stdout)
    failed = [step for step in summary["steps"] if not step["ok"]]
    assert not failed, f"{failed}\n{finished.stderr[-5000:]}"
    assert finished.returncode == 0
    assert summary["ok"] is True
    assert [step["name"] for step in summary["steps"]] == STEPS
    figures = {step["name"]: step["figures"] for step in summary["steps"]}
    books = figures["samples counted = samples stored"]
    assert set(books) == {"primary", "standby"}
    assert all(book["sampled"] == book["stored"] > 1000 for book in books.values())
    assert figures["it is restored and its content is equal"]["rows_compared"] >= 500_000  # pgbench at scale 5
    assert {process["name"] for process in summary["processes"]} == {"collector", "agent primary", "agent standby"}
    assert all(process["peak_bytes_with_children"] >= process["resident_bytes"] > 0 for process in summary["processes"])


def runs_an_agent(demo: psutil.Process) -> bool:
    """Whether the herd is complete up to its first agent."""
    for process in demo.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "pgherd.agent.resident" in process.cmdline():
                return True
    return False


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=["Ctrl-C", "terminal closed"])
def test_ending_it_leaves_nothing(number: signal.Signals) -> None:
    """In the middle of the story, to the whole foreground group, as a terminal sends it."""
    argv = [*DEMO, "--json"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) as demo:
        herd = psutil.Process(demo.pid)
        wait_until(lambda: demo.poll() is not None or runs_an_agent(herd), 60, "a running herd")
        mine = herd.children(recursive=True)
        workspaces = {part for process in mine for part in " ".join(process.cmdline()).split() if "/pgherd-demo-" in part}
        os.killpg(demo.pid, number)
        _, errors = demo.communicate(timeout=60)
    assert demo.returncode == 130, errors
    assert workspaces, "the herd's command lines name its workspace"
    assert [process for process in mine if process.is_running() and process.status() != psutil.STATUS_ZOMBIE] == []
    assert [path for path in workspaces if Path(path).exists()] == []

"""The real evaluator, notifier and outbox as a process to be killed: argv = directory, webhook URL, and how it groups (JSON).

`truth.json` in the directory lists the instances for which the rule's expression holds; each evaluation adds a
byte to `evaluations`, and the first that sees an instance leaves its time (ms) in `seen-<instance>`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from pgherd.alerts.notify_http import webhook_receiver
from pgherd.collector.alerting.evaluation import Evaluator
from pgherd.collector.alerting.notifier import Notifier
from pgherd.collector.alerting.outbox import OutboxSettings, OutboxWorker
from pgherd.collector.alerting.silencing import Silencer
from pgherd.runtime.clock import SystemClock
from pgherd.runtime.durable import publish
from pgherd.runtime.logging import configure
from pgherd.storage.control.store import ControlStore
from support.alerts import group, no_facts, rule
from support.notifying import routing, timing

FOR_S = 0.5
INTERVAL_S = 0.1


async def main(directory: Path, url: str, grouping: dict[str, Any]) -> None:
    configure(level="error", json=True)
    store = ControlStore.open(directory / "control.sqlite")
    counter = open(directory / "evaluations", "ab", buffering=0)  # noqa: SIM115, ASYNC230 - lives as long as we do

    def query(_expr: str, at_ms: int) -> list[tuple[dict[str, str], float]]:
        names = json.loads((directory / "truth.json").read_text())
        counter.write(b".")
        for name in names:
            if not (directory / f"seen-{name}").exists():
                publish(directory / f"seen-{name}", str(at_ms).encode())
        return [({"instance": name}, 1.0) for name in names]

    worker = OutboxWorker(
        store,
        [webhook_receiver("hook", url, timeout_s=5)],
        SystemClock(),
        OutboxSettings(backoff_min_s=0.05, backoff_max_s=0.2, poll_s=0.1),
    )
    evaluator = Evaluator(
        groups=[group(rule(for_s=FOR_S), interval_s=INTERVAL_S)],
        store=store,
        query=query,
        facts=no_facts,
        clock=SystemClock(),
        committed=lambda: notifier.wake(),  # noqa: PLW0108 - it is made from the evaluator
    )
    silencer = Silencer(store, SystemClock())
    notifier = Notifier(
        status=evaluator.status,
        store=store,
        routing=routing(when=timing(**grouping["timing"]), group_by=grouping["group_by"]),
        silencer=silencer,
        clock=SystemClock(),
        posted=worker.wake,
    )
    evaluator.restore()
    silencer.load()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(worker.run())
        tasks.create_task(notifier.run())
        tasks.create_task(evaluator.run())


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])))

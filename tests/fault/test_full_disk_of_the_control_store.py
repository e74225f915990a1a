"""A truly full disk under the control store: alerts, letters, ledger and heartbeats wait, and go on by themselves.

Needs the right to mount a tmpfs (root), skipped elsewhere.
"""

from __future__ import annotations

import asyncio
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog
from sqlalchemy import select

from pgherd.alerts.model import State
from pgherd.alerts.notification import from_document
from pgherd.alerts.notify_http import webhook_receiver
from pgherd.collector.alerting.evaluation import Evaluator
from pgherd.collector.alerting.outbox import OutboxSettings, OutboxWorker
from pgherd.collector.control.herd import Herd, NodeReport
from pgherd.collector.control.ledger import Ledger
from pgherd.collector.control.views import Views
from pgherd.proto.commands import Event, Ping
from pgherd.proto.errors import TransientError
from pgherd.runtime.clock import SystemClock
from pgherd.storage.control.schema import outbox, settings
from pgherd.storage.control.store import ControlStore
from support.alerts import Answers, TestClock, group, no_facts, rule
from support.control import ManualClock, add_node, enrol
from support.disk import fill
from support.notifying import notifier
from support.webhook import Webhook, webhook

pytestmark = pytest.mark.fault

ROW = [({"__name__": "x", "instance": "a:5432"}, 2.0)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """4 MiB."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"can't mount a tmpfs: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_alerts_and_letters_wait_for_room_and_nothing_is_lost_or_doubled(small_disk: Path) -> None:
    store = ControlStore.open(small_disk / "control.db")
    clock, query = TestClock(), Answers()
    evaluator = Evaluator(groups=[group(rule(for_s=30))], store=store, query=query, facts=no_facts, clock=clock)
    told = notifier(store, evaluator, clock)

    def turn() -> None:
        clock.advance(15)
        for evaluation in evaluator._evaluations:
            evaluation.evaluate(clock.wall_unix_ns(), clock.mono_s(), clock)
        told.turn()

    def letters() -> list[str]:
        with store.read() as connection:
            return [from_document(letter).status for letter in connection.execute(select(outbox.c.payload)).scalars()]

    def states() -> list[State]:
        return [one.state for g in evaluator.status() for r in g.alerting for one in r.instances.values()]

    query.vectors["x > 1"] = ROW
    turn()
    assert states() == [State.PENDING]
    ballast = small_disk / "ballast"
    _exhaust(store, ballast)
    for _ in range(4):
        turn()
    assert evaluator.status()[0].commits_failed > 0
    assert states() == [State.PENDING]  # not announced, because it could not be kept
    assert letters() == []  # reads go on
    ballast.unlink()
    for _ in range(4):
        turn()
    assert states() == [State.FIRING]
    assert letters() == ["firing"]

    _exhaust(store, ballast)
    with webhook() as hook:
        asyncio.run(_deliver_on_a_full_disk(store, hook, ballast))
        assert [call.told for call in hook.calls] == ["firing High"]
    store.close()


async def _deliver_on_a_full_disk(store: ControlStore, hook: Webhook, ballast: Path) -> None:
    """The letter goes out once though "delivered" can't be written, however often that is tried."""
    receiver = webhook_receiver("hook", hook.url, timeout_s=5, external_url="")
    quick = OutboxSettings(backoff_min_s=0.02, backoff_max_s=0.05, poll_s=0.05)
    worker = OutboxWorker(store, [receiver], SystemClock(), quick)
    with structlog.testing.capture_logs() as said:
        task = asyncio.create_task(worker.run())
        try:
            await _until(lambda: sum(line["event"] == "notify.outbox.paused" for line in said) > 3, task)
            assert worker.counters["hook"].delivered == 0
            await asyncio.to_thread(ballast.unlink)
            await _until(lambda: worker.counters["hook"].delivered == 1, task)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _until(condition: Callable[[], bool], task: asyncio.Task[None]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            assert not task.done(), task.exception()
            await asyncio.sleep(0.01)


def _exhaust(store: ControlStore, ballast: Path) -> None:
    """Fill the disk, and what room SQLite holds in its files, until the store refuses."""
    with pytest.raises(TransientError) as caught:  # noqa: PT012 - both are needed
        for number in range(10_000):
            fill(ballast)
            with store.begin() as connection:
                connection.execute(settings.insert().values(name=f"fill-{number}-{uuid.uuid4()}", value="x" * 2000))
    assert caught.value.code == "store.unavailable"


def test_commands_and_heartbeats_on_a_full_disk_are_refused_by_name_and_go_on(small_disk: Path) -> None:
    store, clock = ControlStore.open(small_disk / "control.db"), ManualClock()
    agent = enrol(store)
    node = add_node(store, agent)
    ledger, herd = Ledger(store, clock), Herd(store, clock, heartbeat_interval_s=5)
    kept = ledger.submit(node, Ping(), actor="test", via="test").command_id
    report = NodeReport(node, "n1", "c1", "7", "h:5432", 150000, "primary", "up")
    herd.arrive(agent, (report,), {"software_version": "x" * 64})
    ballast = small_disk / "ballast"
    _exhaust(store, ballast)
    with pytest.raises(TransientError) as refused:
        ledger.record(agent, Event(kept, 1, clock.wall_unix_ns(), "accepted", {}))
    assert refused.value.code == "store.unavailable"  # unacknowledged: the agent says it again
    with pytest.raises(TransientError):
        herd.flush()
    assert herd.heard(agent) is not None
    ballast.unlink()
    assert herd.flush() == 1  # what couldn't be written is still to be
    assert ledger.record(agent, Event(kept, 1, clock.wall_unix_ns(), "accepted", {})).known
    assert Views(store, herd).command(kept)["state"] == "accepted"
    store.close()

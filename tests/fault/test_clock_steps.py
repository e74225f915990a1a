"""Wall clocks that jump: nothing is deleted, refused, executed, announced or kept silent because of it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from pgherd.alerts.model import State
from pgherd.alerts.notification import from_document
from pgherd.collector.alerting.evaluation import Evaluator
from pgherd.collector.alerting.herd import herd_facts
from pgherd.collector.alerting.query import promql_query
from pgherd.collector.control.herd import Herd, NodeReport
from pgherd.collector.control.ledger import Ledger
from pgherd.collector.ingest.admit import AdmitLimits
from pgherd.collector.ingest.service import MetricsService, ServiceSettings
from pgherd.proto.commands import Ping
from pgherd.proto.steps import FOLLOWED_AFTER_S, TOLERANCE_NS, UnsteppedClock
from pgherd.runtime.clock import SystemClock
from pgherd.storage.control.schema import outbox
from pgherd.storage.control.store import ControlStore
from pgherd.storage.series.batch import Batch, layout_of
from support.alerts import TestClock, group, rule
from support.control import ManualClock, add_node, enrol
from support.notifying import notifier, routing, timing
from support.otlp import simple
from support.series import BASE_MS, HandClock, batch, layout, name_is, open_store, quiet
from support.waiting import wait_until

pytestmark = pytest.mark.fault

DAY_MS = 86400_000
HOUR_S = 3600
LABELS = {"instance": "a:5432", "node": "n", "cluster": "c", "job": "pgherd"}


# ---- the clock that isn't moved at once


@given(st.lists(st.tuples(st.floats(0.1, 7000), st.sampled_from([0, 0, 0, -5, 90, -7200, 86400 * 40])), max_size=30))
def test_it_goes_on_like_monotonic_time_and_never_jumps_far(turns: list[tuple[float, int]]) -> None:
    clock = ManualClock()
    steady = UnsteppedClock(clock)
    before = steady.wall_unix_ns()
    for seconds, step_s in turns:
        clock.advance(seconds)
        clock.unix_ns += step_s * 10**9
        now = steady.wall_unix_ns()
        followed = sum(seconds for seconds, _ in turns) >= FOLLOWED_AFTER_S
        assert abs(now - before - seconds * 1e9) <= TOLERANCE_NS + 1e6 or followed
        before = now


def test_a_step_is_followed_after_a_day_and_forgotten_when_it_is_undone() -> None:
    clock = ManualClock()
    steady = UnsteppedClock(clock)
    clock.unix_ns += 30 * 86400 * 10**9
    assert clock.unix_ns - steady.wall_unix_ns() == 30 * 86400 * 10**9
    clock.advance(FOLLOWED_AFTER_S - 1)
    assert steady.wall_unix_ns() != clock.unix_ns
    assert steady.has_stepped
    clock.advance(1)
    assert steady.wall_unix_ns() == clock.unix_ns
    clock.unix_ns -= 5 * HOUR_S * 10**9
    assert steady.wall_unix_ns() - clock.unix_ns == 5 * HOUR_S * 10**9
    clock.unix_ns += 5 * HOUR_S * 10**9
    assert steady.wall_unix_ns() == clock.unix_ns
    assert not steady.has_stepped


# ---- retention


@dataclass
class ShiftableClock(HandClock):
    """Its monotonic time can be moved on, too."""

    mono_offset_s: float = 0.0

    def mono_s(self) -> float:
        return SystemClock().mono_s() + self.mono_offset_s


EXPIRING = {"retention_s": 15 * 86400.0, "expiry_interval_s": 0.05}


def test_a_clock_that_leaps_a_month_deletes_nothing_for_a_day(tmp_path: Path) -> None:
    clock = ShiftableClock()
    store = open_store(tmp_path, quiet(**EXPIRING), clock)
    store.append(batch(layout(3), BASE_MS, [1.0] * 3, 1)).result(10)
    clock.unix_ms += 30 * DAY_MS
    looked = store._writer._next_expiry_mono_s
    wait_until(lambda: store._writer._next_expiry_mono_s > looked + 1, 10, "several looks at what is old")
    assert len(store.select([name_is("m")], 0, 1 << 60)) == 3
    assert len(store.shipments()) == 1  # without its high-water mark a repeated batch would be stored twice
    clock.mono_offset_s += FOLLOWED_AFTER_S + 1
    wait_until(lambda: store.counters.points_expired == 3, 10, "the clock to be believed")
    store.close()


def test_a_clock_that_is_wrong_at_boot_deletes_nothing_for_a_day(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.append(batch(layout(3), BASE_MS, [1.0] * 3, 1)).result(10)
    store.close()
    clock = ShiftableClock(BASE_MS + 3650 * DAY_MS)
    store = open_store(tmp_path, quiet(**EXPIRING), clock)
    looked = store._writer._next_expiry_mono_s
    wait_until(lambda: store._writer._next_expiry_mono_s > looked + 1, 10, "several looks at what is old")
    assert len(store.select([name_is("m")], 0, 1 << 60)) == 3
    clock.mono_offset_s += FOLLOWED_AFTER_S + 1
    wait_until(lambda: store.counters.points_expired == 3, 10, "the clock to be believed")
    store.close()


# ---- admission


@dataclass(frozen=True)
class Sender:
    id: str
    kind: str = "agent"


@pytest.mark.parametrize("step_s", [-2 * HOUR_S, 20 * 86400])
def test_what_agents_send_is_taken_though_the_collectors_clock_stepped(tmp_path: Path, step_s: int) -> None:
    """A sample that is refused by its time is gone: the agent drops what was answered."""
    clock = HandClock()
    store = open_store(tmp_path)
    limits = AdmitLimits(future_max_s=600, past_max_s=7 * 86400)
    service = MetricsService(
        store, current_peer=lambda _: Sender("a"), owns=lambda *_: True, clock=clock, settings=ServiceSettings(limits=limits)
    )
    clock.unix_ms += step_s * 1000
    body = simple([1.0, 2.0], BASE_MS * 1_000_000, agent="a", node="")
    metadata = (("pgherd-incarnation", str(uuid.uuid4())), ("pgherd-sequence", "1"))
    asyncio.run(service.accept(body, Sender("a"), metadata))
    assert service.counters.points_rejected == {}
    assert store.counters.points_stored == 2
    service.close()
    store.close()


# ---- alerts


@dataclass
class AlertBench:
    """Real rules over a real store; the agents' clocks are right, the collector's is moved."""

    directory: Path

    def __post_init__(self) -> None:
        self.clock = TestClock()
        self.true_ms = int(self.clock.wall_s * 1000)
        self.control = ControlStore.open(self.directory / "control.db")
        self.series = open_store(self.directory, clock=HandClock(self.true_ms))
        herd = Herd(self.control, self.clock, heartbeat_interval_s=HOUR_S)
        agent_id = enrol(self.control)
        report = NodeReport("00000000-0000-4000-8000-000000000001", "n", "c", "7", "a:5432", 150000, "primary", "up")
        herd.claim(agent_id, (report,), {})
        herd.arrive(agent_id, (report,), {})
        query = promql_query(self.series, self.clock, timeout_s=30)
        self.evaluator = Evaluator(
            groups=[group(rule(expr="disk > 0.8", for_s=60))],
            store=self.control,
            query=query,
            facts=herd_facts(self.control, herd, query),
            clock=self.clock,
        )
        self.notifier = notifier(
            self.control, self.evaluator, self.clock, routes=routing(when=timing(wait_s=30, interval_s=60))
        )

    def sample(self, disk: float) -> None:
        made = layout_of([{**LABELS, "__name__": "disk"}, {**LABELS, "__name__": "pg_up"}])
        times = np.full(2, self.true_ms, np.int64)
        self.series.append(Batch(made, np.arange(2, dtype=np.int32), times, np.array([disk, 1.0]))).result(10)

    def turn(self, disk: float) -> None:
        """Fifteen true seconds, a sample, an evaluation, a look at what to tell."""
        self.clock.advance(15)
        self.true_ms += 15_000
        self.sample(disk)
        for evaluation in self.evaluator._evaluations:
            evaluation.evaluate(self.clock.wall_unix_ns(), self.clock.mono_s(), self.clock)
        self.notifier.turn()

    def states(self) -> list[State]:
        return [one.state for g in self.evaluator.status() for r in g.alerting for one in r.instances.values()]

    def told(self) -> list[str]:
        with self.control.read() as connection:
            return [from_document(letter).status for letter in connection.execute(select(outbox.c.payload)).scalars()]


@pytest.fixture
def alerts(tmp_path: Path) -> Iterator[AlertBench]:
    made = AlertBench(tmp_path)
    yield made
    made.series.close()
    made.control.close()


@pytest.mark.parametrize("step_s", [HOUR_S, -HOUR_S])
def test_a_step_of_the_collectors_clock_resolves_nothing(alerts: AlertBench, step_s: int) -> None:
    """Its own "now" has no samples: that is no news, and no end of the alert."""
    for _ in range(8):
        alerts.turn(0.9)
    assert (alerts.states(), alerts.told()) == ([State.FIRING], ["firing"])
    alerts.clock.wall_s += step_s
    for _ in range(8):
        alerts.turn(0.9)
        assert alerts.states() in ([State.FIRING], [State.UNKNOWN])
        assert "resolved" not in alerts.told()
    alerts.clock.wall_s -= step_s
    for _ in range(5):
        alerts.turn(0.9)
    assert alerts.states() == [State.FIRING]
    assert alerts.told() == ["firing"]  # the same episode went on: nobody is paged twice
    for _ in range(6):
        alerts.turn(0.1)
    assert alerts.states() == [State.RESOLVED]
    assert alerts.told() == ["firing", "resolved"]


@pytest.mark.parametrize("step_s", [HOUR_S, -HOUR_S])
def test_a_step_neither_shortens_nor_restarts_the_for_clock(alerts: AlertBench, step_s: int) -> None:
    for _ in range(3):
        alerts.turn(0.9)
    assert alerts.states() == [State.PENDING]
    alerts.clock.wall_s += step_s
    for evaluation in alerts.evaluator._evaluations:
        evaluation._query = lambda _expr, _at_ms: [
            (LABELS | {"__name__": "disk"}, 0.9)
        ]  # what the rule reads is there all the time
    alerts.turn(0.9)
    assert alerts.states() == [State.PENDING]
    alerts.turn(0.9)
    assert alerts.states() == [State.FIRING]


def test_a_page_waits_for_its_group_and_not_for_a_clock_that_went_back(alerts: AlertBench) -> None:
    for _ in range(5):
        alerts.turn(0.9)
    assert (alerts.states(), alerts.told()) == ([State.FIRING], [])  # its group waits half a minute
    alerts.clock.wall_s -= HOUR_S
    for _ in range(2):
        alerts.turn(0.9)
    assert alerts.told() == ["firing"]


# ---- commands


@pytest.mark.parametrize(("step_s", "offered"), [(HOUR_S, 0), (-HOUR_S, 1)])
def test_a_command_is_never_given_more_time_than_was_asked_for(tmp_path: Path, step_s: int, offered: int) -> None:
    """Forward it expires, which is safe; back it is offered, with no more time than it had."""
    clock = ManualClock()
    store = ControlStore.open(tmp_path / "control.db")
    agent = enrol(store)
    node = add_node(store, agent)
    ledger = Ledger(store, clock)
    ledger.submit(node, Ping(), actor="test", via="test", accept_within_s=60)
    clock.unix_ns += step_s * 10**9
    offers = ledger.take_offers(agent)
    assert len(offers) == offered
    assert all(offer.accept_within_ms <= 60_000 for offer in offers)
    store.close()

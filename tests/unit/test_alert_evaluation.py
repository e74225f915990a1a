"""Evaluation of groups on the real control store: what is committed, what is kept, what is counted."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select

from pgherd.alerts.knowledge import Knowledge, Watched
from pgherd.alerts.model import Group, State
from pgherd.alerts.notification import from_document
from pgherd.collector.alerting.evaluation import Evaluator
from pgherd.collector.alerting.group import Facts, GroupEvaluation, Health
from pgherd.proto.errors import PreconditionError, TransientError
from pgherd.runtime.clock import SystemClock
from pgherd.storage.control.schema import alert_instances, outbox
from pgherd.storage.control.store import ControlStore
from support.alerts import Answers, TestClock, group, no_facts, rule
from support.notifying import notifier

EXPR = "x > 1"
A = {"__name__": "x", "instance": "a:5432"}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ControlStore]:
    opened = ControlStore.open(tmp_path / "control.sqlite")
    yield opened
    opened.close()


class Bench:
    """One evaluator over a store, driven slot by slot; `restart` is what a kill -9 leaves."""

    def __init__(self, store: ControlStore, *groups: Group, facts: Facts = no_facts) -> None:
        self.store, self.groups, self.facts = store, groups, facts
        self.clock, self.query = TestClock(), Answers()
        self.restart()

    def restart(self) -> None:
        self.evaluator = Evaluator(
            groups=self.groups,
            store=self.store,
            query=self.query,
            facts=self.facts,
            clock=self.clock,
        )
        self.evaluator.restore()
        self.notifier = notifier(self.store, self.evaluator, self.clock)

    def turn(self, *, after_s: float = 15) -> int:
        """Move time, evaluate each group once; returns the number of transitions."""
        self.clock.advance(after_s)
        transitions = sum(
            evaluation.evaluate(self.clock.wall_unix_ns(), self.clock.mono_s(), self.clock) for evaluation in self.evaluations()
        )
        self.notifier.turn()
        return transitions

    def evaluations(self) -> tuple[GroupEvaluation, ...]:
        return self.evaluator._evaluations

    def states(self) -> list[State]:
        return [one.state for g in self.evaluator.status() for r in g.alerting for one in r.instances.values()]

    def told(self) -> list[str]:
        with self.store.read() as connection:
            letters = connection.execute(select(outbox.c.payload).order_by(outbox.c.id)).scalars()
            return [from_document(letter).status for letter in letters]


def test_fires_and_resolves_into_the_outbox(store: ControlStore) -> None:
    bench = Bench(store, group(rule(for_s=30)))
    bench.query.vectors[EXPR] = [(A, 2.0)]
    assert [bench.turn(), bench.turn(), bench.turn()] == [0, 0, 1]
    bench.query.vectors[EXPR] = []
    assert [bench.turn(), bench.turn()] == [1, 0]
    assert bench.told() == ["firing", "resolved"]
    assert bench.states() == [State.RESOLVED]
    assert bench.query.asked[0] == (EXPR, bench.clock.wall_unix_ns() // 1_000_000 - 60_000)


def test_a_restart_keeps_the_for_clock(store: ControlStore) -> None:
    bench = Bench(store, group(rule(for_s=60)))
    bench.query.vectors[EXPR] = [(A, 2.0)]
    bench.turn()
    for _ in range(3):
        bench.restart()
        assert bench.turn() == 0
    bench.restart()
    assert bench.turn() == 1, "four intervals of 15 s, each in another process"
    bench.restart()
    assert bench.turn() == 0, "and announced only once"
    assert bench.told() == ["firing"]


def test_a_restart_resolves_what_ended_meanwhile(store: ControlStore) -> None:
    bench = Bench(store, group(rule()))
    bench.query.vectors[EXPR] = [(A, math.nan)]
    bench.turn()
    bench.query.vectors[EXPR] = []
    bench.restart()
    assert bench.turn() == 1
    assert bench.told() == ["firing", "resolved"]


def test_a_failed_query_keeps_the_state_and_shows_it(store: ControlStore) -> None:
    bench = Bench(store, group(rule(), rule("Other", expr="y")))
    bench.query.vectors = {EXPR: [(A, 2.0)], "y": [(A, 1.0)]}
    bench.turn()
    bench.query.vectors = {EXPR: TransientError("store.unavailable", "disk full"), "y": []}
    assert bench.turn() == 1, "the other rule is evaluated"
    (status,) = bench.evaluator.status()
    assert (status.rules[0].health, status.rules[0].last_error) == (Health.ERR, "disk full")
    assert status.rules[1].health is Health.OK
    assert (status.failures, status.evaluations) == (1, 2)
    assert bench.states() == [State.FIRING, State.RESOLVED]
    bench.query.vectors = {EXPR: ZeroDivisionError("a bug")}
    bench.turn()
    assert bench.evaluator.status()[0].rules[0].last_error == "ZeroDivisionError: a bug"


def test_over_the_limit_nothing_moves(store: ControlStore) -> None:
    bench = Bench(store, group(rule(), limit=1))
    bench.query.vectors[EXPR] = [(A, 2.0)]
    bench.turn()
    bench.query.vectors[EXPR] = [({"instance": name}, 2.0) for name in "bc"]
    assert bench.turn() == 0
    (status,) = bench.evaluator.status()
    assert "exceeds its group's limit" in status.rules[0].last_error
    assert bench.states() == [State.FIRING]


def test_unknown_isnt_announced_as_resolved(store: ControlStore) -> None:
    up: set[str] = {"a:5432"}
    watched = (Watched("a:5432", "a", "main", "agent-a", "id-a"),)
    bench = Bench(store, group(rule()), facts=lambda _at_ms: Knowledge(watched, frozenset({"id-a"}), frozenset(up)))
    bench.query.vectors[EXPR] = [(A, 2.0)]
    bench.turn()
    up.clear()
    bench.query.vectors[EXPR] = []
    bench.turn()
    bench.restart()
    bench.turn()
    assert (bench.states(), bench.told()) == ([State.UNKNOWN], ["firing"])
    up.add("a:5432")
    bench.turn()
    assert (bench.states(), bench.told()) == ([State.RESOLVED], ["firing", "resolved"])


def test_without_facts_nothing_is_announced_as_resolved(store: ControlStore) -> None:
    def broken(_at_ms: int) -> Knowledge:
        raise TransientError("store.unavailable", "no facts")

    bench = Bench(store, group(rule()), facts=broken)
    bench.query.vectors[EXPR] = [(A, 2.0)]
    assert bench.turn() == 1
    bench.query.vectors[EXPR] = []
    assert bench.turn() == 0
    assert bench.states() == [State.UNKNOWN]


def test_a_removed_rule_is_announced_as_over(store: ControlStore) -> None:
    bench = Bench(store, group(rule()))
    bench.query.vectors[EXPR] = [(A, 2.0)]
    bench.turn()
    bench.groups = (group(rule("Other", expr="y")),)
    bench.restart()
    bench.turn()
    assert bench.told() == ["firing", "resolved"]
    bench.restart()
    bench.turn()
    assert bench.told() == ["firing", "resolved"]
    with store.read() as connection:
        assert connection.execute(select(alert_instances)).all() == []


@pytest.mark.parametrize("failure", ["INSERT INTO disk_is_full VALUES (1)", "SELECT RAISE(ABORT, 'a bug of ours')"])
def test_a_failed_commit_leaves_everything_as_it_was(store: ControlStore, failure: str) -> None:
    """The store refuses for a while: no notification is lost and none is sent for a state that wasn't kept."""
    bench = Bench(store, group(rule(for_s=30)))
    bench.query.vectors[EXPR] = [(A, 2.0)]
    bench.turn()
    with store.begin() as connection:
        connection.exec_driver_sql(f"CREATE TRIGGER full BEFORE INSERT ON alert_instances BEGIN {failure}; END")
    assert [bench.turn(), bench.turn()] == [0, 0], "the second would have fired"
    status = bench.evaluator.status()[0]
    assert (status.commits_failed, status.rules[0].health) == (2, Health.ERR)
    assert (bench.states(), bench.told()) == ([State.PENDING], [])
    with store.begin() as connection:
        connection.exec_driver_sql("DROP TRIGGER full")
    assert bench.turn() == 1
    assert bench.told() == ["firing"]


def test_steady_alerts_write_nothing(store: ControlStore) -> None:
    bench = Bench(store, group(rule()))
    bench.query.vectors[EXPR] = [(A, 2.0)]
    bench.turn()
    with store.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TRIGGER written BEFORE INSERT ON alert_instances BEGIN SELECT RAISE(ABORT, 'written'); END"
        )
    bench.query.vectors[EXPR] = [(A, 3.0)]
    bench.turn()
    assert bench.evaluator.status()[0].commits_failed == 0
    assert next(iter(bench.evaluator.status()[0].alerting[0].instances.values())).value == 3.0


def test_the_loop_evaluates_on_its_interval_and_counts_what_it_misses(store: ControlStore) -> None:
    committed = asyncio.Event()
    slow = iter([0.35])

    def query(_expr: str, _at_ms: int) -> list[tuple[dict[str, str], float]]:
        clock.wait(next(slow, 0.0))
        return [(A, 2.0)]

    clock = _WaitingClock()
    evaluator = Evaluator(
        groups=[group(rule(for_s=0.3), interval_s=0.1)],
        store=store,
        query=query,
        facts=no_facts,
        clock=clock,
        committed=committed.set,
    )

    async def run() -> None:
        evaluator.restore()
        task = asyncio.create_task(evaluator.run())
        await asyncio.wait_for(committed.wait(), 10)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())
    (status,) = evaluator.status()
    assert status.slots_missed >= 3
    assert status.rules[0].health is Health.OK


class _WaitingClock(SystemClock):
    def wait(self, seconds: float) -> None:
        until_mono_s = self.mono_s() + seconds
        while self.mono_s() < until_mono_s:
            pass


def test_a_rule_refused_by_the_engine_is_its_own_problem(store: ControlStore) -> None:
    bench = Bench(store, group(rule(expr="bad"), rule("Good")))
    bench.query.vectors = {"bad": PreconditionError("promql.execution", "labels collide"), EXPR: [(A, 2.0)]}
    assert bench.turn() == 1

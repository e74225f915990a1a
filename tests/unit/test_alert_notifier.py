"""From alert states to letters on the real control store: groups, routes, silences, inhibition, repeats, kills."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from sqlalchemy import select

from pgherd.alerts.matchers import parse_matcher
from pgherd.alerts.model import Rule
from pgherd.alerts.notification import Notification, from_document
from pgherd.alerts.routing import Inhibition, Route, Routing
from pgherd.collector.alerting.evaluation import Evaluator
from pgherd.collector.alerting.setup import inhibitions_of, receivers_of, routing_of
from pgherd.collector.alerting.silencing import Author, Silencer
from pgherd.collector.config import AlertsConfig, InhibitConfig, ReceiverConfig, RouteConfig
from pgherd.proto.errors import ConfigError
from pgherd.storage.control.schema import notification_groups, outbox
from pgherd.storage.control.store import ControlStore
from support.alerts import Answers, TestClock, group, no_facts, rule
from support.notifying import notifier, routing, timing
from support.waiting import wait_until

AUTHOR = Author("uid:ops", "socket")
HIGH = rule("High", expr="x", labels={"severity": "critical"})
LOW = rule("Low", expr="y", labels={"severity": "warning"})


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ControlStore]:
    opened = ControlStore.open(tmp_path / "control.sqlite")
    yield opened
    opened.close()


class Bench:
    """Evaluator and notifier, turn by turn; `restart` is what a kill -9 leaves."""

    def __init__(
        self,
        store: ControlStore,
        routes: Routing,
        rules: Sequence[Rule] = (HIGH, LOW),
        inhibitions: Sequence[Inhibition] = (),
        places_max: int = 50_000,
    ) -> None:
        self.places_max = places_max
        self.store, self.routes, self.rules, self.inhibitions = store, routes, rules, inhibitions
        self.clock, self.query = TestClock(), Answers()
        self.restart()

    def restart(self) -> None:
        self.evaluator = Evaluator(
            groups=[group(*self.rules)], store=self.store, query=self.query, facts=no_facts, clock=self.clock
        )
        self.evaluator.restore()
        self.silencer = Silencer(self.store, self.clock)
        self.silencer.load()
        self.notifier = notifier(
            self.store,
            self.evaluator,
            self.clock,
            routes=self.routes,
            silencer=self.silencer,
            inhibitions=self.inhibitions,
            pending_max=3,
            places_max=self.places_max,
        )

    def turn(self, x: str = "", y: str = "", *, after_s: float = 15, notify: bool = True) -> list[str]:
        """The nodes for which each rule holds; returns what was newly told: receiver, title, nodes with their status."""
        self.query.vectors = {name: [({"node": node}, 1.0) for node in nodes] for name, nodes in (("x", x), ("y", y))}
        self.clock.advance(after_s)
        for evaluation in self.evaluator._evaluations:
            evaluation.evaluate(self.clock.wall_unix_ns(), self.clock.mono_s(), self.clock)
        return self.notify() if notify else []

    def notify(self) -> list[str]:
        before = len(self.letters())
        self.notifier.turn()
        assert self.notifier.counters.turns_failed == 0
        return sorted(f"{receiver} {_said(message)}" for receiver, message in self.letters()[before:])

    def letters(self) -> list[tuple[str, Notification]]:
        with self.store.read() as connection:
            rows = connection.execute(select(outbox).order_by(outbox.c.id)).all()
        return [(row.receiver, from_document(row.payload)) for row in rows]


def _said(message: Notification) -> str:
    notes = sorted(f"{note.labels['node']}{'' if note.ends_unix_ns is None else '✓'}" for note in message.notes)
    return f"{' '.join(message.group_labels.values())}: {' '.join(notes)}"


def test_alerts_of_a_group_come_in_one_message_that_grows_and_ends(store: ControlStore) -> None:
    bench = Bench(store, routing(group_by=("alertname",)))
    assert bench.turn("ab", "c") == ["hook High: a b", "hook Low: c"]
    assert bench.turn("ab", "c") == []
    assert bench.turn("abd", "c") == ["hook High: a b d"]
    assert bench.turn("bd", "c") == ["hook High: a✓ b d"]
    assert bench.turn("", "") == ["hook High: b✓ d✓", "hook Low: c✓"]
    assert bench.turn() == []
    with store.read() as connection:
        assert connection.execute(select(notification_groups)).all() == [], "and is forgotten"


def test_waiting_gathers_what_comes_together(store: ControlStore) -> None:
    bench = Bench(store, routing(group_by=("alertname",), when=timing(wait_s=25, interval_s=60)))
    assert bench.turn("a") == []
    bench.restart()
    assert bench.turn("ab") == [], "15 s after the first"
    assert bench.turn("ab") == ["hook High: a b"], "30 s after it, whatever was killed in between"
    assert bench.turn("abc") == []
    assert bench.turn("bc", after_s=30) == []
    assert bench.turn("bc", after_s=15) == ["hook High: a✓ b c"]


def test_what_ends_before_it_was_told_is_never_told(store: ControlStore) -> None:
    bench = Bench(store, routing(when=timing(wait_s=60)))
    assert [bench.turn("a"), bench.turn(""), bench.turn("", after_s=60)] == [[], [], []]


def test_what_goes_on_is_told_again_after_its_repeat(store: ControlStore) -> None:
    bench = Bench(store, routing(when=timing(repeat_s=100)))
    assert bench.turn("a") == ["hook High a critical: a"]
    assert bench.turn("a", after_s=99) == []
    bench.restart()
    assert bench.turn("a", after_s=1) == ["hook High a critical: a"]
    assert bench.turn("a", after_s=99) == []
    first, second = (message for _receiver, message in bench.letters())
    assert first.id != second.id
    assert first.notes[0].starts_unix_ns == second.notes[0].starts_unix_ns


def test_killed_between_evaluation_and_notice_it_is_told_once(store: ControlStore) -> None:
    bench = Bench(store, routing())
    assert bench.turn("a", notify=False) == []
    bench.restart()
    assert bench.notify() == ["hook High a critical: a"]
    bench.restart()
    assert bench.notify() == []
    bench.turn("", notify=False)
    bench.restart()
    assert bench.notify() == ["hook High a critical: a✓"]
    bench.restart()
    assert bench.notify() == []


def test_a_failed_commit_tells_nothing_and_later_everything(store: ControlStore) -> None:
    bench = Bench(store, routing())
    with store.begin() as connection:
        connection.exec_driver_sql("CREATE TRIGGER full BEFORE INSERT ON outbox BEGIN SELECT RAISE(ABORT, 'full'); END")
    bench.turn("a", notify=False)
    assert bench.notifier.turn() is None
    assert (bench.letters(), bench.notifier.counters.turns_failed) == ([], 1)
    with store.read() as connection:
        assert connection.execute(select(notification_groups)).all() == [], "not noted as told either"
    with store.begin() as connection:
        connection.exec_driver_sql("DROP TRIGGER full")
    bench.notifier.counters.turns_failed = 0
    assert bench.notify() == ["hook High a critical: a"]


def test_a_silence_mutes_and_what_still_fires_is_told_when_it_ends(store: ControlStore) -> None:
    bench = Bench(store, routing(group_by=("alertname",)))
    id_ = bench.silencer.add(['node="a"'], duration_s=60, author=AUTHOR)
    assert bench.turn("ab") == ["hook High: b"]
    assert [status.state for one in bench.evaluator.status()[0].alerting for status in one.instances.values()] == ["firing"] * 2
    bench.restart()
    assert bench.turn("ab") == []
    assert bench.turn("ab", after_s=30) == ["hook High: a b"], "the 60 s are over"
    second = bench.silencer.add(['alertname="High"'], duration_s=3600, author=AUTHOR)
    assert bench.turn("ab") == []
    assert bench.turn("b") == ["hook High: a✓"], "what was told isn't left open"
    bench.silencer.expire(second, AUTHOR)
    assert bench.notify() == ["hook High: b"], "told again: the snooze is over"
    assert id_ != second


def test_after_an_outage_nothing_is_told_before_the_first_evaluation(store: ControlStore) -> None:
    """The repeat is due, and what it would repeat has ended meanwhile."""
    bench = Bench(store, routing(when=timing(repeat_s=60)))
    bench.turn("a")
    bench.clock.advance(3600)
    bench.restart()

    async def run() -> None:
        task = asyncio.create_task(bench.notifier.run())
        done, _pending = await asyncio.wait([task], timeout=0.4)
        assert not done
        assert len(bench.letters()) == 1
        await asyncio.to_thread(bench.turn, "", notify=False)
        await asyncio.to_thread(wait_until, lambda: len(bench.letters()) > 1, 20, "the end being told")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())
    assert [message.status for _receiver, message in bench.letters()] == ["firing", "resolved"]


def test_what_is_remembered_of_alerts_long_gone_is_bounded(store: ControlStore) -> None:
    bench = Bench(store, routing(group_by=("node",)), places_max=3)
    assert bench.turn("abcdefgh") == [f"hook {node}: {node}" for node in "abcdefgh"], "a turn sees all of its alerts"
    assert bench.turn("abcdefgh") == [], "what was forgotten isn't told again"
    assert bench.turn("a") == [f"hook {node}: {node}✓" for node in "bcdefgh"]
    for node in "ijklmno":
        bench.turn("a" + node)
    assert bench.turn("a") == ["hook o: o✓"]
    assert len(bench.notifier._places_seen) <= 4, "three and what the last turn has added"


def test_routes_choose_receivers_and_the_rest_goes_to_the_default(store: ControlStore) -> None:
    when = timing()
    critical = (parse_matcher('severity="critical"'),)
    routes = Routing(
        (
            Route("pager", critical, ("alertname",), when, continue_matching=True),
            Route("mail", (*critical, parse_matcher('node="b"')), ("node",), when),
        ),
        (Route("log", (), (), when),),
    )
    bench = Bench(store, routes)
    assert bench.turn("ab", "c") == ["log : c", "mail b: b", "pager High: a b"]


def test_inhibition_mutes_the_consequence(store: ControlStore) -> None:
    rules = [Inhibition((parse_matcher("alertname=High"),), (parse_matcher("alertname=Low"),), ("node",))]
    bench = Bench(store, routing(group_by=("alertname",)), inhibitions=rules)
    assert bench.turn("a", "ab") == ["hook High: a", "hook Low: b"]
    assert bench.turn("", "ab") == ["hook High: a✓", "hook Low: a b"]
    assert bench.turn("b", "ab") == ["hook High: b"], "told already: inhibition ends nothing"
    assert bench.turn("", "b") == ["hook High: b✓", "hook Low: a✓ b"]


def test_a_removed_rule_and_a_changed_route_leave_nothing_open(store: ControlStore) -> None:
    bench = Bench(store, routing(group_by=("alertname",)))
    bench.turn("a", "b")
    bench.rules = (LOW,)
    bench.restart()
    assert bench.notify() == ["hook High: a✓"]
    assert bench.letters()[-1][1].notes[0].reason == "rule removed"
    bench.routes = routing(group_by=("node",))
    bench.restart()
    bench.turn("", "", notify=False)
    bench.restart()
    assert bench.notify() == ["hook : b✓"], "ended while the route was changed"


def test_a_full_outbox_drops_the_oldest_and_counts_them(store: ControlStore) -> None:
    bench = Bench(store, routing())
    bench.turn("abcde")
    with store.read() as connection:
        given_up = [row.given_up_unix_ns is not None for row in connection.execute(select(outbox).order_by(outbox.c.id))]
    assert given_up == [True, True, False, False, False]
    assert bench.notifier.counters.letters_given_up == 2


def test_the_configuration_makes_routes(tmp_path: Path) -> None:
    (tmp_path / "url").write_text("http://127.0.0.1/secret")
    (tmp_path / "url").chmod(0o600)
    hook = ReceiverConfig("pager", "webhook", url_file=tmp_path / "url")
    config = AlertsConfig(
        receivers=(ReceiverConfig("log", "log"), hook),
        routes=(RouteConfig("pager", ('severity="critical"',), group_wait=5.0),),
        default_receivers=("log",),
        inhibit=(InhibitConfig(("alertname=A",), ("alertname=B",), ("node",)),),
    )
    routes = routing_of(config)
    (route,) = routes.routes
    assert (route.receiver, route.timing.wait_ns, route.group_by) == ("pager", 5_000_000_000, ("alertname", "cluster"))
    assert [one.receiver for one in routes.default] == ["log"]
    assert [one.name for one in receivers_of(config)] == ["log", "pager"]
    assert len(inhibitions_of(config)) == 1
    assert [one.receiver for one in routing_of(AlertsConfig(receivers=config.receivers)).default] == ["log", "pager"]


@pytest.mark.parametrize(
    ("config", "check"),
    [
        (AlertsConfig(routes=(RouteConfig("nobody"),)), routing_of),
        (AlertsConfig(default_receivers=("nobody",)), routing_of),
        (AlertsConfig(routes=(RouteConfig("log", ("severity",)),)), routing_of),
        (AlertsConfig(routes=(RouteConfig("log", ("a=~(",)),)), routing_of),
        (AlertsConfig(inhibit=(InhibitConfig((), ("a=b",)),)), inhibitions_of),
        (AlertsConfig(receivers=(ReceiverConfig("a", "log"), ReceiverConfig("a", "log"))), receivers_of),
        (AlertsConfig(receivers=(ReceiverConfig("a", "webhook", url="ftp://x"),)), receivers_of),
    ],
)
def test_a_configuration_that_cant_be_is_refused(config: AlertsConfig, check: Callable[[AlertsConfig], object]) -> None:
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert caught.value.code == "config.invalid"

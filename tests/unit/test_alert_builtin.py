"""The shipped rules through the real engine, facts from the real control store, heartbeats in the real series store."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select, update

from pgherd.alerts.load import load_rules
from pgherd.alerts.notification import from_document
from pgherd.collector.alerting.evaluation import Evaluator
from pgherd.collector.alerting.group import Health
from pgherd.collector.alerting.herd import HeartbeatSeries, herd_facts
from pgherd.collector.alerting.query import metric_names, promql_query
from pgherd.promql.parse import parse
from pgherd.proto.errors import PgherdError
from pgherd.proto.samples import STALE_NAN
from pgherd.runtime.clock import SystemClock
from pgherd.storage.control.schema import agents, nodes, outbox
from pgherd.storage.control.store import ControlStore
from pgherd.storage.series.store import SeriesStore
from support.alerts import TestClock
from support.memory_series import MemorySeries
from support.notifying import notifier
from support.series import HandClock, quiet

AGENT, INSTANCE = "0b8f6a7e-0000-4000-8000-000000000001", "db1:5432"
LABELS = {"job": "pgherd", "instance": INSTANCE, "cluster": "main", "node": "db1"}


@dataclass
class Live:
    heard_unix_ns: int
    facts: Mapping[str, Any]


class Herd:
    """Who is heard, by hand."""

    def __init__(self, clock: TestClock) -> None:
        self.clock = clock
        self.last_unix_ns: dict[str, int] = {}
        self.silent: set[str] = set()
        self.facts: dict[str, Any] = {}

    def heard(self, agent_id: str, /) -> Live | None:
        if agent_id in self.silent:
            return None
        return Live(self.last_unix_ns.setdefault(agent_id, self.clock.wall_unix_ns()), self.facts)


class World:
    """A collector's alerting over series written by hand, one slot of 15 s at a time."""

    def __init__(self, store: ControlStore) -> None:
        self.store, self.clock, self.samples = store, TestClock(), dict[tuple[tuple[str, str], ...], list[tuple[int, float]]]()
        self.herd = Herd(self.clock)
        with store.begin() as connection:
            connection.execute(
                insert(agents).values(
                    id=AGENT,
                    name="agent-1",
                    status="active",
                    labels={},
                    facts={},
                    joined_unix_ns=self.clock.wall_unix_ns(),
                    last_heartbeat_unix_ns=self.clock.wall_unix_ns(),
                )
            )
            connection.execute(
                insert(nodes).values(
                    id=AGENT, agent_id=AGENT, alias="db1", cluster="main", instance=INSTANCE, first_seen_unix_ns=0
                )
            )
        query = promql_query(self, SystemClock(), timeout_s=30)
        self.evaluator = Evaluator(
            groups=load_rules([], builtin=True, interval_s=15, check_expression=parse),
            store=store,
            query=query,
            facts=herd_facts(store, self.herd, query),
            clock=self.clock,
        )
        self.notifier = notifier(store, self.evaluator, self.clock)

    def select(self, matchers, start_ms, end_ms):  # type: ignore[no-untyped-def]
        source = MemorySeries()
        for labels, samples in self.samples.items():
            source.add(dict(labels), samples)
        return source.select(matchers, start_ms, end_ms)

    def turn(self, values: Mapping[str, float], labels: Mapping[str, str] = LABELS) -> list[str]:
        """One slot: the agent's samples of this slot, then an evaluation. Returns the alerts and their states."""
        self.clock.advance(15)
        now_ms = self.clock.wall_unix_ns() // 1_000_000
        for name, value in values.items():
            self.samples.setdefault(tuple(sorted({"__name__": name, **labels}.items())), []).append((now_ms, value))
        for evaluation in self.evaluator._evaluations:
            evaluation.evaluate(self.clock.wall_unix_ns(), self.clock.mono_s(), self.clock)
        self.notifier.turn()
        status = self.evaluator.status()
        assert {rule.health for group in status for rule in group.rules} == {Health.OK}
        return [
            f"{rule.rule.alert} {one.state}" for group in status for rule in group.alerting for one in rule.instances.values()
        ]

    def told(self) -> list[str]:
        with self.store.read() as connection:
            letters = connection.execute(select(outbox.c.payload).order_by(outbox.c.id)).scalars()
            messages = [from_document(letter) for letter in letters]
            return [f"{message.status} {message.common_labels['alertname']}" for message in messages]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ControlStore]:
    opened = ControlStore.open(tmp_path / "control.sqlite")
    yield opened
    opened.close()


@pytest.fixture
def world(store: ControlStore) -> World:
    return World(store)


UP = {"pg_up": 1.0, "pgherd_node_saturated": 0.0, "pg_exporter_last_scrape_error": 0.0}
CALM = {**UP, "pgherd_connections_used": 20.0, "pgherd_connections_usable": 97.0}
FULL = {**UP, "pgherd_connections_used": 95.0, "pgherd_connections_usable": 97.0}
GONE = {"pgherd_connections_used": STALE_NAN, "pgherd_connections_usable": STALE_NAN}


def test_connections_high_waits_a_minute_and_resolves(world: World) -> None:
    assert world.turn(CALM) == []
    states = [world.turn(FULL) for _ in range(5)]
    assert states == [["ConnectionsHigh pending"]] * 4 + [["ConnectionsHigh firing"]]
    assert world.turn(CALM) == ["ConnectionsHigh resolved"]
    assert world.told() == ["firing ConnectionsHigh", "resolved ConnectionsHigh"]
    with world.store.read() as connection:
        letter = connection.execute(select(outbox.c.payload)).scalars().first()
    assert letter is not None
    assert from_document(letter).common_annotations["summary"] == "db1: 97.94% of usable connections are taken"
    assert from_document(letter).common_labels == {**LABELS, "alertname": "ConnectionsHigh", "severity": "critical"}


def test_a_saturated_server_keeps_firing_though_nobody_can_count(world: World) -> None:
    for _ in range(5):
        world.turn(FULL)
    refused = {**UP, "pgherd_node_saturated": 1.0, "pg_exporter_last_scrape_error": 1.0, **GONE}
    assert world.turn(refused) == ["ConnectionsHigh firing"]
    assert world.told() == ["firing ConnectionsHigh"]


def test_a_probe_that_cant_tell_resolves_nothing(world: World) -> None:
    """The server hangs on the probe's query: its series end while pg_up stays 1."""
    for _ in range(5):
        world.turn(FULL)
    world.turn({"pgherd_probe_unknown": 1.0}, {**LABELS, "probe": "connections", "reason": "postgres.timeout.statement"})
    assert world.turn({**UP, **GONE}) == ["ConnectionsHigh unknown"]
    assert world.turn(CALM) == ["ConnectionsHigh resolved"], "its own inputs are back"


def test_a_stopped_server_resolves_nothing_but_is_down(world: World) -> None:
    for _ in range(5):
        world.turn(FULL)
    down = {"pg_up": 0.0, "pg_exporter_last_scrape_error": 1.0}
    assert sorted(world.turn({**down, **GONE})) == ["ConnectionsHigh unknown", "InstanceDown pending"]
    assert sorted(world.turn(down)) == ["ConnectionsHigh unknown", "InstanceDown firing"]
    assert sorted(world.turn(CALM)) == ["ConnectionsHigh resolved", "InstanceDown resolved"]
    assert sorted(world.told()[2:]) == ["resolved ConnectionsHigh", "resolved InstanceDown"]


def test_a_silent_agent_resolves_nothing_and_is_named(world: World) -> None:
    for _ in range(5):
        world.turn(FULL)
    world.herd.silent.add(AGENT)
    agent = {"job": "pgherd", "agent": "agent-1", "agent_id": AGENT}
    for age_s in range(15, 315, 15):
        world.turn({"pgherd_agent_heartbeat_age_seconds": float(age_s), "pgherd_agent_up": 0.0}, agent)
    # For five minutes Prometheus' lookback still sees the last samples; then the expression ends.
    assert sorted(world.turn({"pgherd_agent_heartbeat_age_seconds": 315.0}, agent)) == [
        "AgentSilent firing",
        "ConnectionsHigh unknown",
    ]
    assert world.told() == ["firing ConnectionsHigh", "firing AgentSilent"]
    world.herd.silent.clear()
    assert world.turn({"pgherd_agent_heartbeat_age_seconds": 1.0, "pgherd_agent_up": 1.0}, agent) == [
        "AgentSilent resolved",
        "ConnectionsHigh unknown",
    ], "the agent is back, PostgreSQL isn't seen yet"
    assert "ConnectionsHigh resolved" in world.turn(CALM)


def test_an_agent_taken_out_ends_its_alerts(world: World) -> None:
    for _ in range(5):
        world.turn(FULL)
    world.herd.silent.add(AGENT)
    world.turn({"pg_up": STALE_NAN, **GONE})
    with world.store.begin() as connection:
        connection.execute(update(agents).values(status="revoked"))
    assert world.turn({}) == ["ConnectionsHigh resolved"]


def _count_primaries(world: World, count: float, old_is_up: bool) -> list[str]:
    """A slot of a cluster of two on two hosts: the old primary, and the new one that is heard."""
    new = "0b8f6a7e-0000-4000-8000-000000000002"
    with world.store.begin() as connection:
        if not connection.execute(select(nodes).where(nodes.c.id == new)).all():
            connection.execute(
                insert(agents).values(id=new, name="agent-2", status="active", labels={}, facts={}, joined_unix_ns=0)
            )
            connection.execute(
                insert(nodes).values(
                    id=new, agent_id=new, alias="db2", cluster="main", instance="db2:5432", first_seen_unix_ns=0
                )
            )
    now_ms = world.clock.wall_unix_ns() // 1_000_000 + 15_000
    more = [
        ({"__name__": "pgherd_cluster_primaries", "job": "pgherd", "cluster": "main"}, count),
        ({"__name__": "pg_up", "job": "pgherd", "instance": "db2:5432", "cluster": "main", "node": "db2"}, 1.0),
    ]
    for labels, value in more:
        world.samples.setdefault(tuple(sorted(labels.items())), []).append((now_ms, value))
    return [alert for alert in world.turn({"pg_up": float(old_is_up)}) if "Primar" in alert]


@pytest.mark.parametrize("agent_is_gone", [False, True], ids=["server dead", "host dead"])
def test_no_primary_ends_with_a_promotion_though_the_old_primary_stays_dead(world: World, agent_is_gone: bool) -> None:
    """What must be heard is that somebody leads, not everybody: the page stayed "unknown" for ever."""
    assert _count_primaries(world, 1, old_is_up=True) == []
    if agent_is_gone:
        world.herd.silent.add(AGENT)
    assert [_count_primaries(world, 0, old_is_up=False) for _ in range(2)] == [["NoPrimary pending"], ["NoPrimary firing"]]
    assert _count_primaries(world, 1, old_is_up=False) == ["NoPrimary resolved"]
    assert [one for one in world.told() if "Primary" in one] == ["firing NoPrimary", "resolved NoPrimary"]


def test_two_primaries_arent_one_because_one_of_them_fell_silent(world: World) -> None:
    states = [_count_primaries(world, 2, old_is_up=True) for _ in range(2)]
    assert states == [["MultiplePrimaries pending"], ["MultiplePrimaries firing"]]
    assert _count_primaries(world, 1, old_is_up=False) == ["MultiplePrimaries unknown"]
    assert _count_primaries(world, 1, old_is_up=True) == ["MultiplePrimaries resolved"]


def test_heartbeats_become_series(tmp_path: Path, world: World) -> None:
    clock = HandClock()
    world.clock.wall_s = clock.unix_ms / 1000
    with world.store.begin() as connection:
        connection.execute(update(agents).values(last_heartbeat_unix_ns=world.clock.wall_unix_ns() - 40 * 10**9))
    world.herd.silent.add(AGENT)
    series = SeriesStore.open(tmp_path / "series.duckdb", quiet(), clock)
    try:
        writer = HeartbeatSeries(world.store, world.herd, series, clock)
        assert asyncio.run(writer.write()) == 1
        query = promql_query(series, SystemClock(), timeout_s=30)
        ((labels, age_s),) = query("pgherd_agent_heartbeat_age_seconds > 30", clock.unix_ms)
        assert (labels["agent"], labels["agent_id"], round(age_s)) == ("agent-1", AGENT, 40)
        assert [value for _labels, value in query("pgherd_agent_up", clock.unix_ms)] == [0.0]
        with world.store.begin() as connection:
            connection.execute(update(agents).values(status="revoked"))
        clock.unix_ms += 10_000
        assert asyncio.run(writer.write()) == 0
        assert query("pgherd_agent_heartbeat_age_seconds", clock.unix_ms) == [], "a staleness marker ends it"
    finally:
        series.close()


def test_a_rule_reads_these_metrics() -> None:
    assert metric_names("a / b > 1 or rate(c[5m]) == 1") == {"a", "b", "c"}
    assert metric_names('{__name__=~"a|b"} / c') == frozenset()


def test_scalars_count_as_a_vector_and_ranges_are_refused() -> None:
    query = promql_query(MemorySeries(), SystemClock(), timeout_s=30)
    assert query("1 + 1", 0) == [({}, 2.0)]
    with pytest.raises(PgherdError) as caught:
        query("pg_up[5m]", 0)
    assert caught.value.code == "promql.execution"
    with pytest.raises(PgherdError) as caught:
        promql_query(MemorySeries(), SystemClock(), timeout_s=-1)("pg_up", 0)
    assert caught.value.code == "query.timeout"


def test_skew_and_spool_age_are_known_while_the_agent_is_heard(tmp_path: Path, world: World) -> None:
    clock = HandClock()
    series = SeriesStore.open(tmp_path / "series.duckdb", quiet(), clock)
    query = promql_query(series, clock, timeout_s=30)
    heartbeats = HeartbeatSeries(world.store, world.herd, series, clock)

    def turn() -> tuple[list[float], list[float]]:
        clock.unix_ms += 10_000
        assert asyncio.run(heartbeats.write()) == 1
        names = ("pgherd_agent_clock_skew_seconds", "pgherd_agent_spool_age_seconds")
        skews, ages = ([value for _, value in query(name, clock.unix_ms)] for name in names)
        return skews, ages

    assert turn() == ([], []), "no heartbeat yet"
    world.herd.facts = {"spool_oldest_unix_ns": None}
    assert turn() == ([], [0.0])
    # The agent's clock is 4 s behind: what it stamped 30 s ago by its own clock is 26 s old.
    its_now_ns = (clock.unix_ms + 10_000 - 4_000) * 1_000_000
    world.herd.facts = {"skew_ns": 4 * 10**9, "spool_oldest_unix_ns": its_now_ns - 26 * 10**9}
    assert turn() == ([4.0], [26.0])
    world.herd.silent.add(AGENT)
    assert turn() == ([], []), "not heard: not 0, and not the last value either"
    series.close()


def test_what_a_former_process_wrote_of_who_is_gone_is_ended(tmp_path: Path, world: World) -> None:
    """Revoked, or fallen silent, while the collector was away: its last values stood for five minutes."""
    clock = HandClock()
    series = SeriesStore.open(tmp_path / "series.duckdb", quiet(), clock)
    query = promql_query(series, clock, timeout_s=30)

    def restart() -> set[str]:
        clock.unix_ms += 10_000
        asyncio.run(HeartbeatSeries(world.store, world.herd, series, clock).write())
        return {labels["__name__"].removeprefix("pgherd_agent_") for labels, _ in query('{agent="agent-1"}', clock.unix_ms)}

    world.herd.facts = {"skew_ns": 0, "spool_oldest_unix_ns": None}
    pulse = {"heartbeat_age_seconds", "up"}
    assert restart() == {*pulse, "clock_skew_seconds", "spool_age_seconds"}
    world.herd.silent.add(AGENT)
    assert restart() == pulse
    with world.store.begin() as connection:
        connection.execute(update(agents).values(status="revoked"))
    assert restart() == set()
    series.close()

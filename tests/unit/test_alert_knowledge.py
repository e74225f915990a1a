"""Whether an alert may be said to be over: one fact changed at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from pgherd.alerts.knowledge import EVERYTHING, Knowledge, Watched, has_risen

A = Watched("a:5432", "a", "main", "host-a", "id-a")
B = Watched("b:5432", "b", "main", "host-b", "id-b")
WELL = Knowledge((A, B), frozenset({"id-a", "id-b"}), frozenset({"a:5432", "b:5432"}))
OF_A: Mapping[str, str] = {"alertname": "X", "instance": "a:5432"}


def _inputs_missing(_instance: str) -> bool:
    return False


@pytest.mark.parametrize(
    "facts",
    [
        replace(WELL, agents_alive=frozenset({"id-b"})),  # its last pg_up may be seconds old: news ended all the same
        replace(WELL, instances_up=frozenset({"b:5432"})),
        replace(WELL, instances_troubled={"a:5432": frozenset({EVERYTHING})}),
    ],
    ids=["agent silent", "not seen up", "a probe can't tell"],
)
def test_one_doubt_is_enough_for_those_it_concerns(facts: Knowledge) -> None:
    assert WELL.known(OF_A, _inputs_missing)
    assert not facts.known(OF_A, _inputs_missing)
    assert not facts.known({"cluster": "main"}, _inputs_missing)
    assert not facts.known({"node": "a", "datname": "x"}, _inputs_missing)
    assert facts.known({"instance": "b:5432"}, _inputs_missing)


def test_a_troubled_instance_is_known_as_far_as_the_rules_inputs_are() -> None:
    troubled = replace(WELL, instances_troubled={"a:5432": frozenset({EVERYTHING})})
    assert troubled.known(OF_A, lambda instance: instance == "a:5432")


def test_an_alert_about_an_agent_needs_the_agent_only() -> None:
    down = replace(WELL, instances_up=frozenset())
    silent = replace(WELL, agents_alive=frozenset())
    for labels in ({"agent": "host-a"}, {"agent": "host-a", "agent_id": "id-a"}):
        assert down.known(labels, _inputs_missing)
        assert not silent.known(labels, _inputs_missing)


@pytest.mark.parametrize("labels", [{}, {"datname": "x"}, {"instance": "elsewhere:9100"}, {"instance": ""}])
def test_what_pgherd_doesnt_watch_is_prometheus_exact(labels: Mapping[str, str]) -> None:
    nothing_heard = replace(WELL, agents_alive=frozenset(), instances_up=frozenset())
    assert nothing_heard.known(labels, _inputs_missing)


def test_only_the_probes_that_a_rule_lives_on_make_it_doubtful() -> None:
    """A server without traffic has no percentiles, and its dropped slot is gone all the same."""
    troubled = replace(WELL, instances_troubled={"a:5432": frozenset({"latency", "disk_pg_wal"})})
    assert troubled.known(OF_A, lambda _instance: False, frozenset({"replication_slots"}))
    assert not troubled.known(OF_A, lambda _instance: False, frozenset({"replication_slots", "disk"}))
    assert not troubled.known(OF_A, lambda _instance: False, frozenset({"latency"}))
    assert not troubled.known(OF_A, lambda _instance: False, None), "nobody knows what feeds a stranger's rule"
    assert troubled.known(OF_A, lambda _instance: False, frozenset()), "what the collector makes has no probe"


def test_a_risen_count_of_the_cluster_is_news_by_itself() -> None:
    count = {"__name__": "pgherd_cluster_primaries", "job": "pgherd", "cluster": "main"}
    alert = {"alertname": "NoPrimary", "job": "pgherd", "cluster": "main", "severity": "critical"}
    assert has_risen(alert, 0, [(count, 1.0)])
    assert not has_risen(alert, 2, [(count, 1.0)]), "who isn't heard isn't counted"
    assert not has_risen(alert, 0, []), "no value now"
    assert not has_risen(alert, 0, [({**count, "cluster": "other"}, 1.0)])
    assert not has_risen({**alert, "node": "a"}, 0, [(count, 1.0)]), "about a node"
    assert not has_risen(alert, 0, [({**count, "system_identifier": "1"}, 1.0)]), "another cluster under the same label"

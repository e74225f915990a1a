"""The alert state machine, one row of its table at a time."""

from __future__ import annotations

import pytest

from pgherd.alerts.model import Instance, State, TransitionKind, fingerprint_of
from pgherd.alerts.state import Instances, Step, step
from pgherd.proto.errors import PreconditionError
from support.alerts import START_UNIX_NS, everything_known, moment, nothing_known, row, rule


def _only(outcome: Step) -> Instance:
    (instance,) = outcome.instances.values()
    return instance


def _kinds(outcome: Step) -> list[TransitionKind]:
    return [transition.kind for transition in outcome.transitions]


def _firing() -> Instances:
    return step(rule(), {}, [row()], moment(0), everything_known).instances


def test_without_for_fires_at_once() -> None:
    outcome = step(rule(), {}, [row()], moment(0), everything_known)
    assert _only(outcome).state is State.FIRING
    assert _kinds(outcome) == [TransitionKind.FIRING]


def test_waits_for_the_whole_of_for() -> None:
    tested = rule(for_s=30)
    outcome = step(tested, {}, [row()], moment(0), everything_known)
    assert (_only(outcome).state, outcome.transitions) == (State.PENDING, ())
    outcome = step(tested, outcome.instances, [row()], moment(15, elapsed_s=15), everything_known)
    assert (_only(outcome).state, outcome.transitions) == (State.PENDING, ())
    outcome = step(tested, outcome.instances, [row()], moment(30, elapsed_s=15), everything_known)
    assert _only(outcome).state is State.FIRING
    assert _kinds(outcome) == [TransitionKind.FIRING]
    assert _only(outcome).active_unix_ns == START_UNIX_NS


def test_a_pending_alert_that_vanishes_was_nothing() -> None:
    tested = rule(for_s=30)
    outcome = step(tested, {}, [row()], moment(0), everything_known)
    outcome = step(tested, outcome.instances, [], moment(15), nothing_known)
    assert (outcome.instances, outcome.transitions) == ({}, ())


def test_resolves_once_and_is_shown_for_a_while() -> None:
    outcome = step(rule(), _firing(), [], moment(15), everything_known)
    assert _only(outcome).state is State.RESOLVED
    (transition,) = outcome.transitions
    assert (transition.kind, transition.reason) == (TransitionKind.RESOLVED, "recovered")
    assert (transition.starts_unix_ns, transition.ends_unix_ns) == (START_UNIX_NS, moment(15).unix_ns)
    outcome = step(rule(), outcome.instances, [], moment(30), everything_known)
    assert (_only(outcome).state, outcome.transitions) == (State.RESOLVED, ())
    outcome = step(rule(), outcome.instances, [], moment(15 + 901), everything_known)
    assert (outcome.instances, outcome.transitions) == ({}, ())


def test_a_resolved_alert_that_returns_begins_anew() -> None:
    outcome = step(rule(), _firing(), [], moment(15), everything_known)
    outcome = step(rule(), outcome.instances, [row()], moment(30), everything_known)
    assert _only(outcome).state is State.FIRING
    (transition,) = outcome.transitions
    assert transition.starts_unix_ns == moment(30).unix_ns


def test_isnt_over_while_its_source_is_silent() -> None:
    """A vanished series resolves a Prometheus alert; here nobody is told that a silent server is well."""
    outcome = step(rule(), _firing(), [], moment(15), nothing_known)
    assert (_only(outcome).state, outcome.transitions) == (State.UNKNOWN, ())
    outcome = step(rule(), outcome.instances, [], moment(86_400), nothing_known)
    assert (_only(outcome).state, outcome.transitions) == (State.UNKNOWN, ())
    outcome = step(rule(), outcome.instances, [], moment(86_415), everything_known)
    assert (_only(outcome).state, _kinds(outcome)) == (State.RESOLVED, [TransitionKind.RESOLVED])


def test_an_unknown_alert_that_returns_is_the_same_episode() -> None:
    tested = rule(for_s=30)
    outcome = step(tested, {}, [row()], moment(0), everything_known)
    outcome = step(tested, outcome.instances, [row()], moment(30), everything_known)
    episode = _only(outcome).episode_unix_ns
    outcome = step(tested, outcome.instances, [], moment(45), nothing_known)
    outcome = step(tested, outcome.instances, [row()], moment(60), everything_known)
    assert (_only(outcome).state, _only(outcome).held_ns) == (State.PENDING, 0), "evaluation stays Prometheus-exact"
    outcome = step(tested, outcome.instances, [row()], moment(90), everything_known)
    assert (_only(outcome).state, outcome.transitions) == (State.FIRING, ()), "receivers still hold the first"
    assert _only(outcome).episode_unix_ns == episode


def test_an_announced_pending_alert_that_vanishes_still_resolves() -> None:
    tested = rule(for_s=30)
    instances = step(rule(), {}, [row()], moment(0), everything_known).instances
    outcome = step(tested, instances, [], moment(15), nothing_known)
    outcome = step(tested, outcome.instances, [row()], moment(30), everything_known)
    outcome = step(tested, outcome.instances, [], moment(45), everything_known)
    assert _kinds(outcome) == [TransitionKind.RESOLVED]


def test_keeps_firing_for_a_while() -> None:
    tested = rule(keep_firing_for_s=30)
    outcome = step(tested, {}, [row()], moment(0), everything_known)
    for at_s in (15, 30):  # 15: absent for 0 s; 30: for 15 s
        outcome = step(tested, outcome.instances, [], moment(at_s, elapsed_s=15), everything_known)
        assert (_only(outcome).state, outcome.transitions) == (State.FIRING, ())
    returned = step(tested, outcome.instances, [row()], moment(45, elapsed_s=15), everything_known)
    assert _only(returned).absent_ns is None
    outcome = step(tested, outcome.instances, [], moment(45, elapsed_s=15), everything_known)
    assert _kinds(outcome) == [TransitionKind.RESOLVED]


@pytest.mark.parametrize("clock_step_s", [-3600.0, -14.0, 0.0, 14.0, 3600.0])
def test_a_step_of_the_wall_clock_moves_no_alert(clock_step_s: float) -> None:
    """Neither early nor late: `for` counts what the monotonic clock says was observed."""
    tested = rule(for_s=60)
    outcome = step(tested, {}, [row()], moment(0), everything_known)
    fired_after_s = None
    for slot in range(1, 8):
        at_s = slot * 15 + (clock_step_s if slot >= 2 else 0)
        outcome = step(tested, outcome.instances, [row()], moment(at_s, elapsed_s=15), everything_known)
        if outcome.transitions and fired_after_s is None:
            fired_after_s = slot * 15
    assert fired_after_s == 60


@pytest.mark.parametrize(("away_s", "expected"), [(-3600, 0), (0, 0), (10, 10), (60, 60), (86_400, 60)])
def test_over_a_restart_the_wall_clock_stands_in_within_bounds(away_s: float, expected: float) -> None:
    tested = rule(for_s=3600)
    outcome = step(tested, {}, [row()], moment(0), everything_known)
    outcome = step(tested, outcome.instances, [row()], moment(away_s), everything_known)
    assert _only(outcome).held_ns == expected * 1e9


def test_labels_are_made_from_templates_and_lose_the_name() -> None:
    tested = rule(
        labels={"severity": "page", "on": "{{ $labels.instance | stripPort }}", "gone": ""},
        annotations={"summary": "{{ $value | humanize }} at {{ $labels.on }}"},
    )
    outcome = step(tested, {}, [row(1500, __name__="x", instance="a:5432", gone="1")], moment(0), everything_known)
    assert _only(outcome).labels == {"alertname": "High", "instance": "a:5432", "severity": "page", "on": "a"}
    assert _only(outcome).annotations == {"summary": "1.5k at "}, "annotations see the row's labels, not the rule's"


def test_equal_labels_after_templating_are_refused() -> None:
    tested = rule(labels={"instance": "all"})
    with pytest.raises(PreconditionError) as caught:
        step(tested, {}, [row(instance="a"), row(instance="b")], moment(0), everything_known)
    assert caught.value.code == "alerts.duplicate"


def test_more_than_the_limit_is_refused_and_nothing_moves() -> None:
    rows = [row(instance=name) for name in "abc"]
    assert len(step(rule(), {}, rows, moment(0), everything_known, limit=3).transitions) == 3
    with pytest.raises(PreconditionError) as caught:
        step(rule(), {}, rows, moment(0), everything_known, limit=2)
    assert caught.value.code == "alerts.limit"


def test_what_resolved_or_went_unknown_doesnt_count_against_the_limit() -> None:
    two = step(rule(), {}, [row(instance="a"), row(instance="b")], moment(0), everything_known, limit=2).instances
    swapped = step(rule(), two, [row(instance="c"), row(instance="d")], moment(15), everything_known, limit=2)
    assert len(swapped.instances) == 4


def test_fingerprint_is_alertmanagers() -> None:
    """Values of prometheus/common's own tests of label signatures."""
    assert int(fingerprint_of({}), 16) == 14695981039346656037
    assert int(fingerprint_of({"name": "garland, briggs", "fear": "love is not enough"}), 16) == 5799056148416392346
    assert fingerprint_of({"a": "bc"}) != fingerprint_of({"ab": "c"})

"""The alert state machine under arbitrary histories: its never-broken properties."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from pgherd.alerts.model import Instance, State, TransitionKind
from pgherd.alerts.state import Moment, step
from support.alerts import SECOND_NS, START_UNIX_NS, row, rule

_INSTANCES = ("a", "b")
_GAP_MAX_S = 60


@dataclass(frozen=True)
class Turn:
    """One evaluation: true time since the last, how far the wall clock was set, what holds, what is known."""

    elapsed_s: int
    clock_step_s: int
    restarted: bool
    holds: frozenset[str]
    known: frozenset[str]

    def knows(self, labels: Mapping[str, str]) -> bool:
        return labels["instance"] in self.known


_some = st.frozensets(st.sampled_from(_INSTANCES))
_turns = st.lists(
    st.builds(
        Turn,
        elapsed_s=st.integers(1, 120),
        clock_step_s=st.sampled_from([0, 0, 0, -7200, -20, 20, 7200]),
        restarted=st.booleans(),
        holds=_some,
        known=_some,
    ),
    max_size=40,
)
_spans_s = st.sampled_from([0, 15, 60, 300])


@given(turns=_turns, for_s=_spans_s, keep_s=_spans_s)
def test_every_history_keeps_the_promises(turns: list[Turn], for_s: int, keep_s: int) -> None:
    tested = rule(for_s=for_s, keep_firing_for_s=keep_s)
    instances: Mapping[str, Instance] = {}
    wall_s = 0
    observed_s = dict.fromkeys(_INSTANCES, -1)  # true time for which it held without a break; -1: it doesn't
    told: dict[str, TransitionKind] = {}
    for turn in turns:
        wall_s += turn.elapsed_s + turn.clock_step_s
        at = Moment(
            unix_ns=START_UNIX_NS + wall_s * SECOND_NS,
            gap_max_ns=_GAP_MAX_S * SECOND_NS,
            elapsed_ns=None if turn.restarted else turn.elapsed_s * SECOND_NS,
        )
        result = [row(instance=name) for name in sorted(turn.holds)]
        outcome = step(tested, instances, result, at, turn.knows)

        for name in _INSTANCES:
            # After a restart only the wall clock tells: it may be wrong by up to gap_max, never more.
            counted_s = min(turn.elapsed_s, _GAP_MAX_S) if not turn.restarted else _GAP_MAX_S
            observed_s[name] = (observed_s[name] + counted_s if observed_s[name] >= 0 else 0) if name in turn.holds else -1
        for transition in outcome.transitions:
            name = transition.labels["instance"]
            assert told.get(name) is not transition.kind, "told twice"
            if transition.kind is TransitionKind.FIRING:
                assert observed_s[name] >= for_s, "fired before `for`"
            else:
                assert told[name] is TransitionKind.FIRING
                assert name in turn.known, "resolved while unknown"
                assert name not in turn.holds
            told[name] = transition.kind
        by_name = {instance.labels["instance"]: instance for instance in outcome.instances.values()}
        for name, kind in told.items():
            open_episode = name in by_name and by_name[name].state is not State.RESOLVED and by_name[name].episode_unix_ns
            assert bool(open_episode) == (kind is TransitionKind.FIRING), "an announced alert is never forgotten"

        again = step(
            tested,
            outcome.instances,
            result,
            Moment(at.unix_ns, at.gap_max_ns, 0),
            turn.knows,
        )
        assert again.instances == outcome.instances, "evaluating again at the same moment changes nothing"
        assert again.transitions == ()
        instances = outcome.instances


@given(turns=_turns, for_s=_spans_s)
def test_with_a_steady_clock_it_is_prometheus(turns: list[Turn], for_s: int) -> None:
    """Everything known, regular evaluation: pending and firing exactly as `now − active_at ≥ for` says."""
    tested = rule(for_s=for_s)
    instances: Mapping[str, Instance] = {}
    active_at_s: dict[str, int] = {}
    for slot, turn in enumerate(turns):
        at = Moment(START_UNIX_NS + slot * 15 * SECOND_NS, _GAP_MAX_S * SECOND_NS, 15 * SECOND_NS)
        instances = step(tested, instances, [row(instance=name) for name in turn.holds], at, lambda _labels: True).instances
        active_at_s = {name: active_at_s.get(name, slot * 15) for name in turn.holds}
        expected = {
            name: State.FIRING if slot * 15 - since_s >= for_s else State.PENDING for name, since_s in active_at_s.items()
        }
        shown = {one.labels["instance"]: one.state for one in instances.values() if one.state is not State.RESOLVED}
        assert shown == expected

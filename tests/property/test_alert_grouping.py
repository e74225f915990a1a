"""What a group tells, over random histories: never twice, never out of order, never too often, never not at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from pgherd.alerts.grouping import Alerts, GroupState, decide
from pgherd.alerts.notification import Note
from support.alerts import SECOND_NS, START_UNIX_NS
from support.notifying import timing

NAMES = ("a", "b", "c")
WAIT_S, INTERVAL_S, REPEAT_S = 5, 20, 200
TIMING = timing(wait_s=WAIT_S, interval_s=INTERVAL_S, repeat_s=REPEAT_S)


@dataclass(frozen=True)
class Turn:
    """After `after_s`: who is open, who is muted how."""

    after_s: int
    holds: frozenset[str]
    silenced: frozenset[str]
    inhibited: frozenset[str]


TURNS = st.lists(
    st.builds(
        Turn,
        st.integers(0, 40),
        st.frozensets(st.sampled_from(NAMES)),
        st.frozensets(st.sampled_from(NAMES), max_size=1),
        st.frozensets(st.sampled_from(NAMES), max_size=1),
    ),
    max_size=40,
)


class Receiver:
    """What somebody who reads the notifications knows."""

    def __init__(self) -> None:
        self.firing: dict[str, int] = {}  # name → start of the episode
        self.resolved: set[tuple[str, int]] = set()

    def hear(self, notes: tuple[Note, ...]) -> None:
        assert len({note.key for note in notes}) == len(notes), "one alert twice in one message"
        for note in notes:
            name, start = note.labels["node"], note.starts_unix_ns
            if note.ends_unix_ns is None:
                assert (name, start) not in self.resolved, "firing after it was told as over"
                self.firing[name] = start
            else:
                assert self.firing.get(name) == start, "over without having been told"
                assert (name, start) not in self.resolved
                self.resolved.add((name, start))
                del self.firing[name]


def _note(name: str, start_unix_ns: int) -> Note:
    return Note("r#0123456789abcdef", {"alertname": "High", "node": name}, {}, 1.0, start_unix_ns)


@settings(max_examples=300, deadline=None)
@given(TURNS)
def test_receivers_know_what_is_and_hear_nothing_twice(turns: list[Turn]) -> None:
    now_ns, state, receiver = START_UNIX_NS, GroupState(), Receiver()
    episodes: dict[str, int] = {}
    last_told_ns: int | None = None
    before: Mapping[str, int] = {}
    for turn in [*turns, *_calm(turns)]:
        now_ns += turn.after_s * SECOND_NS
        episodes = {name: episodes.get(name, now_ns) for name in turn.holds}
        alerts = Alerts(
            {_note(name, start).key: _note(name, start) for name, start in episodes.items()},
            frozenset(_note(name, 0).key for name in turn.silenced),
            frozenset(_note(name, 0).key for name in turn.inhibited),
        )
        decision = decide(state, alerts, TIMING, now_ns)
        if decision.notes:
            told = {note.labels["node"] for note in decision.notes if note.ends_unix_ns is None}
            assert not told & (turn.silenced | turn.inhibited)
            if last_told_ns is not None and state.notified_unix_ns is not None:
                assert now_ns - last_told_ns >= INTERVAL_S * SECOND_NS
            unchanged = {name: episodes[name] for name in told} == dict(before) and len(told) == len(decision.notes)
            if unchanged and last_told_ns is not None and not any(one.silenced for one in state.told.values()):
                assert now_ns - last_told_ns >= REPEAT_S * SECOND_NS, "the same again before its time"
            last_told_ns = now_ns
        receiver.hear(decision.notes)
        before = dict(receiver.firing)
        again = decide(decision.state or GroupState(), alerts, TIMING, now_ns)
        assert again.notes == (), "deciding again tells nothing"
        state = decision.state or GroupState()
    assert receiver.firing == episodes, "in the end everybody knows what is"


def _calm(turns: list[Turn]) -> list[Turn]:
    """Nothing muted for long enough, twice: once to tell, once to have told."""
    holds = turns[-1].holds if turns else frozenset[str]()
    return [Turn(WAIT_S + INTERVAL_S, holds, frozenset(), frozenset()) for _ in range(2)]


def test_a_snoozed_alert_is_told_again_when_the_silence_ends() -> None:
    note = _note("a", START_UNIX_NS)
    told = decide(GroupState(), Alerts({note.key: note}), timing(), START_UNIX_NS)
    assert told.state is not None
    mute = decide(told.state, Alerts({note.key: note}, frozenset((note.key,))), timing(), START_UNIX_NS + SECOND_NS)
    assert mute.state is not None
    assert mute.notes == ()
    after = decide(mute.state, Alerts({note.key: note}), timing(), START_UNIX_NS + 2 * SECOND_NS)
    assert after.notes == (note,)


def test_what_was_told_and_ends_while_silenced_is_told_as_over() -> None:
    note = _note("a", START_UNIX_NS)
    told = decide(GroupState(), Alerts({note.key: note}), timing(), START_UNIX_NS)
    assert told.state is not None
    over = decide(told.state, Alerts({}, frozenset((note.key,))), timing(), START_UNIX_NS + SECOND_NS)
    assert [one.status for one in over.notes] == ["resolved"]


def test_an_end_that_is_remembered_keeps_its_time_and_reason() -> None:
    note = _note("a", START_UNIX_NS)
    told = decide(GroupState(), Alerts({note.key: note}), timing(), START_UNIX_NS)
    assert told.state is not None
    ended = replace(note, ends_unix_ns=START_UNIX_NS + SECOND_NS, reason="rule removed")
    over = decide(told.state, Alerts({}, ended={note.key: ended}), timing(), START_UNIX_NS + 9 * SECOND_NS)
    assert over.notes == (ended,)


def test_a_stamp_from_a_clock_that_was_wrong_holds_nothing_back() -> None:
    note, other = _note("a", START_UNIX_NS), _note("b", START_UNIX_NS)
    future = decide(GroupState(), Alerts({note.key: note}), TIMING, START_UNIX_NS + 10**6 * SECOND_NS)
    assert future.state is not None
    assert future.notes
    now = decide(future.state, Alerts({note.key: note, other.key: other}), TIMING, START_UNIX_NS + 60 * SECOND_NS)
    assert len(now.notes) == 2

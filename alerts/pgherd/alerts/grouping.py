"""What a group tells its receiver, and when: group state, alerts, moment → next state and perhaps a notification. Pure.

Never broken (tests/property/test_alert_grouping.py):
 1. An alert's episode is told as firing before it is told as resolved, and resolved at most once; one that is followed by the
    next before the group may speak is told by that.
 2. Every episode that is open and audible is told within `wait` or `interval`; what was told and is over, too.
 3. Between two notifications of a group lies at least its `interval`, and unless something changed its `repeat`.
 4. A muted alert isn't told; if it was told before it was silenced and goes on when the silence ends, it is told again.
 5. Deciding again at the same moment tells nothing new.

"Open" is an episode that receivers would be told of: firing, and unknown too, for nobody knows that it is over. What was told and ends
is told as over even while it is silenced: a silence must not leave an incident open for ever on the other side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pgherd.alerts.notification import Note
from pgherd.alerts.routing import Timing

_TICK_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Told:
    """An alert as the receiver knows it; `silenced` since it was told."""

    note: Note
    silenced: bool = False


@dataclass(frozen=True, slots=True)
class GroupState:
    """What a group's receiver knows: alert key → what it was told. `notified_unix_ns` is the last time, and
    with the group's digest identifies that notification."""

    told: Mapping[str, Told] = field(default_factory=dict)
    notified_unix_ns: int | None = None


@dataclass(frozen=True, slots=True)
class Alerts:
    """The alerts of a group now: open ones by key; of those, the keys that silences and inhibition mute.

    `ended` knows when and why alerts ended, as far as anybody remembers.
    """

    open: Mapping[str, Note]
    silenced: frozenset[str] = frozenset()
    inhibited: frozenset[str] = frozenset()
    ended: Mapping[str, Note] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Decision:
    """The next state (None: forget the group), what to tell now, and when to look again (None: when something changes)."""

    state: GroupState | None
    notes: tuple[Note, ...] = ()
    due_unix_ns: int | None = None


def decide(state: GroupState, alerts: Alerts, timing: Timing, now_unix_ns: int) -> Decision:
    """One look at one group."""
    told = {
        key: replace(one, silenced=True) if key in alerts.silenced and _goes_on(one, alerts.open.get(key)) else one
        for key, one in state.told.items()
    }
    audible = {key: note for key, note in alerts.open.items() if key not in alerts.silenced and key not in alerts.inhibited}
    news = [key for key, note in audible.items() if key not in told or told[key].silenced or not _goes_on(told[key], note)]
    # One that fired again is told as firing, with its new beginning: a receiver that knows alerts by their labels would take
    # the end of the former episode for the end of this one.
    over = {key: one for key, one in told.items() if key not in audible and not _goes_on(one, alerts.open.get(key))}
    state = GroupState(told, state.notified_unix_ns)
    if not news and not over:
        return _nothing_new(state, audible, timing, now_unix_ns)
    due = _due(state, [audible[key] for key in news], timing, now_unix_ns)
    if now_unix_ns < due:
        return Decision(state, (), due)
    return _tell(state, audible, over, alerts, timing, now_unix_ns)


def _goes_on(told: Told, note: Note | None) -> bool:
    """Whether it is the same episode."""
    return note is not None and note.starts_unix_ns == told.note.starts_unix_ns


def _due(state: GroupState, news: list[Note], timing: Timing, now_unix_ns: int) -> int:
    if state.notified_unix_ns is not None:
        # A stamp in the future comes from a clock that was wrong; waiting for it could take years.
        return state.notified_unix_ns + timing.interval_ns if state.notified_unix_ns <= now_unix_ns else now_unix_ns
    # The same for a beginning in the future: the wait would begin anew with every look.
    starts = (note.starts_unix_ns for note in news)
    return min((start + timing.wait_ns if start <= now_unix_ns else now_unix_ns for start in starts), default=now_unix_ns)


def _nothing_new(state: GroupState, audible: Mapping[str, Note], timing: Timing, now_unix_ns: int) -> Decision:
    notified = state.notified_unix_ns
    if notified is None:
        return Decision(state if state.told else None)
    if notified > now_unix_ns:
        state, notified = replace(state, notified_unix_ns=now_unix_ns), now_unix_ns
    if not state.told:  # remembered for as long as it holds back the next one
        forgotten = notified + timing.interval_ns
        return Decision(None) if now_unix_ns >= forgotten else Decision(state, (), forgotten)
    if not audible:
        return Decision(state)
    repeat = notified + timing.repeat_ns
    if now_unix_ns < repeat:
        return Decision(state, (), repeat)
    return _tell(state, audible, {}, Alerts(audible), timing, now_unix_ns)


def _tell(
    state: GroupState, audible: Mapping[str, Note], over: Mapping[str, Told], alerts: Alerts, timing: Timing, now_unix_ns: int
) -> Decision:
    ended = [_ended(one.note, alerts.ended.get(key), now_unix_ns) for key, one in over.items()]
    # What goes on unheard stays known: silenced, or inhibited after it was told.
    kept = {key: one for key, one in state.told.items() if key not in over and key not in audible}
    after = GroupState({**kept, **{key: Told(note) for key, note in audible.items()}}, _stamp(state, now_unix_ns))
    due = now_unix_ns + (timing.repeat_ns if audible else timing.interval_ns)
    return Decision(after, (*audible.values(), *ended), due)


def _stamp(state: GroupState, now_unix_ns: int) -> int:
    """Now, but never the same twice running: the stamp tells one notification of a group from the next."""
    before = state.notified_unix_ns
    return before + 1 if before is not None and now_unix_ns <= before < now_unix_ns + _TICK_NS else now_unix_ns


def _ended(told: Note, ended: Note | None, now_unix_ns: int) -> Note:
    if ended is not None and ended.starts_unix_ns == told.starts_unix_ns and ended.ends_unix_ns is not None:
        return ended
    return replace(told, ends_unix_ns=now_unix_ns, reason=told.reason or "recovered")

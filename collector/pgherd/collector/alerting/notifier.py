"""From alert states to letters: which group has something to tell, decided from durable state and made durable.

Evaluation commits alert states; what receivers were told is committed here, together with the letters that tell them. Killed
anywhere, the next turn sees the same states and decides the same: nothing is told twice, nothing is missed. Delivery is outbox.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from pgherd.alerts.grouping import Alerts, Decision, GroupState, decide
from pgherd.alerts.model import Instance, Rule, State
from pgherd.alerts.notification import Note, Notification, notification
from pgherd.alerts.routing import Inhibition, Place, Routing, inhibited, place
from pgherd.collector.alerting import rows
from pgherd.collector.alerting.evaluation import first_evaluation
from pgherd.collector.alerting.group import GroupStatus
from pgherd.collector.alerting.silencing import Silencer, full_match
from pgherd.proto.clock import Clock
from pgherd.proto.errors import PgherdError
from pgherd.runtime.logging import get_logger
from pgherd.storage.control.store import ControlStore

_log = get_logger(__name__)

# Silences begin and end by the wall clock, which may be set: nobody waits longer than this to look at it.
_LOOK_S = 5.0


@dataclass(slots=True)
class NotifierCounters:
    """Since this process began."""

    notifications: int = 0
    letters_given_up: int = 0
    turns_failed: int = 0


@dataclass(frozen=True, slots=True)
class _Now:
    """All alerts at the moment of a turn."""

    unix_ns: int
    open: Mapping[str, Note]
    ended: Mapping[str, Note]
    silenced: frozenset[str]
    inhibited: frozenset[str]
    rules: frozenset[str]

    def of(self, keys: Sequence[str], state: GroupState) -> Alerts:
        """The part of one group: open alerts by `keys`, and how those ended that `state` knows."""
        ended = {key: self._ended(key, one.note) for key, one in state.told.items() if key not in self.open}
        return Alerts({key: self.open[key] for key in keys}, self.silenced, self.inhibited, ended)

    def _ended(self, key: str, told: Note) -> Note:
        if told.rule_id not in self.rules:
            return replace(told, ends_unix_ns=self.unix_ns, reason="rule removed")
        return self.ended.get(key, told)


@dataclass(frozen=True, slots=True)
class _Change:
    """What one group commits."""

    receiver: str
    state: GroupState | None
    message: Notification | None


class Notifier:
    """One loop; `turn` is called by one thread at a time."""

    def __init__(
        self,
        *,
        status: Callable[[], Sequence[GroupStatus]],
        store: ControlStore,
        routing: Routing,
        silencer: Silencer,
        clock: Clock,
        inhibitions: Sequence[Inhibition] = (),
        posted: Callable[[], None] = lambda: None,
        pending_max: int = 10_000,
        places_max: int = 50_000,
    ) -> None:
        """`status` is Evaluator.status, `posted` is called on the event loop once letters are durable (OutboxWorker.wake).

        `places_max` bounds the alerts whose places are remembered from turn to turn.
        """
        self._status = status
        self._store = store
        self._routing = routing
        self._receivers = frozenset(route.receiver for route in (*routing.routes, *routing.default))
        self._inhibitions = tuple(inhibitions)
        self._silencer = silencer
        self._clock = clock
        self._posted = posted
        self._pending_max = pending_max
        self._places_max = places_max
        self._groups: dict[str, tuple[str, GroupState]] | None = None  # None: to be read from the store
        self._places: dict[str, tuple[Place, ...]] = {}  # by the alert's fingerprint
        self._places_seen: dict[str, Place] = {}  # by digest
        self._news = asyncio.Event()
        self.counters = NotifierCounters()

    def wake(self) -> None:
        """Something may have changed. Call on the event loop."""
        self._news.set()

    async def run(self) -> None:
        """Take turns until cancelled. Call after Evaluator.restore."""
        await first_evaluation(self._status, self._clock)
        while True:
            self._news.clear()
            before = self.counters.notifications
            work = asyncio.ensure_future(asyncio.to_thread(self.turn))
            try:
                due_unix_ns = await asyncio.shield(work)
            except asyncio.CancelledError:
                await asyncio.wait([work])  # the store must not close under it
                raise
            if self.counters.notifications != before:
                self._posted()
            wait_s = _LOOK_S if due_unix_ns is None else (due_unix_ns - self._clock.wall_unix_ns()) / 1e9
            try:
                async with asyncio.timeout(min(_LOOK_S, max(0.01, wait_s))):
                    await self._news.wait()
            except TimeoutError:
                continue

    def turn(self) -> int | None:
        """Decide and commit once; returns when the next group is due, if one is. Never raises: it is counted and tried again."""
        try:
            return self._turn()
        # The guard of the notifier's loop: a full disk passes, and a bug must not end all paging for good.
        except Exception as error:  # noqa: BLE001
            self._groups = None  # what is stored may be either
            self.counters.turns_failed += 1
            problem = error.message if isinstance(error, PgherdError) else f"{type(error).__name__}: {error}"
            _log.error("notify.turn_failed", error=problem)
            return None

    def _turn(self) -> int | None:
        if self._groups is None:
            with self._store.read() as connection:
                self._groups = rows.read_groups(connection)
        known, now = self._groups, self._look()
        changes: dict[str, _Change] = {}
        dues: list[int] = []
        for digest, (where, keys) in self._members(known, now).items():
            before = known[digest][1] if digest in known else GroupState()
            decision = decide(before, now.of(keys, before), where.route.timing, now.unix_ns)
            dues += [] if decision.due_unix_ns is None else [decision.due_unix_ns]
            if decision.notes or decision.state != (before if digest in known else None):
                changes[digest] = _Change(where.route.receiver, decision.state, _message(digest, where, decision))
        for digest in known.keys() - self._places_seen.keys():
            receiver, state = known[digest]
            changes[digest] = _orphan(digest, receiver, state if receiver in self._receivers else GroupState(), now)
        if changes:
            self._commit(changes, now.unix_ns)
        return min(dues, default=None)

    def _look(self) -> _Now:
        """Every alert that receivers may have to hear of, and what mutes it."""
        unix_ns = self._clock.wall_unix_ns()
        opened: dict[str, Note] = {}
        ended: dict[str, Note] = {}
        silenced: set[str] = set()
        rules: set[str] = set()
        for status in (status for group in self._status() for status in group.alerting):
            rules.add(status.rule.id)
            for fingerprint, instance in status.instances.items():
                if instance.episode_unix_ns is None:
                    continue
                key = f"{fingerprint}.{status.rule.id[-16:]}"
                if instance.state is State.RESOLVED:
                    ended[key] = _note(status.rule, instance)
                    continue
                opened[key] = _note(status.rule, instance)
                if self._silencer.silenced_by(fingerprint, instance.labels, unix_ns):
                    silenced.add(key)
        mute = inhibited({key: note.labels for key, note in opened.items()}, self._inhibitions, full_match)
        return _Now(unix_ns, opened, ended, frozenset(silenced), mute, frozenset(rules))

    def _members(self, known: Mapping[str, tuple[str, GroupState]], now: _Now) -> dict[str, tuple[Place, list[str]]]:
        """Groups with the keys of their open alerts, those included that only have something to remember."""
        if len(self._places) >= self._places_max:
            # Only between turns, and both at once: within one, a place that isn't seen is one that no route makes any more.
            self._places.clear()
            self._places_seen.clear()
        members: dict[str, tuple[Place, list[str]]] = {}
        for key, note in now.open.items():
            for where in self._places_of(key, note):
                members.setdefault(where.digest, (where, []))[1].append(key)
        for digest, (_receiver, state) in known.items():
            if digest not in members:
                for key, one in state.told.items():
                    self._places_of(key, one.note)
                if digest in self._places_seen:
                    members[digest] = (self._places_seen[digest], [])
        return members

    def _places_of(self, key: str, note: Note) -> tuple[Place, ...]:
        fingerprint = key.partition(".")[0]
        places = self._places.get(fingerprint)
        if places is None:
            places = self._places[fingerprint] = tuple(
                place(route, note.labels) for route in self._routing.of(note.labels, full_match)
            )
            self._places_seen |= {where.digest: where for where in places}
        return places

    def _commit(self, changes: Mapping[str, _Change], now_unix_ns: int) -> None:
        given_up = posted = 0
        with self._store.begin() as connection:
            for digest, change in changes.items():
                rows.write_group(connection, digest, change.receiver, change.state)
                if change.message is not None:
                    posted += 1
                    given_up += rows.post(connection, change.receiver, [change.message], now_unix_ns, self._pending_max)
        groups = dict(self._groups or {})
        for digest, change in changes.items():
            groups.pop(digest, None)
            if change.state is not None:
                groups[digest] = (change.receiver, change.state)
        self._groups = groups
        self.counters.notifications += posted
        if given_up:
            self.counters.letters_given_up += given_up
            _log.error("notify.outbox.overflow", letters_given_up=given_up, pending_max=self._pending_max)


def _note(rule: Rule, instance: Instance) -> Note:
    return Note(
        rule_id=rule.id,
        labels=instance.labels,
        annotations=instance.annotations,
        value=instance.value,
        starts_unix_ns=instance.episode_unix_ns or 0,
        ends_unix_ns=instance.resolved_unix_ns if instance.state is State.RESOLVED else None,
        reason="recovered" if instance.state is State.RESOLVED else "",
        expr=rule.expr,
    )


def _message(digest: str, where: Place, decision: Decision) -> Notification | None:
    if not decision.notes or decision.state is None:
        return None
    return notification(f"{digest}.{decision.state.notified_unix_ns}", where.key, dict(where.labels), decision.notes)


def _orphan(digest: str, receiver: str, state: GroupState, now: _Now) -> _Change:
    """A group that no route makes any more: its open alerts are told anew where they go now, what ended is told here."""
    ended = [
        replace(one.note, ends_unix_ns=now.unix_ns, reason="recovered")
        for key, one in state.told.items()
        if key not in now.open
    ]
    return _Change(receiver, None, notification(f"{digest}.{now.unix_ns}", "{}:{}", {}, ended) if ended else None)

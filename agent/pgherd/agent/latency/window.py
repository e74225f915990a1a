"""From looks to a window: which statements ended, how long they took, how old the running ones are. Pure.

Never broken:
- a statement, known by (pid, query_start), is counted at most once, however often it is seen;
- one seen running and not seen again gets an interval, not a guess: it ran at least as long as its last age, and at
  most until the next thing seen of its backend (a newer statement, its absence, or this look);
- a look that failed lengthens the gap between looks, and with it the chance of having missed something
  (`Window.chance`): silence is never taken for speed;
- memory is bounded: durations are buckets, and of backends only the last look is remembered, at most BACKENDS_MAX
  of them (the excess is counted, not followed).

A statement belongs to the window in which it was seen to end.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final

from pgherd.agent.latency.buckets import Buckets, middle
from pgherd.agent.latency.observation import Backend, Look

CUT_S: Final = 0.1  # the look's period: what is longer is counted by being seen running, what is shorter is sampled
BACKENDS_MAX: Final = 2000
QUERY_IDS_MAX: Final = 64
_RACE_S: Final = 0.005  # a state is written a moment after the time it carries

# Idle ages by which finished statements are told apart: how long the backend had been idle when it was seen.
IDLE_AGES_S: Final = (*(0.00025 * 2**step for step in range(10)), float("inf"))


@dataclass(slots=True)
class Finished:
    """Exact durations of statements found finished, by how long their backend had been idle."""

    by_idle_age: tuple[Buckets, ...] = field(default_factory=lambda: tuple(Buckets() for _ in IDLE_AGES_S))

    def add(self, duration_s: float, idle_age_s: float) -> None:
        self.by_idle_age[min(bisect_left(IDLE_AGES_S, idle_age_s), len(IDLE_AGES_S) - 1)].add(duration_s)

    @property
    def total(self) -> float:
        return sum(buckets.total for buckets in self.by_idle_age)


@dataclass(slots=True)
class Window:
    """What was seen between two instants of the server's clock."""

    started_s: float
    ended_s: float
    threshold_s: float
    looks: int = 0
    missed: int = 0  # looks that failed or were left out
    shed: int = 0  # of those, the ones left out to spare the server
    gaps: Buckets = field(default_factory=Buckets)  # seconds between neighbouring looks
    ages: Buckets = field(default_factory=Buckets)  # of every running statement at every look
    after_transaction: Finished = field(default_factory=Finished)  # statements that left their backend idle
    in_transaction: Finished = field(default_factory=Finished)  # statements that left it idle in transaction
    # Statements seen running that took CUT_S or longer, by the middle, the low and the high end of what is known.
    long: Buckets = field(default_factory=Buckets)
    long_low: Buckets = field(default_factory=Buckets)
    long_high: Buckets = field(default_factory=Buckets)
    over_low: int = 0  # statements that surely took longer than the threshold
    over_high: int = 0  # those and the ones that may have
    running_over: int = 0  # running since longer than the threshold at the window's end
    over_by_query: dict[int, int] = field(default_factory=dict)
    hidden: int = 0
    untracked: int = 0
    unfollowed: int = 0  # backends above BACKENDS_MAX
    clock_steps: int = 0
    role_is_shared: bool = False

    @property
    def seconds(self) -> float:
        return self.ended_s - self.started_s

    @property
    def longest_gap_s(self) -> float:
        return max((middle(index) for index in self.gaps.counts), default=self.seconds)

    @property
    def blind_share(self) -> float:
        """The share of the window that lay in gaps of more than five periods."""
        blind_s = sum(middle(index) * count for index, count in self.gaps if middle(index) > 5 * CUT_S)
        return min(1.0, blind_s / self.seconds) if self.seconds > 0 else 1.0


class Chance:
    """With which probability an interval of a given length holds at least one look of a window."""

    def __init__(self, window: Window) -> None:
        pairs = list(window.gaps)
        self._gaps_s = [middle(index) for index, _ in pairs]
        counts = [count for _, count in pairs]
        seconds = [gap_s * count for gap_s, count in zip(self._gaps_s, counts, strict=True)]
        self._counts = [0.0, *accumulate(counts)]
        self._seconds = [0.0, *accumulate(seconds)]

    def of(self, seconds: float) -> float:
        """1 when every gap is shorter; else one minus the share of instants from which no look follows in time."""
        total_s = self._seconds[-1]
        if total_s <= 0.0:
            return 0.0
        place = bisect_left(self._gaps_s, seconds)
        longer_s = total_s - self._seconds[place]
        longer = self._counts[-1] - self._counts[place]
        return 1.0 - max(0.0, longer_s - longer * seconds) / total_s


@dataclass(slots=True)
class _Running:
    query_start_s: float
    age_s: float
    query_id: int | None


class Tracker:
    """Follows the backends of one server from look to look; `take` ends a window and begins the next."""

    def __init__(self, threshold_s: float) -> None:
        self._threshold_s = threshold_s
        self._running: dict[int, _Running] = {}
        self._finished: dict[int, float] = {}  # pid → query_start of the statement that the last look found finished
        self._last_s: float | None = None
        self._window = Window(0.0, 0.0, threshold_s)

    @property
    def since_s(self) -> float:
        """Idle backends whose state is older than this were seen before: the question may leave them out."""
        return 0.0 if self._last_s is None else self._last_s - 2 * _RACE_S

    @property
    def followed(self) -> int:
        """How many backends are remembered."""
        return len(self._running) + len(self._finished)

    def miss(self, *, shed: bool = False) -> None:
        """A look that didn't happen; `shed` on purpose, to spare the server."""
        self._window.missed += 1
        self._window.shed += shed

    def forget(self) -> None:
        """Another server answers, or the same after a restart: nothing known of the backends holds on."""
        self._running.clear()
        self._finished.clear()
        self._last_s = None

    def add(self, look: Look) -> None:
        """Take a look into the window."""
        last_s, window = self._last_s, self._window
        self._last_s = look.now_s
        if last_s is None or look.now_s <= last_s:
            if last_s is not None:
                window.clock_steps += 1
                self._running.clear()
                self._finished.clear()
            self._begin_at(look)
            return
        window.looks += 1
        window.ended_s = look.now_s
        window.gaps.add(look.now_s - last_s)
        window.hidden = max(window.hidden, look.hidden)
        window.untracked = max(window.untracked, look.untracked)
        window.role_is_shared = window.role_is_shared or look.role_is_shared
        window.unfollowed = max(window.unfollowed, len(look.backends) - BACKENDS_MAX)
        gone = set(self._running)
        known, self._finished = self._finished, {}
        for backend in look.backends[:BACKENDS_MAX]:
            gone.discard(backend.pid)
            if backend.active:
                self._see_running(backend, look.now_s)
                continue
            self._finished[backend.pid] = backend.query_start_s
            self._end_running(backend)
            # Ended since the last look, or too shortly before it to have been visible there.
            if known.get(backend.pid) != backend.query_start_s and backend.state_change_s >= last_s - _RACE_S:
                self._see_finished(backend, look.now_s)
        for pid in gone:
            running = self._running.pop(pid)
            self._count(running, running.age_s, look.now_s - running.query_start_s)

    def take(self) -> Window:
        """The window so far; a new one begins where it ends."""
        window = self._window
        window.running_over = sum(running.age_s > self._threshold_s for running in self._running.values())
        at_s = self._last_s or 0.0
        self._window = Window(at_s, at_s, self._threshold_s)
        return window

    # ---- what was seen

    def _begin_at(self, look: Look) -> None:
        """The first look knows no gap before it: it only tells what runs, and what has been finished before."""
        for backend in look.backends[:BACKENDS_MAX]:
            if backend.active:
                age_s = max(0.0, look.now_s - backend.query_start_s)
                self._running[backend.pid] = _Running(backend.query_start_s, age_s, backend.query_id)
            else:
                self._finished[backend.pid] = backend.query_start_s
        if self._window.looks == 0:
            self._window.started_s = self._window.ended_s = look.now_s

    def _see_running(self, backend: Backend, now_s: float) -> None:
        age_s = max(0.0, now_s - backend.query_start_s)
        self._window.ages.add(age_s)
        running = self._running.get(backend.pid)
        if running is not None and running.query_start_s == backend.query_start_s:
            running.age_s = max(running.age_s, age_s)
            return
        if running is not None:
            self._count(running, running.age_s, backend.query_start_s - running.query_start_s)
        self._running[backend.pid] = _Running(backend.query_start_s, age_s, backend.query_id)

    def _end_running(self, backend: Backend) -> None:
        running = self._running.pop(backend.pid, None)
        if running is None:
            return
        if running.query_start_s == backend.query_start_s:
            duration_s = backend.state_change_s - backend.query_start_s
            self._count(running, duration_s, duration_s)
        else:
            self._count(running, running.age_s, backend.query_start_s - running.query_start_s)

    def _see_finished(self, backend: Backend, now_s: float) -> None:
        duration_s = backend.state_change_s - backend.query_start_s
        if duration_s < 0:
            return  # the server's clock was set while it ran
        finished = self._window.in_transaction if backend.in_transaction else self._window.after_transaction
        finished.add(duration_s, max(0.0, now_s - backend.state_change_s))

    def _count(self, running: _Running, low_s: float, high_s: float) -> None:
        """A statement seen running has ended, after low_s … high_s."""
        window = self._window
        low_s = max(0.0, low_s)
        high_s = max(low_s, high_s)
        middle_s = (low_s + high_s) / 2
        if middle_s < CUT_S:
            return
        window.long.add(middle_s)
        window.long_low.add(low_s)
        window.long_high.add(high_s)
        window.over_low += low_s > self._threshold_s
        if high_s > self._threshold_s:
            window.over_high += 1
            if running.query_id is not None:
                self._count_query(running.query_id)

    def _count_query(self, query_id: int) -> None:
        """By statement; ids beyond the bound are left out, the statements themselves are counted all the same."""
        by_query = self._window.over_by_query
        if query_id in by_query or len(by_query) < QUERY_IDS_MAX:
            by_query[query_id] = by_query.get(query_id, 0) + 1

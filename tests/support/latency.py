"""A simulated server for the latency estimator: backends that work and think, looks at them, and the truth.

Times are a simulated clock's. Every statement is known exactly, so that a window's percentiles can be compared with
what the looks alone led to.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pgherd.agent.latency.observation import Backend, Look
from pgherd.agent.latency.traffic import Traffic
from pgherd.agent.latency.window import Tracker, Window

Draw = Callable[[random.Random], float]


@dataclass(frozen=True, slots=True)
class Statement:
    """One statement: when it ran, and whether it left its transaction open."""

    start_s: float
    end_s: float
    in_transaction: bool = False

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


@dataclass(slots=True)
class Client:
    """One connection after the other, or one for good; its statements in order."""

    statements: list[Statement]
    per_connection: int = 0  # statements before it connects anew; 0 keeps the connection
    starts: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.starts = [statement.start_s for statement in self.statements]

    def seen(self, number: int, now_s: float) -> Backend | None:
        place = bisect_right(self.starts, now_s) - 1
        if place < 0:
            return None
        statement = self.statements[place]
        connection = place // self.per_connection if self.per_connection else 0
        pid = number * 100_000 + connection
        if now_s < statement.end_s:
            return Backend(pid, True, False, statement.start_s, statement.start_s)
        if self.per_connection and (place + 1) % self.per_connection == 0 and now_s > statement.end_s + 0.0001:
            return None  # it has hung up
        return Backend(pid, False, statement.in_transaction, statement.start_s, statement.end_s)


def client(
    rng: random.Random,
    seconds: float,
    duration: Draw,
    think: Callable[[random.Random, float], float],
    *,
    per_connection: int = 0,
    per_transaction: int = 1,
    turn_s: float = 0.0001,
) -> Client:
    """A client that works for `seconds`; `think` gets the last duration."""
    at_s, statements = 1000.0 + rng.random() * 0.01, []
    while at_s < 1000.0 + seconds:
        for number in range(per_transaction):
            took_s = duration(rng)
            last = number == per_transaction - 1
            statements.append(Statement(at_s, at_s + took_s, not last))
            at_s += took_s + (think(rng, took_s) if last else turn_s * rng.uniform(0.7, 1.5))
    return Client(statements, per_connection)


def looks(rng: random.Random, clients: list[Client], seconds: float, missing: Callable[[float], bool]) -> Iterator[Look | None]:
    """Looks 50 … 150 ms apart; None for one that is missed."""
    now_s = 1000.0
    while (now_s := now_s + rng.uniform(0.05, 0.15)) < 1000.0 + seconds:
        if missing(now_s - 1000.0):
            yield None
            continue
        seen = (client.seen(number, now_s) for number, client in enumerate(clients, 1))
        yield Look(now_s, tuple(backend for backend in seen if backend is not None))


def observe(
    rng: random.Random,
    clients: list[Client],
    seconds: float = 60.0,
    threshold_s: float = 1.0,
    missing: Callable[[float], bool] = lambda _at_s: False,
) -> tuple[Window, list[Statement]]:
    """A window and the statements that ended in it."""
    tracker = Tracker(threshold_s)
    for look in looks(rng, clients, seconds, missing):
        if look is None:
            tracker.miss()
        else:
            tracker.add(look)
    window = tracker.take()
    ended = [
        statement
        for client in clients
        for statement in client.statements
        if window.started_s < statement.end_s <= window.ended_s
    ]
    return window, ended


def traffic_of(ended: list[Statement], *, statements: bool = True, active_time: bool = True) -> Traffic:
    """What a server would have counted."""
    return Traffic(
        len(ended) if statements else None,
        "" if statements else "statements_unreadable",
        sum(not statement.in_transaction for statement in ended),
        sum(statement.duration_s for statement in ended) if active_time else None,
    )


def true_quantile(ended: list[Statement], share: float) -> float:
    """Nearest rank."""
    durations = sorted(statement.duration_s for statement in ended)
    return durations[min(len(durations) - 1, int(share * len(durations)))]

"""The life of a command as a fold of what happened to it. Pure.

Never broken, whatever arrives, how often and in which order:

- the state is a function of the *set* of inputs: any permutation and repetition of a legal set (at most
  one final event per command) folds to the same state;
- what the agent reports as final is absorbing: no later input changes state, outcome or error;
- the collector's own conclusions (`expired`, `indeterminate` because the agent forgot the command) are
  made only from silence and yield to what the agent reports: reality wins, and `late` says that it did;
- a result counts without its `accepted`; a lost stream isn't an input at all;
- every change of state is a row of `TRANSITIONS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from pgherd.proto.commands import Event
from pgherd.proto.errors import IntegrityError, PreconditionError


class State(StrEnum):
    """Where a command stands."""

    QUEUED = "queued"  # in the ledger; no agent has been told
    OFFERED = "offered"  # written to a session; the agent may or may not have it
    ACCEPTED = "accepted"  # journalled by the agent, which now owes an outcome
    RUNNING = "running"  # progress was seen
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    REJECTED = "rejected"  # by the agent's local policy or state; nothing was done
    EXPIRED = "expired"  # the deadline passed in silence
    INDETERMINATE = "indeterminate"  # a step that must not be repeated may have happened


OPEN_STATES = frozenset({State.QUEUED, State.OFFERED, State.ACCEPTED, State.RUNNING})

_REPORTS = frozenset({State.ACCEPTED, State.RUNNING, State.SUCCEEDED, State.FAILED, State.REJECTED, State.INDETERMINATE})
_OUTCOMES = frozenset({State.SUCCEEDED, State.FAILED, State.REJECTED, State.INDETERMINATE})

# Every change of state that can happen. `queued` and `expired` reach all that an agent may report, since
# reports may overtake the note that the offer went out, or the deadline may have been judged too early.
TRANSITIONS: Mapping[State, frozenset[State]] = {
    State.QUEUED: _REPORTS | {State.OFFERED, State.EXPIRED},
    State.OFFERED: _REPORTS | {State.EXPIRED},
    State.ACCEPTED: _OUTCOMES | {State.RUNNING},
    State.RUNNING: _OUTCOMES,
    State.EXPIRED: _REPORTS,
    State.INDETERMINATE: _OUTCOMES - {State.INDETERMINATE},  # only when it was the collector's own conclusion
    State.SUCCEEDED: frozenset(),
    State.FAILED: frozenset(),
    State.REJECTED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class Offered:
    """The offer was written to a session of the agent."""

    unix_ns: int


@dataclass(frozen=True, slots=True)
class Reported:
    """An event of the agent."""

    event: Event


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The time to accept is over by the collector's clock."""

    unix_ns: int


@dataclass(frozen=True, slots=True)
class Forgotten:
    """The agent's hello doesn't list a command that it had accepted: its journal was lost."""

    unix_ns: int


Input = Offered | Reported | DeadlinePassed | Forgotten


@dataclass(frozen=True, slots=True)
class Life:
    """All that is known about one command. `state` and the rest follow from it."""

    offered_unix_ns: int | None = None
    accepted: Event | None = None
    progress: Event | None = None
    outcome: Event | None = None
    expired_unix_ns: int | None = None
    forgotten_unix_ns: int | None = None

    @property
    def heard(self) -> bool:
        """Whether the agent has reported anything."""
        return self.accepted is not None or self.progress is not None or self.outcome is not None

    @property
    def late(self) -> bool:
        """The agent reported after the collector had called the command expired."""
        return self.expired_unix_ns is not None and self.heard

    @property
    def state(self) -> State:
        if self.outcome is not None:
            return State(self.outcome.kind)
        if self.forgotten_unix_ns is not None:
            return State.INDETERMINATE
        if self.progress is not None:
            return State.RUNNING
        if self.accepted is not None:
            return State.ACCEPTED
        if self.expired_unix_ns is not None:
            return State.EXPIRED
        return State.QUEUED if self.offered_unix_ns is None else State.OFFERED

    @property
    def finished_unix_ns(self) -> int | None:
        """When it ended, by the clock of whoever ended it; None while open."""
        if self.outcome is not None:
            return self.outcome.unix_ns
        if self.state is State.INDETERMINATE:
            return self.forgotten_unix_ns
        return self.expired_unix_ns if self.state is State.EXPIRED else None

    @property
    def last_sequence(self) -> int:
        """The highest sequence seen; 0 for none."""
        return max((event.sequence for event in (self.accepted, self.progress, self.outcome) if event), default=0)

    def result(self) -> Mapping[str, Any] | None:
        """The members of a success."""
        return self.outcome.body if self.outcome is not None and self.outcome.kind == "succeeded" else None

    def error(self) -> Mapping[str, Any] | None:
        """Why it didn't succeed, as `PgherdError.as_dict()`."""
        if self.outcome is not None:
            return self.outcome.body if self.outcome.kind != "succeeded" else None
        if self.state is State.INDETERMINATE:
            return IntegrityError(
                "command.indeterminate",
                "the agent had accepted this command and no longer knows it",
                hint="its journal was lost or restored; look at the host before you issue it again",
            ).as_dict()
        if self.state is State.EXPIRED:
            return _expiry(offered=self.offered_unix_ns is not None).as_dict()
        return None


def _expiry(*, offered: bool) -> PreconditionError:
    if offered:
        return PreconditionError(
            "command.expired",
            "the agent was offered this command and hasn't answered in time",
            hint="if it accepted after all, its report will be recorded here; see `pgherd agents ls`",
        )
    return PreconditionError(
        "command.expired", "no agent was there to be offered this command in time", hint="see `pgherd agents ls`"
    )


def step(life: Life, given: Input) -> Life:
    """`life` after one more input; an input that says nothing new returns it unchanged."""
    if life.outcome is not None:
        return life
    match given:
        case Offered(unix_ns):
            first = unix_ns if life.offered_unix_ns is None else min(unix_ns, life.offered_unix_ns)
            return replace(life, offered_unix_ns=first)
        case DeadlinePassed(unix_ns):
            known = life.heard or life.forgotten_unix_ns is not None or life.expired_unix_ns is not None
            return life if known else replace(life, expired_unix_ns=unix_ns)
        case Forgotten(unix_ns):
            return life if life.forgotten_unix_ns is not None else replace(life, forgotten_unix_ns=unix_ns)
        case Reported(event) if event.final:
            return replace(life, outcome=event)
        case Reported(event) if event.kind == "accepted":
            known = life.accepted is not None and life.accepted.sequence <= event.sequence
            return life if known else replace(life, accepted=event)
        case Reported(event):
            known = life.progress is not None and life.progress.sequence >= event.sequence
            return life if known else replace(life, progress=event)


def fold(inputs: Iterable[Input], life: Life | None = None) -> Life:
    """All inputs, one after the other."""
    current = life if life is not None else Life()
    for given in inputs:
        current = step(current, given)
    return current

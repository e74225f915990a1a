"""Which requests become commands, and which commands may be offered now. Pure.

Never broken:

- one idempotency key names one request as long as the ledger keeps it: repeated it returns the first command's id, changed it
  is refused;
- a node is offered at most one exclusive command at a time, in order of issue; the others wait `queued`
  and their deadlines run on;
- a node has at most `OPEN_PER_NODE_MAX` open commands: a caller in a loop can't fill the ledger;
- what was accepted is never offered again, and a command is in exactly one of the reconciled sets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pgherd.collector.control.lifecycle import OPEN_STATES, State
from pgherd.proto.commands import Verb, is_exclusive, verb_name
from pgherd.proto.errors import PreconditionError

OPEN_PER_NODE_MAX = 32


@dataclass(frozen=True, slots=True)
class Request:
    """What a caller asks for."""

    node_id: str
    verb: Verb


@dataclass(frozen=True, slots=True)
class OpenCommand:
    """An unfinished command as admission sees it; `seq` is the order of issue."""

    id: str
    seq: int
    node_id: str
    verb: Verb
    state: State


def admit(request: Request, earlier: tuple[str, Request] | None, open_on_node: int) -> str | None:
    """None: make a new command. An id: the key was used for this very request before.

    `earlier` is the command that holds the idempotency key, if any. Raises PreconditionError
    command.conflict for a key that was used for something else or a node with too many open commands.
    """
    if earlier is not None:
        command_id, before = earlier
        if before == request:
            return command_id
        raise PreconditionError(
            "command.conflict",
            f"this idempotency key was used for {verb_name(before.verb)} on another request",
            hint="use a new key for a new request",
            command_id=command_id,
        )
    if open_on_node >= OPEN_PER_NODE_MAX:
        raise PreconditionError(
            "command.conflict",
            f"the node has {open_on_node} open commands already",
            hint="wait for them: `pgherd commands ls`",
            open=open_on_node,
        )
    return None


def offerable(commands: Iterable[OpenCommand]) -> list[str]:
    """Ids of the queued and offered commands that the agent may be told now, in order of issue."""
    busy: set[str] = set()
    ready: list[str] = []
    for command in sorted(commands, key=lambda command: command.seq):
        if command.state not in OPEN_STATES:
            continue
        waiting = command.state in (State.QUEUED, State.OFFERED)
        if not is_exclusive(command.verb):
            if waiting:
                ready.append(command.id)
        elif command.node_id not in busy:
            busy.add(command.node_id)
            if waiting:
                ready.append(command.id)
    return ready


@dataclass(frozen=True, slots=True)
class Reconciled:
    """What a (re)connect means for each command that one side believes unfinished."""

    offer: tuple[str, ...]  # the agent never journalled it: offer it (again)
    await_report: tuple[str, ...]  # both know it: the agent runs it or repeats its events
    forgotten: tuple[str, ...]  # accepted once, no longer known to the agent
    unknown: tuple[str, ...]  # only the agent knows it: its events are kept in the audit


def reconcile(ledger: Sequence[OpenCommand], agent: Mapping[str, int], settled: frozenset[str] = frozenset()) -> Reconciled:
    """Compare the ledger's open commands with the agent's unfinished ones (id → last sequence).

    `settled` are ids that the ledger knows as finished; the agent only waits for its acknowledgement.
    The agent journals before it reports and lists a command until its final event is acknowledged, so
    an accepted command that isn't listed was lost with the agent's journal.
    """
    known = {command.id for command in ledger}
    ready = set(offerable(ledger))
    offer, await_report, forgotten = [], [], []
    for command in sorted(ledger, key=lambda command: command.seq):
        if command.id in agent:
            await_report.append(command.id)
        elif command.state in (State.ACCEPTED, State.RUNNING):
            forgotten.append(command.id)
        elif command.id in ready:
            offer.append(command.id)
    await_report.extend(sorted(one for one in agent if one in settled and one not in known))
    unknown = sorted(one for one in agent if one not in known and one not in settled)
    return Reconciled(tuple(offer), tuple(await_report), tuple(forgotten), tuple(unknown))

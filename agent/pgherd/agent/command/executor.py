"""Executes accepted commands: each in a child of its own, one exclusive command per node at a time.

    offer → known? repeat what was said → policy → journal (accepted | rejected) → lane of the node
          → journal (starting) → child → result file → journal (succeeded | failed | indeterminate)

Nothing here depends on the session: commands go on while the collector is away, and while the agent is,
too. What a restart finds is judged by recovery.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter, defaultdict
from collections.abc import Awaitable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from pgherd.agent.command.child import DetachedChild, child_alive
from pgherd.agent.command.epochs import SeenEpochs
from pgherd.agent.command.journal import Entry, Journal
from pgherd.agent.command.outlet import Outlet
from pgherd.agent.command.policy import Policy, decide
from pgherd.agent.command.recovery import Found, Resume, resume, step_kind
from pgherd.proto.clock import Clock
from pgherd.proto.commands import Event, Offer, Ping, Verb, is_exclusive, verb_name
from pgherd.proto.errors import (
    ConfigError,
    IntegrityError,
    InvariantError,
    PgherdError,
    PreconditionError,
    TransientError,
)
from pgherd.runtime.logging import get_logger

_log = get_logger(__name__)


class ChildArgv(Protocol):
    """Builds the command line of the child that executes a command."""

    def __call__(self, offer: Offer, alias: str, result_file: Path) -> Sequence[str]:
        """Absolute program first. The child publishes its result at `result_file`."""
        ...


@dataclass(frozen=True, slots=True)
class ExecutorSettings:
    """Bounds of execution."""

    waiting_max: int = 8  # accepted but not running, per lane; one more offer is rejected
    concurrent_max: int = 4  # exclusive commands at a time over all nodes, and as many others
    run_timeout_s: float = 4 * 3600.0  # children have tighter deadlines of their own
    poll_interval_s: float = 0.2
    progress_interval_s: float = 1.0
    stop_grace_s: float = 20.0  # between SIGTERM and SIGKILL


@dataclass(frozen=True, slots=True)
class _Ended:
    """How an attended child came to its end."""

    child: DetachedChild
    cause: PgherdError | None  # why it was ended by us


class _StillRunning(Exception):  # noqa: N818 - not an error
    """The agent stops and this child goes on."""


class Executor:
    """All commands of this agent. One event loop; journal and children are handled in threads."""

    def __init__(
        self,
        *,
        journal: Journal,
        policy: Policy,
        epochs: SeenEpochs,
        nodes: Mapping[str, str],
        argv: ChildArgv,
        environment: Mapping[str, str],
        outlet: Outlet,
        clock: Clock,
        settings: ExecutorSettings,
    ) -> None:
        """`nodes` maps UUID → alias of the nodes served here; `environment` is the children's."""
        self._journal = journal
        self._policy = policy
        self._epochs = epochs
        self._nodes = nodes
        self._argv = argv
        self._environment = environment
        self._outlet = outlet
        self._clock = clock
        self._settings = settings
        self._lanes: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._slots = {exclusive: asyncio.Semaphore(settings.concurrent_max) for exclusive in (True, False)}
        self._waiting: Counter[str] = Counter()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._admitting = asyncio.Lock()
        self._admissions: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()

    # ---- from outside ---------------------------------------------------------------------------

    async def recover(self) -> None:
        """Take up what an earlier agent left; once, before the first offer."""
        left = [(entry, await asyncio.to_thread(_way_on, entry)) for entry in self._journal.entries() if entry.outcome is None]
        for entry, way in sorted(left, key=lambda one: one[1] is not Resume.ADOPT):  # who runs has the lane first
            _log.info("command.resumed", command_id=entry.offer.command_id, way=way.value)
            self._begin(entry, way)
        self._outlet.wake()

    async def receive(self, offer: Offer, received_mono_s: float) -> None:
        """Take an offer from the collector; an offer that is known already only repeats its events.

        A caller that is cancelled meanwhile (its stream ended) doesn't stop the admission halfway.
        """
        await self._whole(self._receive(offer, received_mono_s))

    async def issue(self, node_id: str, verb: Verb, *, by: str) -> str:
        """Execute a command that this agent issues to itself (`by`: "schedule"); returns its id.

        It takes the node's lane like any other, and enters the collector's ledger when that is there.
        Raises PreconditionError command.conflict for a full lane, TransientError disk.*.
        """
        offer = Offer(str(uuid4()), node_id, verb, self._clock.wall_unix_ns(), 1000, by)
        await self._whole(self._issue(offer))
        return offer.command_id

    async def wait(self, command_id: str) -> Event | None:
        """The final event of a command that was accepted here; None when the agent stops first."""
        task = self._tasks.get(command_id)
        if task is not None:
            await asyncio.shield(task)
        entry = self._journal.entry(command_id)
        return entry.outcome if entry is not None else None

    def acknowledge(self, command_id: str, sequence: int) -> Awaitable[None]:
        """The collector has this event."""
        return asyncio.to_thread(self._journal.acknowledge, command_id, sequence)

    async def stop(self) -> None:
        """End the children and journal what became of them; what waits stays accepted for the next start."""
        self._stopping.set()
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()), timeout=self._settings.stop_grace_s + 10.0)

    @property
    def running(self) -> int:
        """Accepted commands without an outcome (for the agent's own metrics)."""
        return len(self._tasks)

    # ---- admission ------------------------------------------------------------------------------

    async def _whole(self, admission: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(admission)
        self._admissions.add(task)
        task.add_done_callback(self._admissions.discard)
        await asyncio.shield(task)

    async def _receive(self, offer: Offer, received_mono_s: float) -> None:
        async with self._admitting:
            if self._stopping.is_set():
                return  # not journalled, so it will be offered again
            if self._journal.entry(offer.command_id) is None:
                try:
                    await self._admit(offer, received_mono_s)
                except TransientError as error:  # full disk: nothing was promised, it will be offered again
                    _log.error("command.not_journalled", command_id=offer.command_id, code=error.code, error=error.message)
        self._outlet.wake()

    async def _issue(self, offer: Offer) -> None:
        async with self._admitting:
            refusal = self._full(offer)
            if refusal is not None:
                raise refusal
            await self._accept(offer, {"issued_here": offer.to_json()})
        self._outlet.wake()

    async def _admit(self, offer: Offer, received_mono_s: float) -> None:
        refusal = self._refusal(offer, received_mono_s)
        if refusal is not None:
            await asyncio.to_thread(self._journal.begin, offer, "rejected", refusal.as_dict())
            _log.warning("command.rejected", command_id=offer.command_id, verb=verb_name(offer.verb), code=refusal.code)
            return
        if offer.epoch:
            await asyncio.to_thread(self._epochs.see, offer.node_id, offer.epoch)
        await self._accept(offer, {})

    def _refusal(self, offer: Offer, received_mono_s: float) -> PgherdError | None:
        if offer.node_id not in self._nodes:
            return PreconditionError("node.not_found", "this agent doesn't serve that node", node_id=offer.node_id)
        denied = decide(offer, self._policy, self._epochs.of(offer.node_id))
        if denied is not None:
            return denied
        if (self._clock.mono_s() - received_mono_s) * 1000 >= offer.accept_within_ms:
            return PreconditionError("command.expired", "the time to accept was over", accept_within_ms=offer.accept_within_ms)
        return self._full(offer)

    def _full(self, offer: Offer) -> PgherdError | None:
        waiting = self._waiting[_lane(offer)]
        if waiting < self._settings.waiting_max:
            return None
        return PreconditionError("command.conflict", f"{waiting} commands wait before this one already", hint="issue it later")

    async def _accept(self, offer: Offer, body: Mapping[str, Any]) -> None:
        entry = await asyncio.to_thread(self._journal.begin, offer, "accepted", body)
        _log.info("command.accepted", command_id=offer.command_id, verb=verb_name(offer.verb), actor=offer.actor)
        self._begin(entry, Resume.RUN)

    # ---- execution ------------------------------------------------------------------------------

    def _begin(self, entry: Entry, way: Resume) -> None:
        command_id = entry.offer.command_id
        self._waiting[_lane(entry.offer)] += 1
        task = asyncio.create_task(self._follow(entry, way), name=f"command-{command_id}")
        self._tasks[command_id] = task
        task.add_done_callback(lambda _: self._tasks.pop(command_id, None))

    async def _follow(self, entry: Entry, way: Resume) -> None:
        """One command from its lane to its outcome."""
        exclusive = is_exclusive(entry.offer.verb)
        waiting = True

        def leave_queue() -> None:
            nonlocal waiting
            if waiting:
                waiting = False
                self._waiting[_lane(entry.offer)] -= 1

        try:
            async with contextlib.AsyncExitStack() as held:
                if exclusive:
                    await held.enter_async_context(self._lanes[entry.offer.node_id])
                if way is not Resume.ADOPT:  # an adopted child runs already
                    await held.enter_async_context(self._slots[exclusive])
                leave_queue()
                await self._go(entry, way)
        finally:
            leave_queue()

    async def _go(self, entry: Entry, way: Resume) -> None:
        if way is Resume.RUN and self._stopping.is_set():
            return  # never started: the next start runs it
        try:
            kind, body = await self._outcome(entry, way)
        except _StillRunning:
            return  # the next start finds it
        except PgherdError as error:
            kind, body = "failed", error.as_dict()
        except Exception as error:  # noqa: BLE001 - loop guard: a command must not end without an outcome
            _log.error("command.broke", command_id=entry.offer.command_id, error=repr(error))
            kind, body = "failed", InvariantError("invariant.broken", f"executing the command broke: {error!r}"[:500]).as_dict()
        await self._finish(entry, kind, body)

    async def _outcome(self, entry: Entry, way: Resume) -> tuple[str, Mapping[str, Any]]:
        match way:
            case Resume.RUN if isinstance(entry.offer.verb, Ping):
                return "succeeded", {"agent_unix_ns": self._clock.wall_unix_ns()}
            case Resume.RUN:
                return _judge(entry.result_file, await self._attend(entry, await self._start(entry)))
            case Resume.ADOPT:
                child = DetachedChild.adopt(entry.directory, entry.child_pid)
                return _judge(entry.result_file, await self._attend(entry, child))
            case Resume.REPORT:
                return _judge(entry.result_file, _Ended(DetachedChild.adopt(entry.directory, None), None))
            case Resume.INTERRUPTED:
                return "failed", _interrupted().as_dict()
            case Resume.INDETERMINATE:
                return "indeterminate", _indeterminate().as_dict()
            case Resume.NOTHING:
                raise InvariantError("invariant.broken", "a finished command was taken up again")

    async def _start(self, entry: Entry) -> DetachedChild:
        def start() -> DetachedChild:
            argv = self._argv(entry.offer, self._nodes[entry.offer.node_id], entry.result_file)
            self._journal.note_starting(entry)
            child = DetachedChild.start(argv, entry.directory, self._environment)
            assert child.pid is not None
            try:
                self._journal.note_child(entry, child.pid)
            except TransientError as error:  # it runs; only ending it after a restart needs its pid
                _log.warning("command.child_not_noted", command_id=entry.offer.command_id, code=error.code)
            return child

        if entry.offer.node_id not in self._nodes:
            raise PreconditionError("node.not_found", "this agent no longer serves that node", node_id=entry.offer.node_id)
        return await asyncio.shield(asyncio.to_thread(start))

    async def _attend(self, entry: Entry, child: DetachedChild) -> _Ended:
        """Follow a child to its end; end it when the agent stops or its time is up."""
        settings, clock = self._settings, self._clock
        deadline_mono_s = clock.mono_s() + settings.run_timeout_s
        told_mono_s, killed_at_mono_s = 0.0, float("inf")
        cause: PgherdError | None = None
        while not await asyncio.to_thread(child.ended):
            now_mono_s = clock.mono_s()
            if cause is None and (self._stopping.is_set() or now_mono_s > deadline_mono_s):
                cause = _interrupted() if self._stopping.is_set() else _overdue(settings.run_timeout_s)
                killed_at_mono_s = now_mono_s + settings.stop_grace_s
                await asyncio.to_thread(child.terminate)
            if now_mono_s > killed_at_mono_s:
                await asyncio.to_thread(child.kill)
                if child.pid is None and self._stopping.is_set():
                    raise _StillRunning  # adopted without a known pid: it can't be ended by us
            if now_mono_s - told_mono_s >= settings.progress_interval_s:
                body = await asyncio.to_thread(child.progress)
                if body is not None:
                    told_mono_s = now_mono_s
                    self._tell(entry, body)
            await asyncio.sleep(settings.poll_interval_s)
        return _Ended(child, cause)

    def _tell(self, entry: Entry, body: Mapping[str, Any]) -> None:
        sequence = self._journal.progress_sequence(entry)
        if sequence is not None:
            event = Event(entry.offer.command_id, sequence, self._clock.wall_unix_ns(), "progress", body)
            self._outlet.passing(event.to_wire(entry.offer.verb))

    async def _finish(self, entry: Entry, kind: str, body: Mapping[str, Any]) -> None:
        """Journal the outcome; a full disk delays it, since without it the command would be judged anew."""
        delay_s = 0.5
        while True:
            try:
                event = await asyncio.to_thread(self._append, entry, kind, body)
                break
            except TransientError as error:
                _log.error("command.outcome_not_journalled", command_id=entry.offer.command_id, code=error.code)
                if self._stopping.is_set():
                    return  # the result file is there, or the next start finds it interrupted
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, 30.0)
        await asyncio.to_thread(DetachedChild.adopt(entry.directory, None).sweep)
        _log.info("command.finished", command_id=entry.offer.command_id, verb=verb_name(entry.offer.verb), outcome=event.kind)
        self._outlet.wake()

    def _append(self, entry: Entry, kind: str, body: Mapping[str, Any]) -> Event:
        try:
            return self._journal.append(entry, kind, body)
        except (ValueError, TypeError, KeyError) as error:  # a result that the wire can't carry
            broken = InvariantError(
                "invariant.broken", f"the child's {kind} has a shape that can't be reported: {error!r}"[:500]
            )
            return self._journal.append(entry, "failed", broken.as_dict())


def _lane(offer: Offer) -> str:
    """Where a command waits: the exclusive ones for their node, all others together."""
    return offer.node_id if is_exclusive(offer.verb) else ""


def _way_on(entry: Entry) -> Resume:
    found = Found(entry.outcome is not None, entry.starting, child_alive(entry.directory), entry.result_file.exists())
    return resume(step_kind(entry.offer.verb), found)


def _judge(result_file: Path, ended: _Ended) -> tuple[str, Mapping[str, Any]]:
    """The outcome of a child that ended: its published document, else why there is none."""
    try:
        document = json.loads(result_file.read_bytes())
    except (OSError, ValueError):
        document = None
    if isinstance(document, dict) and isinstance(document.get("result"), dict):
        return "succeeded", document["result"]
    if isinstance(document, dict) and isinstance(document.get("error"), dict):
        error = document["error"]
        return ("indeterminate" if error.get("code") == "command.indeterminate" else "failed"), error
    if ended.cause is not None:
        return "failed", ended.cause.as_dict()
    status = ended.child.status
    if status is None:
        return "failed", _interrupted().as_dict()
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status} and left no result"
    tail = ended.child.stderr_tail()
    return "failed", PreconditionError("child.failed", f"the command's process {how}", status=status, stderr=tail).as_dict()


def _interrupted() -> TransientError:
    return TransientError(
        "command.interrupted", "the command's process ended without a result when the agent stopped", hint="issue it again"
    )


def _overdue(timeout_s: float) -> TransientError:
    return TransientError("child.timeout", f"the command didn't end within {timeout_s:g} s", timeout_s=timeout_s)


def _indeterminate() -> IntegrityError:
    return IntegrityError(
        "command.indeterminate",
        "the agent was stopped inside a step that must not be repeated",
        hint="look at the server before you issue anything else for it",
    )


def cli_argv(program: Sequence[str], config: Path | None) -> ChildArgv:
    """The real `ChildArgv`: our own CLI. `program` is e.g. (sys.executable, "-m", "pgherd.agent.main")."""

    def build(offer: Offer, alias: str, result_file: Path) -> Sequence[str]:
        members = {name: getattr(offer.verb, name) for name in offer.verb.__slots__}
        words = {
            "backup.run": ("backup", "run"),
            "backup.verify": ("backup", "verify"),
            "restore": ("backup", "restore"),
            "diagnostics": ("check",),
        }.get(verb_name(offer.verb))
        if words is None:
            raise ConfigError("usage.invalid", f"{verb_name(offer.verb)} isn't executed by a child")
        options = ["--node", alias]
        for name, value in members.items():
            if value:
                options += [f"--{name}", value]
        chosen = ("--config", str(config)) if config is not None else ()
        return [*program, *chosen, *words, *options, "--ndjson", "--result-file", str(result_file)]

    return build

"""Brings the ledger, the sessions and whoever waits together on one event loop.

Holds no state that matters: a command lives in the ledger, and everything here can be rebuilt from it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import TypedDict, Unpack

from pgherd.collector.control.herd import Herd
from pgherd.collector.control.ledger import Ledger, Recorded, Submitted
from pgherd.proto.commands import Event, Verb
from pgherd.proto.errors import PgherdError
from pgherd.runtime.logging import get_logger

_log = get_logger(__name__)

_SWEEP_INTERVAL_S = 1.0
_FLUSH_INTERVAL_S = 5.0
_PRUNE_INTERVAL_S = 60.0  # a thousand rows a minute: more than a herd of ten thousand servers writes


class SubmitOptions(TypedDict, total=False):
    """As in `Ledger.submit`."""

    idempotency_key: str | None
    accept_within_s: float
    epoch: int


class Dispatcher:
    """The asynchronous face of the ledger; one event loop."""

    def __init__(self, ledger: Ledger, herd: Herd) -> None:
        self.ledger = ledger
        self.herd = herd
        self._next_prune_s = 0.0
        self._wakers: dict[str, asyncio.Event] = {}
        self._waiting: defaultdict[str, set[asyncio.Event]] = defaultdict(set)

    async def submit(self, node: str, verb: Verb, *, actor: str, via: str, **options: Unpack[SubmitOptions]) -> Submitted:
        """Queue a command and wake its agent's session. Errors as `Ledger.submit`."""
        submitted = await asyncio.to_thread(self.ledger.submit, node, verb, actor=actor, via=via, **options)
        self.wake(submitted.agent_id)
        return submitted

    async def record(self, agent_id: str, event: Event) -> Recorded:
        """Make an event durable, then tell whoever waits for its command. Errors as `Ledger.record`."""
        recorded = await asyncio.to_thread(self.ledger.record, agent_id, event)
        if recorded.changed:
            self._tell(event.command_id)
            if event.final:
                self.wake(agent_id)  # the next exclusive command of the node may go out
        return recorded

    def wake(self, agent_id: str) -> None:
        """Let the agent's session, if there is one, look for offers."""
        waker = self._wakers.get(agent_id)
        if waker is not None:
            waker.set()

    def attach(self, agent_id: str, waker: asyncio.Event) -> None:
        """Make `waker` the one to set for this agent; the newest session wins."""
        self._wakers[agent_id] = waker

    def detach(self, agent_id: str, waker: asyncio.Event) -> None:
        """Forget `waker` unless a newer session took its place."""
        if self._wakers.get(agent_id) is waker:
            del self._wakers[agent_id]

    @contextlib.contextmanager
    def watching(self, command_id: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever the command changes; clear it before you read the ledger."""
        changed = asyncio.Event()
        self._waiting[command_id].add(changed)
        try:
            yield changed
        finally:
            self._waiting[command_id].discard(changed)
            if not self._waiting[command_id]:
                del self._waiting[command_id]

    def _tell(self, command_id: str) -> None:
        for changed in self._waiting.get(command_id, ()):
            changed.set()

    async def run(self) -> None:
        """Judge deadlines and store what agents said, until cancelled; part of the collector's task group."""
        last_flush_s = asyncio.get_running_loop().time()
        try:
            while True:
                await asyncio.sleep(_SWEEP_INTERVAL_S)
                try:
                    for command_id in await asyncio.to_thread(self.ledger.expire_due):
                        self._tell(command_id)
                    now_s = asyncio.get_running_loop().time()
                    if now_s - last_flush_s >= _FLUSH_INTERVAL_S:
                        last_flush_s = now_s
                        await asyncio.to_thread(self.herd.flush)
                    if now_s >= self._next_prune_s:
                        self._next_prune_s = now_s + _PRUNE_INTERVAL_S
                        await asyncio.to_thread(self.ledger.prune)
                except PgherdError as error:  # a full disk must not end the loop: try again at the next turn
                    _log.error("control.sweep_failed", code=error.code, error=error.message)
        finally:
            with contextlib.suppress(PgherdError):
                await asyncio.shield(asyncio.to_thread(self.herd.flush))

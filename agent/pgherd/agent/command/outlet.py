"""Between the executor, which has something to say, and the session, which may not be there to say it."""

from __future__ import annotations

import asyncio

from pgherd.proto.control.v1 import control_pb2 as pb

_PASSING_MAX = 256


class Outlet:
    """One event loop. Durable events aren't kept here: the journal has them, this only wakes the sender.

    Passing messages (progress, refusals that nothing follows from) are kept one per command, the newest;
    beyond 256 commands further ones are dropped.
    """

    def __init__(self) -> None:
        self._woken = asyncio.Event()
        self._passing: dict[str, pb.CommandEvent] = {}

    def wake(self) -> None:
        """Something durable is to be sent."""
        self._woken.set()

    def passing(self, event: pb.CommandEvent) -> None:
        """Send this if a session is there; it may be lost."""
        if event.command_id in self._passing or len(self._passing) < _PASSING_MAX:
            self._passing[event.command_id] = event
            self._woken.set()

    def take_passing(self) -> list[pb.CommandEvent]:
        """What is to be sent now; forgotten here."""
        taken = list(self._passing.values())
        self._passing.clear()
        return taken

    async def wait(self, timeout_s: float) -> None:
        """Until something is to be sent, or the time is up."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._woken.wait()
        except TimeoutError:
            return
        self._woken.clear()

"""Commands while their memory can't be trusted: a damaged journal, or one that a newer agent wrote.

Nothing is executed then, neither for the collector nor by schedule: what is in that journal may still run, or may
have happened. Sampling and shipping don't depend on it and go on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pgherd.agent.command.journal import UNFINISHED_MAX
from pgherd.agent.command.outlet import Outlet
from pgherd.proto.clock import Clock
from pgherd.proto.commands import Event, Offer
from pgherd.proto.errors import PgherdError

_UUID_RE = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class DisabledCommands:
    """Stands in for journal and executor; answers every offer with the reason.

    The commands below `directory` are still named to the collector as unfinished: it mustn't take those
    that it waits for as forgotten.
    """

    def __init__(self, reason: PgherdError, directory: Path, outlet: Outlet, clock: Clock) -> None:
        self.reason = reason
        self._directory = directory
        self._outlet = outlet
        self._clock = clock
        self.running = 0

    def unfinished(self) -> list[tuple[str, int]]:
        """What has a directory, whatever became of it."""
        try:
            names = sorted(path.name for path in self._directory.iterdir())
        except OSError:
            return []
        return [(name, 0) for name in names if _UUID_RE.fullmatch(name)][:UNFINISHED_MAX]

    def unacknowledged(self) -> Sequence[tuple[Offer, Event]]:
        """Nothing is kept here."""
        return ()

    async def receive(self, offer: Offer, received_mono_s: float) -> None:
        """Refuse, without a trace: when the journal is mended, the same offer may be taken."""
        event = Event(offer.command_id, 1, self._clock.wall_unix_ns(), "rejected", self.reason.as_dict())
        self._outlet.passing(event.to_wire(offer.verb))
        self._outlet.wake()

    async def acknowledge(self, command_id: str, sequence: int) -> None:
        """Nothing waits for it."""

    async def recover(self) -> None:
        """Nothing may be taken up."""

    async def stop(self) -> None:
        """Nothing runs."""

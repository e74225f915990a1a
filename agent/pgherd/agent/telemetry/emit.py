"""One node's batches on their way into the spool: what each source said, at one time, and what ended since.

A *source* is whatever produces a fixed kind of series on its own rhythm: a probe, the agent's own figures, a
walk over the databases. Never broken: a series that its source no longer states gets one NO_RECORDED_VALUE
point in the batch in which its source speaks next, or at once when the server is lost; a source that isn't
asked in a batch keeps its series.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from pgherd.agent.telemetry.convert import Series, Source, encode, series_of, vanished
from pgherd.proto.samples import Sample
from pgherd.runtime.queue.spool import Spool

# Sources that don't speak about the server: they go on while it is lost.
INDEPENDENT: Final = frozenset({"agent", "host", "backups"})

Statement = Mapping[str, Iterable[Sample]]  # source → all that it has to say now


@dataclass(frozen=True, slots=True)
class Emitted:
    """What became of a batch."""

    points: int
    spooled: bool


class Emitter:
    """Encodes and spools one node's batches. Shared by all samplers of the node, on one event loop."""

    def __init__(self, origin: Source, spool: Spool, on_spooled: Callable[[], None] = lambda: None) -> None:
        self._origin = origin
        self._spool = spool
        self._on_spooled = on_spooled
        self._alive: dict[str, Series] = {}  # source → the series it stated last

    async def emit(self, statement: Statement, unix_ns: int) -> Emitted:
        """Spool one batch: `statement`'s samples, all with the time `unix_ns`, and the ends of what its sources dropped.

        A series belongs to one source: of several samples of one series the first stays.
        """
        stated = {source: series_of(samples) for source, samples in statement.items()}
        current: Series = {}
        for series in reversed(stated.values()):
            current.update(series)
        stale = [sample for source in stated for sample in vanished(self._alive.get(source, {}), current)]
        self._alive |= stated
        return await self.emit_held(current, stale, unix_ns)

    async def emit_held(self, current: Series, stale: Sequence[Sample], unix_ns: int) -> Emitted:
        """Spool one batch of a source that remembers by itself what it stated last, in a smaller form than series."""
        if not current and not stale:
            return Emitted(0, spooled=True)
        payload, points = encode(self._origin, current, stale, unix_ns), len(current) + len(stale)
        spooled = await asyncio.to_thread(self._spool.append, payload, points)
        self._on_spooled()
        return Emitted(points, spooled)

    def about_server(self) -> set[str]:
        """The sources with living series that are about the server: stated empty, they end."""
        return {source for source, series in self._alive.items() if series} - INDEPENDENT

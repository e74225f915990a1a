"""Deliver what the outbox holds: at least once, in order per group, with patience.

A letter is written in the transaction that notes what its group was told (notifier.py), and marked here after
the receiver said 2xx. Killed in between, it is sent again with the same idempotency key. A receiver that is
down or overloaded is left alone as a whole, with growing pauses; one that refuses a single letter (4xx) gets
the others meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from pgherd.alerts.notification import from_document
from pgherd.alerts.notify import DeliveryError, Receiver
from pgherd.collector.alerting import rows
from pgherd.collector.alerting.rows import Letter
from pgherd.proto.clock import Clock
from pgherd.proto.errors import IntegrityError, PgherdError
from pgherd.runtime.logging import get_logger
from pgherd.storage.control.store import ControlStore

_log = get_logger(__name__)

_RETRY_AFTER_MAX_S = 3600.0  # a receiver that names a longer pause is asked again


@dataclass(frozen=True, slots=True)
class OutboxSettings:
    """Pauses between attempts grow from `backoff_min_s` to `backoff_max_s`, each shortened by up to half at random."""

    backoff_min_s: float = 1.0
    backoff_max_s: float = 300.0
    poll_s: float = 5.0  # looks for due letters at least this often
    batch: int = 100  # letters read at once
    retention_s: float = 3600.0  # how long delivered and given-up letters stay visible


@dataclass(slots=True)
class OutboxCounters:
    """Since this process began; per receiver."""

    delivered: int = 0
    failed: int = 0


class OutboxWorker:
    """One delivery loop per receiver."""

    def __init__(
        self,
        store: ControlStore,
        receivers: Sequence[Receiver],
        clock: Clock,
        settings: OutboxSettings | None = None,
        dice: random.Random | None = None,
    ) -> None:
        self._store = store
        self._receivers = tuple(receivers)
        self._clock = clock
        self._settings = settings or OutboxSettings()
        self._dice = dice or random.Random()
        self._news = {receiver.name: asyncio.Event() for receiver in receivers}
        self._taken: set[int] = set()  # ids of letters that a receiver took, though that is not durable yet
        self.counters = {receiver.name: OutboxCounters() for receiver in receivers}

    def wake(self) -> None:
        """There may be new letters. Call on the event loop."""
        for event in self._news.values():
            event.set()

    async def run(self) -> None:
        """Deliver until cancelled; then close the receivers."""
        names = [receiver.name for receiver in self._receivers]
        strangers = await asyncio.to_thread(self._give_up_strangers, names)
        if strangers:
            _log.warning("notify.outbox.strangers", letters=strangers)
        try:
            async with asyncio.TaskGroup() as tasks:
                for receiver in self._receivers:
                    tasks.create_task(self._serve(receiver))
                tasks.create_task(self._prune())
        finally:
            for receiver in self._receivers:
                await receiver.close()

    async def _serve(self, receiver: Receiver) -> None:
        failures = 0
        while True:
            news = self._news[receiver.name]
            news.clear()  # before looking: what comes while we look sets it again
            try:
                tried = await self._round(receiver)
                failures = 0
            except PgherdError as error:  # the receiver is ill, or the store is: both heal, or are seen in the log
                failures += 1
                pause_s = self._backoff_s(failures)
                if isinstance(error, DeliveryError) and error.retry_after_s is not None:
                    pause_s = max(pause_s, min(error.retry_after_s, _RETRY_AFTER_MAX_S))
                _log.warning(
                    "notify.outbox.paused", receiver=receiver.name, pause_s=pause_s, error=error.message, code=error.code
                )
                await asyncio.sleep(pause_s)
                continue
            if not tried:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(news.wait(), self._settings.poll_s)

    async def _round(self, receiver: Receiver) -> int:
        """Try every letter that is due; returns how many. Raises what concerns more than one letter."""
        letters = await asyncio.to_thread(self._due, receiver.name)
        for letter in letters:
            try:
                if letter.id not in self._taken:
                    await receiver.deliver(from_document(letter.payload))
                    self._taken.add(letter.id)
            except (DeliveryError, IntegrityError) as error:
                self.counters[receiver.name].failed += 1
                await asyncio.to_thread(self._mark_failed, letter, error)
                if isinstance(error, DeliveryError) and error.receiver_ill:
                    raise
                _log.error("notify.refused", receiver=receiver.name, letter=letter.id, error=error.message, code=error.code)
                continue
            await asyncio.to_thread(self._mark_delivered, letter)  # a full disk keeps this from being written, for hours
            self._taken.discard(letter.id)
            self.counters[receiver.name].delivered += 1
        return len(letters)

    async def _prune(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self._prune_once)
            except PgherdError as error:  # a full disk: the rows stay for the next time
                _log.warning("notify.outbox.prune_failed", error=error.message, code=error.code)
            await asyncio.sleep(min(60.0, self._settings.retention_s))

    def _backoff_s(self, failures: int) -> float:
        grown_s = min(self._settings.backoff_max_s, self._settings.backoff_min_s * 2.0 ** min(failures - 1, 30))
        return grown_s * self._dice.uniform(0.5, 1.0)

    # --- on threads ---

    def _due(self, receiver: str) -> list[Letter]:
        with self._store.read() as connection:
            return rows.due(
                connection,
                receiver,
                self._clock.wall_unix_ns(),
                int(self._settings.backoff_max_s * 1e9),
                self._settings.batch,
            )

    def _mark_delivered(self, letter: Letter) -> None:
        with self._store.begin() as connection:
            rows.mark_delivered(connection, letter.id, self._clock.wall_unix_ns())

    def _mark_failed(self, letter: Letter, error: PgherdError) -> None:
        ill = isinstance(error, DeliveryError) and error.receiver_ill
        # An ill receiver is paused as a whole; its letters stay due.
        pause_s = 0.0 if ill else self._backoff_s(letter.attempts + 1)
        with self._store.begin() as connection:
            rows.mark_failed(connection, letter.id, self._clock.wall_unix_ns() + int(pause_s * 1e9), error.message)

    def _prune_once(self) -> None:
        with self._store.begin() as connection:
            rows.prune(connection, self._clock.wall_unix_ns() - int(self._settings.retention_s * 1e9))

    def _give_up_strangers(self, names: Sequence[str]) -> int:
        with self._store.begin() as connection:
            return rows.give_up_strangers(connection, names, self._clock.wall_unix_ns())

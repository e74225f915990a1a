"""Several statements in one round trip, each on its own: libpq's pipeline mode with a sync after every statement.

The sync ends the statement's implicit transaction, so one that fails or runs into its timeout costs only
itself. A leading bare sync answers when the server begins: what comes after it is the server's own time, not
the network's. At most `WINDOW` statements are under way: when the tick's time is up the rest isn't sent,
and a slow server costs probes instead of the connection.

Source: PostgreSQL docs, "Pipeline Mode" (libpq) and "Extended Query" (protocol flow).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import psycopg
from psycopg import errors, pq

WINDOW: Final = 8
_STALE_PREPARED: Final = ("0A000", "26000")  # an extension's view changed its columns; a pooler knows other sessions


@dataclass(frozen=True, slots=True)
class Question:
    """One read-only statement of ours, with its parameters in text form."""

    sql: str
    parameters: tuple[str | None, ...] = ()


@dataclass(slots=True)
class Outcome:
    """What came of one question. Both None: it wasn't sent, or the link fell before its answer."""

    result: pq.abc.PGresult | None = None
    failure: psycopg.Error | None = None
    sent: bool = False
    duration_s: float = 0.0  # the server's time for it: since the answer before, or its arrival there if that was later


@dataclass(slots=True)
class Prepared:
    """The prepared statements of one link: planned once, and then no catalog is looked at to parse them."""

    names: dict[str, bytes] = field(default_factory=dict)
    count: int = 0

    def new_name(self, sql: str) -> bytes:
        self.count += 1
        name = self.names[sql] = f"pgherd_{self.count}".encode()
        return name


class SilentServerError(Exception):
    """The server said nothing for the time that was allowed. The link is in no known state."""


class Exchange:
    """One pipeline over one link; `run` it once. `outcomes` hold what came, whatever happened."""

    def __init__(
        self, link: pq.abc.PGconn, questions: Sequence[Question], prepared: Prepared, mono_s: Callable[[], float]
    ) -> None:
        self._link = link
        self._questions = questions
        self._prepared = prepared
        self._mono_s = mono_s
        self.outcomes = [Outcome() for _ in questions]
        self._group: list[pq.abc.PGresult] = []  # the results since the last sync
        self._preparing: set[int] = set()
        self._sent_mono_s: deque[float] = deque()
        self._round_trip_s = 0.0
        self._last_mono_s = 0.0

    async def run(self, silence_s: float, send_until_mono_s: float) -> None:
        """Ask, and wait for the answers to all that was sent; the first question is always sent.

        Raises SilentServerError when nothing arrives for `silence_s`, psycopg.OperationalError when the link falls;
        after either, and after a cancellation, the link is of no more use.
        """
        link = self._link
        link.enter_pipeline_mode()
        pinged_mono_s = self._mono_s()
        link.pipeline_sync()
        sent = answered = 0
        begun = False
        while True:
            while sent < len(self._questions) and sent - answered < WINDOW:
                if sent and self._mono_s() >= send_until_mono_s:
                    break
                self._send(sent)
                sent += 1
            while link.flush():
                await _ready(link.socket, silence_s, write=True)
            if begun and answered == sent:
                break
            await _ready(link.socket, silence_s, write=False)
            link.consume_input()
            for group in self._groups():
                if begun:
                    self._judge(answered, group)
                    answered += 1
                else:
                    begun, self._last_mono_s = True, self._mono_s()
                    self._round_trip_s = self._last_mono_s - pinged_mono_s
        link.exit_pipeline_mode()

    def _send(self, index: int) -> None:
        question, link = self._questions[index], self._link
        name = self._prepared.names.get(question.sql)
        if name is None:
            name = self._prepared.new_name(question.sql)
            link.send_prepare(name, question.sql.encode())
            self._preparing.add(index)
        link.send_query_prepared(name, [None if value is None else value.encode() for value in question.parameters])
        link.pipeline_sync()
        self.outcomes[index].sent = True
        self._sent_mono_s.append(self._mono_s())

    def _groups(self) -> list[list[pq.abc.PGresult]]:
        """The results up to every sync that has arrived, without waiting."""
        groups: list[list[pq.abc.PGresult]] = []
        nothing = 0
        while not self._link.is_busy() and nothing < 2:  # one nothing ends a result, two are the end of what is there
            result = self._link.get_result()
            if result is None:
                nothing += 1
                continue
            nothing = 0
            if result.status == pq.ExecStatus.PIPELINE_SYNC:
                groups.append(self._group)
                self._group = []
            else:
                self._group.append(result)
        if self._link.status == pq.ConnStatus.BAD:
            failed = next((result for result in self._group if result.status == pq.ExecStatus.FATAL_ERROR), None)
            message = self._link.get_error_message("utf-8").strip() or "the connection is lost"
            raise errors.error_from_result(failed) if failed is not None else psycopg.OperationalError(message)
        return groups

    def _judge(self, index: int, group: Sequence[pq.abc.PGresult]) -> None:
        outcome, now_mono_s = self.outcomes[index], self._mono_s()
        arrived_mono_s = self._sent_mono_s.popleft() + self._round_trip_s
        outcome.duration_s = max(0.0, now_mono_s - max(self._last_mono_s, arrived_mono_s))
        self._last_mono_s = now_mono_s
        failed = next((result for result in group if result.status == pq.ExecStatus.FATAL_ERROR), None)
        if failed is None:
            outcome.result = group[-1]
            return
        outcome.failure = errors.error_from_result(failed)
        unprepared = index in self._preparing and group[0] is failed
        if unprepared or outcome.failure.sqlstate in _STALE_PREPARED:
            self._prepared.names.pop(self._questions[index].sql, None)


async def _ready(fd: int, timeout_s: float, *, write: bool) -> None:
    """Until the socket can be written or read. Raises SilentServerError after `timeout_s`."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    add, remove = (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)
    add(fd, ready.set)
    try:
        async with asyncio.timeout(timeout_s):
            await ready.wait()
    except TimeoutError:
        raise SilentServerError from None
    finally:
        remove(fd)

"""The threads that evaluate queries: so many at once, so many waiting, none past its deadline.

Overflow rule: a query that finds `concurrency` running and `waiting_max` queued is refused at once (`query.overloaded`);
one that waits longer than its own timeout ends with `query.timeout` without having run. A dashboard opens with a burst
of panels, so waiting a little is right and refusing the fifth would not be.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from pgherd.proto.clock import Clock
from pgherd.proto.errors import TransientError

T = TypeVar("T")

WAITING_MAX_DEFAULT = 100
# After the deadline the work has this long to notice it at its next checkpoint; then the caller is answered without it.
_GRACE_S = 1.0


class QueryPool:
    """Runs blocking work in threads of its own with a deadline that the work checks."""

    def __init__(self, clock: Clock, concurrency: int, waiting_max: int = WAITING_MAX_DEFAULT) -> None:
        self._clock = clock
        self._room = concurrency + waiting_max
        self._accepted = 0
        self._executor = ThreadPoolExecutor(max_workers=concurrency, thread_name_prefix="query")

    @property
    def accepted(self) -> int:
        """Queries running and waiting now; a self-metric."""
        return self._accepted

    async def run(self, work: Callable[[Callable[[], None]], T], timeout_s: float) -> T:
        """`work(checkpoint)` in a thread; the checkpoint raises `query.timeout` once the time is over.

        Raises what the work raises, `query.timeout`, and `query.overloaded` when too many are waiting.
        """
        if self._accepted >= self._room:
            raise TransientError(
                "query.overloaded", "too many queries are running and waiting", hint="retry later", waiting_max=self._room
            )
        deadline_mono_s = self._clock.mono_s() + timeout_s
        abandoned = False

        def checkpoint() -> None:
            if abandoned or self._clock.mono_s() >= deadline_mono_s:
                raise _timed_out(timeout_s)

        def checked() -> T:
            checkpoint()
            return work(checkpoint)

        self._accepted += 1
        future = self._executor.submit(checked)
        loop = asyncio.get_running_loop()
        future.add_done_callback(lambda done: self._release_from(loop, done))
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), timeout_s + _GRACE_S)
        except TimeoutError:
            raise _timed_out(timeout_s) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Not this request was cancelled but the queued work, by close().
            raise TransientError("query.overloaded", "the collector is shutting down", hint="retry later") from None
        finally:
            abandoned = True

    def close(self) -> None:
        """Refuse the waiting and let the running come to their next checkpoint; doesn't wait for them."""
        self._room = 0
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _release_from(self, loop: asyncio.AbstractEventLoop, _done: Future[T]) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._release)

    def _release(self) -> None:
        self._accepted -= 1


def _timed_out(timeout_s: float) -> TransientError:
    return TransientError("query.timeout", "query timed out in expression evaluation", timeout_s=timeout_s)

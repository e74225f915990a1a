"""The resident agent on a wall clock that is off: skewed_agent.py <seconds ahead> --config FILE run."""

from __future__ import annotations

from pgherd.agent.resident import Agent  # isort: skip  # before anything heavy, as the resident itself

import asyncio
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

from pgherd.agent.config import ENVIRONMENT_PREFIX, AgentConfig
from pgherd.runtime.clock import SystemClock
from pgherd.runtime.config import load


class SkewedClock(SystemClock):
    """Ahead of the machine's wall clock by a constant; monotonic time is right."""

    def __init__(self, ahead_s: float) -> None:
        self._ahead_ns = int(ahead_s * 1e9)

    def wall_unix_ns(self) -> int:
        return super().wall_unix_ns() + self._ahead_ns


async def serve(config: AgentConfig, file: Path, ahead_s: float) -> None:
    """Until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    with ExitStack() as held:
        await Agent(config, file, standalone=False, clock=SkewedClock(ahead_s), held=held).run(stop)


if __name__ == "__main__":
    path = Path(sys.argv[3])
    config = load(AgentConfig, file=path, environment_prefix=ENVIRONMENT_PREFIX).value
    asyncio.run(serve(config, path, float(sys.argv[1])))

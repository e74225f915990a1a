"""A collector that has nothing but its control plane, as a process that can be killed.

tiny_collector.py <directory> <agent id>
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from support.control import Caller, control_plane


async def serve(directory: Path, agent_id: str) -> None:
    """Until it is killed."""
    async with control_plane(directory, peer=lambda _: Caller(agent_id)):
        (directory / "ready").touch()
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), sys.argv[2]))

"""An agent that has nothing but its command side: the real journal, executor and session, a tiny child.

    tiny_agent.py <directory of the test> <agent id> <node id> <target> [crash point]

With a crash point it kills itself (SIGKILL) there, through the ports that the executor is given:
"before-accept" (while it looks whether it serves the node), "after-accept" (while it builds the child's
command line), "before-spawn" (`starting` is journalled, the child isn't there yet).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc.aio

from pgherd.agent.command.epochs import SeenEpochs
from pgherd.agent.command.executor import Executor, ExecutorSettings
from pgherd.agent.command.journal import Journal
from pgherd.agent.command.outlet import Outlet
from pgherd.agent.command.policy import policy_of
from pgherd.agent.command.session import ControlClient, SessionSettings, SpoolState
from pgherd.agent.config import PolicyConfig
from pgherd.agent.node import NodeStatus
from pgherd.proto.clock import Clock
from pgherd.proto.commands import Offer
from pgherd.runtime.clock import SystemClock

CHILD = Path(__file__).with_name("tiny_command.py")


class Trap(Mapping[str, str]):
    """A mapping that kills the process when it is looked into."""

    def __init__(self, members: dict[str, str]) -> None:
        self._members = members

    def __getitem__(self, key: str) -> str:
        die()
        return self._members[key]

    def __iter__(self) -> Iterator[str]:
        die()
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class AgentParts:
    """The command side of one agent."""

    journal: Journal
    executor: Executor
    client: ControlClient
    outlet: Outlet
    mark: list[int]  # change it to make the identity look renewed


def build(
    directory: Path,
    agent_id: str,
    node_id: str,
    target: str,
    *,
    crash: str = "",
    clock: Clock | None = None,
    settings: ExecutorSettings | None = None,
) -> AgentParts:
    """An agent in `directory`; `target` is where its collector listens."""

    def argv(offer: Offer, alias: str, result_file: Path) -> Sequence[str]:
        if crash == "after-accept":
            die()
        return [sys.executable, "-I", "-S", str(CHILD), str(directory), str(result_file), offer.command_id]

    clock, outlet = clock or SystemClock(), Outlet()
    journal = Journal.open(directory / "commands", clock)
    policy = policy_of(PolicyConfig(verbs={"diagnostics": "deny"}))
    environment: Mapping[str, str] = {"PATH": os.environ["PATH"]}
    executor = Executor(
        journal=journal,
        policy=policy,
        epochs=SeenEpochs.open(directory / "epochs.json"),
        nodes=Trap({node_id: "n1"}) if crash == "before-accept" else {node_id: "n1"},
        argv=argv,
        environment=Trap({}) if crash == "before-spawn" else environment,
        outlet=outlet,
        clock=clock,
        settings=settings or ExecutorSettings(poll_interval_s=0.02, progress_interval_s=0.02, stop_grace_s=0.5),
    )
    mark = [1]
    client = ControlClient(
        settings=SessionSettings(agent_id, "test", "host", backoff_s_min=0.05, backoff_s_max=0.2, refused_backoff_s=0.2),
        dial=lambda: grpc.aio.insecure_channel(target),
        identity_mark=lambda: mark[0],
        nodes=lambda: [NodeStatus(node_id, "n1", "c1", "h:5432", condition="up", role="primary")],
        spool=lambda: SpoolState(0, 0),
        policy=policy,
        journal=journal,
        executor=executor,
        outlet=outlet,
        clock=clock,
    )
    return AgentParts(journal, executor, client, outlet, mark)


@contextlib.asynccontextmanager
async def running(parts: AgentParts) -> AsyncIterator[AgentParts]:
    """Recover, keep the session, and stop in order when the block is left."""
    await parts.executor.recover()
    session = asyncio.create_task(parts.client.run())
    try:
        yield parts
    finally:
        await parts.executor.stop()
        session.cancel()
        await asyncio.gather(session, return_exceptions=True)
        parts.journal.close()


async def serve(directory: Path, agent_id: str, node_id: str, target: str, crash: str) -> None:
    """Until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with running(build(directory, agent_id, node_id, target, crash=crash)):
        await stop.wait()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4], "".join(sys.argv[5:])))

"""Many agents on one machine: real control sessions over real mTLS, in few processes, with nothing to watch.

    idle_herd.py FILE TARGET FIRST LAST        agents FIRST to LAST of FILE dial TARGET until SIGTERM

Every agent has its own identity, channel and ControlClient, as a resident has; what it lacks is a PostgreSQL. With lines of
tiers in FILE (`ship`), every agent also ships the points of that tier at its rhythm over a channel of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc.aio

EXPORT = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"


def prepare(state_directory: Path, count: int, file: Path, ship: Sequence[dict[str, Any]] = ()) -> None:
    """Give a collector that isn't running `count` agents with certificates, as their joining would have; write FILE."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    from pgherd.collector.identity.ca import CertificateAuthority
    from pgherd.collector.identity.peer import PeerKind
    from pgherd.collector.identity.registry import add_certificate, add_identity
    from pgherd.collector.setup import Layout
    from pgherd.storage.control.store import ControlStore

    layout, now_unix_ns = Layout(state_directory), time.time_ns()
    ca = CertificateAuthority.load(layout.ca)
    store = ControlStore.open(layout.control)
    members = []
    with store.begin() as connection:
        for number in range(count):
            key, agent_id = ec.generate_private_key(ec.SECP256R1()), str(uuid.uuid4())
            issued = ca.issue_client(key.public_key(), PeerKind.AGENT, agent_id, now_unix_ns, 86400.0)
            add_identity(
                connection, subject_id=agent_id, kind=PeerKind.AGENT, name=f"idle-{number}", labels={}, facts={}, now_unix_ns=now_unix_ns
            )  # fmt: skip
            add_certificate(connection, agent_id, issued, now_unix_ns)
            key_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
            members.append({"id": agent_id, "node": str(uuid.uuid4()), "key": key_pem, "certificate": issued.pem})
    store.close()
    file.write_text(json.dumps({"ca": ca.certificate_pem.decode(), "ship": list(ship), "members": members}))


@contextlib.contextmanager
def running(file: Path, port: int, count: int, processes: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The agents of FILE, spread over processes; ended by SIGTERM."""
    children, each = [], -(-count // processes)
    try:
        for first in range(0, count, each):
            argv = [
                sys.executable,
                str(Path(__file__)),
                str(file),
                f"localhost:{port}",
                str(first),
                str(min(first + each, count)),
            ]
            children.append(subprocess.Popen(argv))
        yield children
    finally:
        for child in children:
            child.send_signal(signal.SIGTERM)
        for child in children:
            child.wait(60)


class _Nothing:
    """No command was ever given."""

    def unfinished(self) -> list[tuple[str, int]]:
        return []

    def unacknowledged(self) -> Sequence[Any]:
        return ()

    async def receive(self, offer: Any, received_mono_s: float) -> None:
        raise AssertionError("nobody commands an idle herd")

    async def acknowledge(self, command_id: str, sequence: int) -> None:
        raise AssertionError("nobody commands an idle herd")


def _dial(document: dict[str, Any], member: dict[str, str], target: str) -> grpc.aio.Channel:
    from pgherd.agent.resident import _CHANNEL_OPTIONS

    credentials = grpc.ssl_channel_credentials(document["ca"].encode(), member["key"].encode(), member["certificate"].encode())
    # Channels of one process share connections by their arguments: each agent's is its own.
    return grpc.aio.secure_channel(target, credentials, options=[*_CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)])


def _client(document: dict[str, Any], member: dict[str, str], target: str) -> Any:
    from pgherd.agent.command.outlet import Outlet
    from pgherd.agent.command.policy import policy_of
    from pgherd.agent.command.session import ControlClient, SessionSettings, SpoolState
    from pgherd.agent.config import PolicyConfig
    from pgherd.agent.node import NodeStatus
    from pgherd.runtime.clock import SystemClock

    own = member["id"][:8]  # an instance belongs to one agent
    node = NodeStatus(member["node"], f"n-{own}", "idle", f"{own}:5432", condition="up", role="primary")
    return ControlClient(
        settings=SessionSettings(member["id"], "idle", "idle", backoff_s_max=10.0),
        dial=lambda: _dial(document, member, target),
        identity_mark=lambda: 1,
        nodes=lambda: [node],
        spool=lambda: SpoolState(0, 0),
        policy=policy_of(PolicyConfig()),
        journal=_Nothing(),
        executor=_Nothing(),
        outlet=Outlet(),
        clock=SystemClock(),
    )


async def _ship(document: dict[str, Any], member: dict[str, str], target: str) -> None:
    """Every tier at its rhythm: acknowledged or sent again, in one sequence."""
    from pgherd.agent.telemetry.convert import Source, encode, series_of
    from pgherd.proto.samples import Metric, MetricKind, Sample

    source = Source(member["id"], member["node"], f"n-{member['id'][:8]}", "idle", f"{member['id'][:8]}:5432")
    tiers = []
    for tier in document["ship"]:
        samples = [
            Sample(Metric(name, MetricKind(kind), text, unit), labels, value)
            for name, kind, text, unit, labels, value in tier["samples"]
        ]
        tiers.append((tier["interval_s"], series_of(samples)))
    incarnation, sequence = str(uuid.uuid4()), 0
    async with _dial(document, member, target) as channel:
        export = channel.unary_unary(EXPORT, None, None)
        started = time.monotonic() + (hash(member["id"]) % 1000) / 1000
        due = [started for _ in tiers]
        while True:
            which = min(range(len(tiers)), key=due.__getitem__)
            await asyncio.sleep(max(0.0, due[which] - time.monotonic()))
            due[which] += tiers[which][0]
            body = encode(source, tiers[which][1], [], time.time_ns())
            sequence += 1
            metadata = (("pgherd-incarnation", incarnation), ("pgherd-sequence", str(sequence)))
            while True:
                try:
                    await export(body, timeout=30, metadata=metadata, wait_for_ready=True)
                    break
                except grpc.aio.AioRpcError:
                    await asyncio.sleep(1)


async def _serve(document: dict[str, Any], target: str, first: int, last: int) -> None:
    from pgherd.runtime.logging import configure

    configure(level="error")
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    tasks = []
    for number, member in enumerate(document["members"][first:last]):
        tasks.append(asyncio.create_task(_client(document, member, target).run()))
        if document["ship"]:
            tasks.append(asyncio.create_task(_ship(document, member, target)))
        if number % 20 == 19:
            await asyncio.sleep(0.1)  # a herd that is switched on rack by rack
    await stop.wait()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


if __name__ == "__main__":
    asyncio.run(_serve(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))

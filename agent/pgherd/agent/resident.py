"""The resident agent's composition root: samplers → spool → shipper; session → executor; schedule; renewal.

Started by launch.py with the validated configuration in a file. May import only what the memory budget allows
(tests/light_install.py). A part that fails takes the process down: its supervisor restarts it, journal and
spool know how to go on.
"""

from __future__ import annotations

import pgherd.agent.lean  # noqa: F401  # isort: skip  # works by being imported first

import asyncio
import os
import random
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import grpc
import grpc.aio

from pgherd.agent.backup.figures import BackupFigures
from pgherd.agent.command.disabled import DisabledCommands
from pgherd.agent.command.epochs import SeenEpochs
from pgherd.agent.command.executor import Executor, ExecutorSettings, cli_argv
from pgherd.agent.command.journal import Journal
from pgherd.agent.command.outlet import Outlet
from pgherd.agent.command.policy import Policy, policy_of
from pgherd.agent.command.session import ControlClient, SessionSettings, SpoolState
from pgherd.agent.config import ENVIRONMENT_PREFIX, AgentConfig
from pgherd.agent.identity.files import Identity, require_identity
from pgherd.agent.identity.schedule import renewal_due_unix_ns
from pgherd.agent.latency.sampler import LatencySampler
from pgherd.agent.node import NodeStatus
from pgherd.agent.nodes import node_ids
from pgherd.agent.probes.catalog import load_catalog
from pgherd.agent.probes.host import HostProbe
from pgherd.agent.rounds.walk import Rounds
from pgherd.agent.sampler import NodeSampler
from pgherd.agent.schedule import BackupSchedule
from pgherd.agent.statements.reader import StatementReader
from pgherd.agent.status import StatusFile
from pgherd.agent.telemetry.ship import Shipper
from pgherd.proto.clock import Clock
from pgherd.proto.errors import IntegrityError, PgherdError
from pgherd.runtime.clock import SystemClock
from pgherd.runtime.config import from_plain
from pgherd.runtime.durable import exclusive_lock, read_json
from pgherd.runtime.logging import configure, get_logger
from pgherd.runtime.process import clean_environment
from pgherd.runtime.queue.spool import Spool
from pgherd.runtime.render import render_error
from pgherd.runtime.tls import channel_credentials

_log = get_logger(__name__)

_RENEWAL_CHECK_S = 30.0
_RENEWAL_RETRY_S = 120.0
_RENEWAL_TIMEOUT_S = 60.0
_FIRST_SESSION_WAIT_S = 10.0
_DRAIN_S = 5.0
_PROGRAM = (sys.executable, "-m", "pgherd.agent.main")
_CHANNEL_OPTIONS = [
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 10_000),
    ("grpc.use_local_subchannel_pool", 1),  # each channel its own connection: a renewed certificate is really used
]


def dial(identity: Identity) -> grpc.aio.Channel:
    """A channel to the collector with the identity's files as they are."""
    credentials = channel_credentials(
        ca_file=identity.ca_file, key_file=identity.key_file, certificate_file=identity.certificate_file
    )
    return grpc.aio.secure_channel(identity.grpc_address, credentials, options=_CHANNEL_OPTIONS)


class Agent:
    """Everything that runs in the resident, built from the configuration."""

    def __init__(
        self, config: AgentConfig, config_file: Path | None, *, standalone: bool, clock: Clock, held: ExitStack
    ) -> None:
        self._config = config
        self._config_file = config_file
        self._clock = clock
        state = config.state_directory
        self._identity = None if standalone else require_identity(state)
        self._spool = Spool.open(state / "spool", config.spool, clock)
        held.callback(self._spool.close)
        ids = node_ids(state, [node.alias for node in config.nodes])
        catalog = load_catalog()
        host = HostProbe(clock)
        self._shipper = Shipper(self._spool, self._dial, clock, agent_id=self._identity.agent_id) if self._identity else None
        notify = self._shipper.notify if self._shipper else lambda: None
        self._samplers = [
            NodeSampler(
                agent_id=self._identity.agent_id if self._identity else "",
                node_id=ids[node.alias],
                node=node,
                sampling=config.sampling,
                catalog=catalog,
                spool=self._spool,
                clock=clock,
                on_spooled=notify,
                host=host,
            )
            for node in config.nodes
        ]
        self._rounds = [
            Rounds(
                node,
                config.sampling,
                config.rounds,
                connection=sampler.connection,
                emitter=sampler.emitter,
                budget=sampler.budget,
                status=lambda sampler=sampler: sampler.status,  # type: ignore[misc]
                clock=clock,
            )
            for node, sampler in zip(config.nodes, self._samplers, strict=True)
            if config.rounds.enabled
        ]
        self._statements = [
            StatementReader(
                config.statements,
                config.sampling.slow_interval,
                connection=sampler.connection,
                emitter=sampler.emitter,
                budget=sampler.budget,
                status=lambda sampler=sampler: sampler.status,  # type: ignore[misc]
                clock=clock,
            )
            for sampler in self._samplers
            if config.statements.enabled
        ]
        self._backups = [
            BackupFigures(
                config.backup,
                state,
                emitter=sampler.emitter,
                status=lambda sampler=sampler: sampler.status,  # type: ignore[misc]
                clock=clock,
            )
            for sampler in self._samplers
        ]
        self._latency = [
            LatencySampler(
                connection=sampler.connection,
                emitter=sampler.emitter,
                status=lambda sampler=sampler: sampler.status,  # type: ignore[misc]
                window_s=config.sampling.latency_window,
                threshold_s=config.sampling.latency_threshold,
                clock=clock,
                budget=sampler.budget,
                chance=random.random,
            )
            for sampler in self._samplers
            if config.sampling.latency
        ]
        outlet = Outlet()
        policy = policy_of(config.policy)
        self._schedule: BackupSchedule | None = None
        self._executor: Executor | DisabledCommands
        memory: Journal | DisabledCommands
        try:
            memory, self._executor = self._commands(ids, policy, outlet, held)
        except IntegrityError as error:
            _log.error("commands.disabled", code=error.code, error=error.message, hint=error.hint)
            memory = self._executor = DisabledCommands(error, state / "commands", outlet, clock)
            policy = Policy(frozenset())
        self._client: ControlClient | None = None
        if self._identity:
            self._client = ControlClient(
                settings=SessionSettings(self._identity.agent_id, version("pgherd"), socket.gethostname()),
                dial=self._dial,
                identity_mark=lambda: require_identity(state).serial,
                nodes=self.nodes,
                spool=lambda: SpoolState(self._spool.status.size_bytes, self._spool.status.oldest_unix_ns),
                policy=policy,
                journal=memory,
                executor=self._executor,
                outlet=outlet,
                clock=clock,
            )
        self._status = StatusFile(state / "status.json", clock)

    def _commands(self, ids: Mapping[str, str], policy: Policy, outlet: Outlet, held: ExitStack) -> tuple[Journal, Executor]:
        """What executes commands, and the schedule that issues them. Raises IntegrityError format.*."""
        state, clock = self._config.state_directory, self._clock
        with ExitStack() as opened:
            journal = Journal.open(state / "commands", clock)
            opened.callback(journal.close)
            executor = Executor(
                journal=journal,
                policy=policy,
                epochs=SeenEpochs.open(state / "epochs.json"),
                nodes={ids[node.alias]: node.alias for node in self._config.nodes},
                argv=cli_argv((*_PROGRAM, "--state-directory", str(state)), self._config_file),
                environment=self._child_environment(),
                outlet=outlet,
                clock=clock,
                settings=ExecutorSettings(),
            )
            if self._config.backup.enabled:
                statuses = {sampler.status.node_id: (lambda sampler=sampler: sampler.status) for sampler in self._samplers}
                interval_s = self._config.backup.interval
                self._schedule = BackupSchedule(state / "schedule.json", interval_s, statuses, executor, clock)
            held.push(opened.pop_all())
        return journal, executor

    def nodes(self) -> Sequence[NodeStatus]:
        """Every node as its last cycle found it."""
        return [sampler.status for sampler in self._samplers]

    def _dial(self) -> grpc.aio.Channel:
        return dial(require_identity(self._config.state_directory))

    @staticmethod
    def _child_environment() -> dict[str, str]:
        """Clean, but with the layers of configuration that came by environment."""
        return clean_environment({name: value for name, value in os.environ.items() if name.startswith(ENVIRONMENT_PREFIX)})

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set; then samplers first, the spool is given a moment to drain, children are ended, state is kept."""
        await self._executor.recover()
        async with asyncio.TaskGroup() as tasks:
            sampling = [
                *(tasks.create_task(sampler.run()) for sampler in self._samplers),
                *(tasks.create_task(rounds.run()) for rounds in self._rounds),
                *(tasks.create_task(statements.run()) for statements in self._statements),
                *(tasks.create_task(figures.run()) for figures in self._backups),
                *(tasks.create_task(latency.run()) for latency in self._latency),
            ]
            others = [tasks.create_task(self._keep_status())]
            if self._schedule:
                others.append(tasks.create_task(self._schedule.run()))
            if self._client and self._shipper:
                others.append(tasks.create_task(self._renew()))
                others.append(tasks.create_task(self._client.run()))
                others.append(tasks.create_task(self._ship(self._shipper, self._client)))
                others.append(tasks.create_task(self._hurry_after_outages(self._shipper, self._client)))
            _log.info("agent.started", pid=os.getpid(), nodes=len(self._samplers), version=version("pgherd"))
            await stop.wait()
            _log.info("agent.stopping")
            for task in sampling:
                task.cancel()
            await asyncio.wait(sampling)
            await self._executor.stop()
            if self._client and self._shipper:
                await self._drain(self._shipper, self._client)
            for task in others:
                task.cancel()
        await asyncio.to_thread(self._write_status)

    async def _ship(self, shipper: Shipper, client: ControlClient) -> None:
        """Ship once the collector knows our nodes from the first hello: before that it would refuse their samples."""
        await self._until(lambda: client.connected, _FIRST_SESSION_WAIT_S)
        await shipper.run()

    @staticmethod
    async def _hurry_after_outages(shipper: Shipper, client: ControlClient) -> None:
        """A session that is there again says that the collector is: the shipper needn't wait out its pause."""
        connected = client.connected
        while True:
            await asyncio.sleep(0.2)
            if client.connected and not connected:
                shipper.hurry()
            connected = client.connected

    async def _drain(self, shipper: Shipper, client: ControlClient) -> None:
        """Give the shipper a moment to empty the spool; what remains is shipped after the next start."""
        shipper.hurry()
        await self._until(lambda: not (client.connected and self._spool.status.pending_batches), _DRAIN_S)

    async def _until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        deadline_mono_s = self._clock.mono_s() + timeout_s
        while not condition() and self._clock.mono_s() < deadline_mono_s:  # noqa: ASYNC110 - two owners, no event in common
            await asyncio.sleep(0.05)

    async def _renew(self) -> None:
        """Renew the certificate when it is due, in a child: signing needs libraries that don't live here."""
        while True:
            await asyncio.sleep(_RENEWAL_CHECK_S)
            try:
                identity = require_identity(self._config.state_directory)
            except PgherdError as error:  # somebody joins anew, or it is damaged: sampling goes on
                _log.error("identity.unreadable", code=error.code, error=error.message)
                continue
            due_unix_ns = renewal_due_unix_ns(identity.not_before_unix_ns, identity.not_after_unix_ns, identity.serial)
            if self._clock.wall_unix_ns() < due_unix_ns:
                continue
            if await self._renew_once():
                if self._shipper:
                    await self._shipper.reconnect()
            else:
                await asyncio.sleep(_RENEWAL_RETRY_S)

    async def _renew_once(self) -> bool:
        options = ["--config", str(self._config_file)] if self._config_file else []
        argv = [*_PROGRAM, "--state-directory", str(self._config.state_directory), *options, "renew", "--json"]
        child = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env=self._child_environment(),
        )
        try:
            async with asyncio.timeout(_RENEWAL_TIMEOUT_S):
                _, errors = await child.communicate()
        except (TimeoutError, asyncio.CancelledError) as ended:
            child.kill()
            await child.wait()
            if isinstance(ended, asyncio.CancelledError):
                raise
            errors = b"no answer in time"
        if child.returncode == 0:
            _log.info("identity.renewed")
            return True
        _log.error("identity.renewal_failed", status=child.returncode, why=errors[-500:].decode("utf-8", "replace"))
        return False

    async def _keep_status(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self._write_status)
            except PgherdError as error:  # a full disk isn't worth the agent's life
                _log.warning("status.not_written", code=error.code)
            await asyncio.sleep(StatusFile.INTERVAL_S)

    def _write_status(self) -> None:
        self._status.write(
            agent_id=self._identity.agent_id if self._identity else None,
            connected=self._client.connected if self._client else None,
            skew_ns=self._client.skew_ns if self._client else None,
            nodes=self.nodes(),
            next_backup_unix_ns={
                sampler.status.alias: self._schedule.next_unix_ns(sampler.status.node_id) for sampler in self._samplers
            }
            if self._schedule
            else {},
            spool=self._spool.status,
            ship=self._shipper.status if self._shipper else None,
            commands_running=self._executor.running,
            commands_disabled=self._executor.reason if isinstance(self._executor, DisabledCommands) else None,
        )


async def _run(config: AgentConfig, config_file: Path | None, *, standalone: bool) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    with ExitStack() as held:
        held.enter_context(
            exclusive_lock(config.state_directory / "lock", f"the agent's state directory {config.state_directory}")
        )
        await Agent(config, config_file, standalone=standalone, clock=SystemClock(), held=held).run(stop)


def main() -> int:
    """Entry point: `python -m pgherd.agent.resident PLAN`, started by launch.py."""
    plan = read_json(Path(sys.argv[1]), format_name="pgherd.resident", newest_version=1)
    config = from_plain(AgentConfig, plan["config"])
    configure(level=config.log_level)
    config_file = Path(str(plan["config_file"])) if plan["config_file"] else None
    try:
        asyncio.run(_run(config, config_file, standalone=bool(plan["standalone"])))
    except PgherdError as error:
        render_error(error, as_json=False)
        return error.info.exit_status
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

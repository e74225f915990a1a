"""A node with its repository, for backup tests: the agent's own configuration and verbs, in this process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pgherd.agent.backup.command import restore_node, take_verify_retain
from pgherd.agent.backup.repository import NodeRepository, open_repository
from pgherd.agent.backup.verify import verify
from pgherd.agent.config import AgentConfig, BackupConfig, NodeConfig, PolicyConfig
from pgherd.runtime.clock import SystemClock
from pgherd.runtime.render import Progress
from support.postgres import Server


@dataclasses.dataclass(frozen=True)
class BackupNode:
    """One node of one agent. `run`, `verify`, `restore` answer what the commands answer."""

    config: AgentConfig
    node: NodeConfig

    @property
    def repository(self) -> NodeRepository:
        return open_repository(self.config.backup.repository, self.node.cluster, self.node.alias)

    @property
    def directory(self) -> Path:
        """Where this node's backups lie."""
        return self.config.backup.repository / self.node.cluster / self.node.alias

    def backups(self) -> list[Path]:
        return sorted(path for path in self.directory.glob("2*") if path.is_dir())

    def with_backup(self, **settings: Any) -> BackupNode:
        return BackupNode(
            dataclasses.replace(self.config, backup=dataclasses.replace(self.config.backup, **settings)), self.node
        )

    def with_node(self, **settings: Any) -> BackupNode:
        return BackupNode(self.config, dataclasses.replace(self.node, **settings))

    def run(self, progress: Callable[[str, int, int, str], None] | None = None) -> Mapping[str, Any]:
        """`progress` is called in the middle of things: a place to break them."""
        return take_verify_retain(self.config, self.node, progress or Progress())

    def verify(self, name: str = "") -> Mapping[str, Any]:
        return dataclasses.asdict(verify(self.repository, name, SystemClock(), Progress()))

    def restore(self, name: str = "", target: Path | None = None) -> Mapping[str, Any]:
        return restore_node(self.config, self.node, name, target, Progress())

    def config_file(self) -> Path:
        """The same as a file, for tests that run the command."""
        path = self.config.state_directory.parent / "agent.toml"
        backup, node = self.config.backup, self.node
        path.write_text(
            f'state_directory = "{self.config.state_directory}"\n'
            f'[[nodes]]\nalias = "{node.alias}"\ncluster = "{node.cluster}"\nconninfo = "{node.conninfo}"\n'
            f'[backup]\nrepository = "{backup.repository}"\nscratch_directory = "{backup.scratch_directory}"\n'
            f'compression = "{backup.compression}"\n',
            encoding="utf-8",
        )
        return path


def backup_node(server: Server, home: Path, *, role: str = "postgres", **backup: Any) -> BackupNode:
    """A node on `server`, with everything of the agent below `home` (which other OS users can pass through)."""
    node = NodeConfig(alias="n1", cluster="shop", conninfo=server.conninfo(role))
    config = AgentConfig(
        nodes=(node,),
        state_directory=home / "state",
        backup=BackupConfig(**{"repository": home / "repo", "scratch_directory": home / "scratch", "timeout": 120.0, **backup}),
        policy=PolicyConfig(restore_roots={"spare": home / "roots"}),
    )
    return BackupNode(config, node)

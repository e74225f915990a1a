"""What every verb of `pgherd-agent` gets: the configuration and how to answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from pgherd.agent.config import DEFAULT_FILE, ENVIRONMENT_PREFIX, AgentConfig, NodeConfig
from pgherd.proto.errors import ConfigError
from pgherd.runtime.config import Loaded, load


@dataclass
class AgentContext:
    """The outcome of the group's own options; the configuration is read when a verb first asks for it."""

    config_file: Path | None = None  # as stated with --config; None: the default file, if it exists
    json: bool = False
    flags: dict[str, object] = field(default_factory=dict)

    @cached_property
    def loaded(self) -> Loaded[AgentConfig]:
        """All layers, validated, with origins. Raises ConfigError."""
        file = self.config_file or (DEFAULT_FILE if DEFAULT_FILE.exists() else None)
        loaded = load(AgentConfig, file=file, environment_prefix=ENVIRONMENT_PREFIX, flags=self.flags)
        aliases = [node.alias for node in loaded.value.nodes]
        for alias in aliases:
            if aliases.count(alias) > 1:
                raise ConfigError("config.invalid", f"two nodes are called {alias!r}", hint="give each [[nodes]] its own alias")
        for node in loaded.value.nodes:
            _check_conninfo(node)
        return loaded

    @property
    def config(self) -> AgentConfig:
        """The validated configuration. Raises ConfigError."""
        return self.loaded.value

    def node(self, alias: str | None) -> NodeConfig:
        """The node called `alias`; without one, the only node. Raises ConfigError usage.invalid."""
        nodes = {node.alias: node for node in self.config.nodes}
        if alias is None and len(nodes) == 1:
            return next(iter(nodes.values()))
        if alias is None or alias not in nodes:
            known = ", ".join(nodes) or "none: add a [[nodes]] table to the configuration"
            what = f"no node is called {alias!r}" if alias else "say which node with --node"
            raise ConfigError("usage.invalid", what, hint=f"nodes here: {known}")
        return nodes[alias]


def _check_conninfo(node: NodeConfig) -> None:
    """A conninfo becomes an argument of pg_dump and is shown: nothing secret may be in it. Raises ConfigError config.invalid."""
    import psycopg  # not every verb needs libpq
    from psycopg.conninfo import conninfo_to_dict

    try:
        keywords = {key for key, value in conninfo_to_dict(node.conninfo).items() if value}
    except psycopg.Error as error:
        raise ConfigError(
            "config.invalid",
            f"the conninfo of node {node.alias!r} can't be read: {str(error).strip()}",
            hint="write it like 'host=/run/postgresql user=pgherd'",
        ) from error
    for key in sorted(keywords & {"password", "sslpassword"}):
        raise ConfigError(
            "config.invalid",
            f"the conninfo of node {node.alias!r} holds a {key}",
            hint="every user of this host could read it: put a password into a file of mode 0600 and name that as password_file",
        )

"""`pgherd-agent run`: validate, write the outcome down, become the resident.

The resident can't afford the libraries that validate (ADR 0003). `exec` keeps the process id, so that a
supervisor sees one process from start to end.
"""

from __future__ import annotations

import os
import sys

from pgherd.agent.command.policy import policy_of
from pgherd.agent.context import AgentContext
from pgherd.agent.identity.files import load_identity
from pgherd.proto.errors import ConfigError, PreconditionError
from pgherd.runtime.config import to_plain
from pgherd.runtime.durable import private_directory, publish_json

PLAN_FORMAT = "pgherd.resident"
PLAN_VERSION = 1
PLAN_NAME = "resident.json"


def launch(context: AgentContext, *, standalone: bool) -> int:
    """Replace this process by the resident agent; returns only by raising.

    Raises ConfigError, PreconditionError renew.not_joined when there is no identity and not `standalone`.
    """
    config = context.config
    policy_of(config.policy)
    if not config.nodes:
        raise ConfigError(
            "config.invalid", "no node is configured", hint="add a [[nodes]] table; `pgherd-agent check` tries it", key="nodes"
        )
    state_directory = private_directory(config.state_directory)
    if not standalone and load_identity(state_directory) is None:
        raise PreconditionError(
            "renew.not_joined",
            "this agent hasn't joined a herd",
            hint="`pgherd-agent join` with a token from `pgherd agents add`; or `run --standalone` for backups by schedule only",
        )
    plan = {
        "format": PLAN_FORMAT,
        "version": PLAN_VERSION,
        "config": to_plain(config),
        "config_file": str(context.config_file) if context.config_file else None,
        "standalone": standalone,
    }
    path = state_directory / PLAN_NAME
    publish_json(path, plan)
    arguments = [sys.executable, "-m", "pgherd.agent.resident", str(path)]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, arguments)  # noqa: S606 - no shell is the point

"""What the agent knows about a node right now: the face it shows to heartbeats, `status.json` and the CLI."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["unknown", "primary", "standby"]
Condition = Literal["unknown", "up", "down", "saturated", "auth_failed", "hung"]


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """One node as its last sampling cycle found it.

    `condition` is of `observed_unix_ns` (0 before the first cycle); `role` is "unknown" whenever the
    condition isn't "up": a role that can't be read now isn't carried over. `system_identifier` and
    `server_version_num` keep the last value read ("" and 0 while never reached).
    """

    node_id: str
    alias: str
    cluster: str
    instance: str
    system_identifier: str = ""
    server_version_num: int = 0
    role: Role = "unknown"
    condition: Condition = "unknown"
    observed_unix_ns: int = 0

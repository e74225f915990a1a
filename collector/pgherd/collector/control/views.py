"""What the ledger and the herd look like to a reader: rows of the API, pages with cursors. Synchronous.

A cursor is opaque to callers. Pages are stable: what was listed isn't listed again when new rows arrive.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, Select, and_, or_, select

from pgherd.collector.control.herd import Herd, NodeReport
from pgherd.collector.control.ledger import life_of, resolve_node
from pgherd.collector.control.lifecycle import OPEN_STATES, State
from pgherd.proto.errors import ConfigError, PreconditionError
from pgherd.storage.control.schema import agents, backups, command_events, commands, nodes
from pgherd.storage.control.store import ControlStore

PAGE_MAX = 1000
_NUMBER = re.compile(r"[0-9]{1,19}")
_NUMBER_MAX = 2**63 - 1  # SQLite's


@dataclass(frozen=True, slots=True)
class Page:
    """Some rows, and the cursor of the next page; None at the end."""

    items: list[dict[str, Any]]
    next_cursor: str | None


class Views:
    """Reads for the HTTP API. `herd` knows which agents are heard right now."""

    def __init__(self, store: ControlStore, herd: Herd) -> None:
        self._store = store
        self._herd = herd

    def nodes(self, *, limit: int = 100, cursor: str | None = None, cluster: str | None = None) -> Page:
        """Nodes by cluster and alias, with the condition of this moment (`unknown` when their agent is silent)."""
        query = select(nodes).order_by(nodes.c.cluster, nodes.c.alias, nodes.c.id)
        if cluster is not None:
            query = query.where(nodes.c.cluster == cluster)
        if cursor is not None:
            at_cluster, at_alias, at_id = _open_cursor(cursor, 3)
            query = query.where(
                or_(
                    nodes.c.cluster > at_cluster,
                    and_(nodes.c.cluster == at_cluster, nodes.c.alias > at_alias),
                    and_(nodes.c.cluster == at_cluster, nodes.c.alias == at_alias, nodes.c.id > at_id),
                )
            )
        return self._page(query, limit, self._node, lambda row: (row.cluster, row.alias, row.id))

    def node(self, name: str) -> dict[str, Any]:
        """One node by UUID, alias or cluster/alias. Raises PreconditionError node.not_found, ConfigError usage.invalid."""
        with self._store.read() as connection:
            return self._node(resolve_node(connection, name))

    def agents(self, *, limit: int = 100, cursor: str | None = None) -> Page:
        """Agents by name, with whether they are connected now."""
        query = select(agents).where(agents.c.kind == "agent").order_by(agents.c.name, agents.c.id)
        if cursor is not None:
            at_name, at_id = _open_cursor(cursor, 2)
            query = query.where(or_(agents.c.name > at_name, and_(agents.c.name == at_name, agents.c.id > at_id)))
        return self._page(query, limit, self._agent, lambda row: (row.name, row.id))

    def commands(
        self,
        *,
        limit: int = 100,
        cursor: str | None = None,
        node: str | None = None,
        state: str | None = None,
        open_only: bool = False,
    ) -> Page:
        """Commands, the newest first. Raises as `node`, and ConfigError usage.invalid for an unknown state."""
        query = select(commands, nodes.c.alias.label("node_alias"), nodes.c.cluster.label("node_cluster"))
        query = query.join(nodes, nodes.c.id == commands.c.node_id).order_by(commands.c.seq.desc())
        if node is not None:
            query = query.where(commands.c.node_id == self.node(node)["id"])
        if state is not None:
            if state not in set(State):
                raise ConfigError("usage.invalid", f"no state is called {state[:40]!r}", hint=f"one of {', '.join(State)}")
            query = query.where(commands.c.state == state)
        if open_only:
            query = query.where(commands.c.state.in_([one.value for one in OPEN_STATES]))
        if cursor is not None:
            query = query.where(commands.c.seq < int(_open_cursor(cursor, 1, numbered=True)[0]))
        return self._page(query, limit, _command, lambda row: (str(row.seq),))

    def command(self, command_id: str) -> dict[str, Any]:
        """One command; `late` says that the agent answered after the deadline. Raises PreconditionError command.not_found."""
        query = select(commands, nodes.c.alias.label("node_alias"), nodes.c.cluster.label("node_cluster"))
        with self._store.read() as connection:
            row = connection.execute(
                query.join(nodes, nodes.c.id == commands.c.node_id).where(commands.c.id == command_id)
            ).first()
            if row is None:
                raise PreconditionError(
                    "command.not_found", f"no command has the id {command_id[:40]!r}", hint="see `pgherd commands ls`"
                )
            return _command(row) | {"late": life_of(connection, row).late}

    def events(self, command_id: str) -> list[dict[str, Any]]:
        """A command's events in the agent's order. Raises PreconditionError command.not_found."""
        self.command(command_id)
        query = select(command_events).where(command_events.c.command_id == command_id).order_by(command_events.c.sequence)
        with self._store.read() as connection:
            return [dict(row._mapping) for row in connection.execute(query)]

    def backups(self, *, limit: int = 100, cursor: str | None = None, node: str | None = None) -> Page:
        """Backups, the newest first."""
        query = select(backups, nodes.c.alias.label("node_alias"), nodes.c.cluster.label("node_cluster"))
        query = query.join(nodes, nodes.c.id == backups.c.node_id)
        query = query.order_by(backups.c.started_unix_ns.desc(), backups.c.node_id, backups.c.name)
        if node is not None:
            query = query.where(backups.c.node_id == self.node(node)["id"])
        if cursor is not None:
            started, at_node, at_name = _open_cursor(cursor, 3, numbered=True)
            same = backups.c.started_unix_ns == int(started)
            query = query.where(
                or_(
                    backups.c.started_unix_ns < int(started),
                    and_(same, backups.c.node_id > at_node),
                    and_(same, backups.c.node_id == at_node, backups.c.name > at_name),
                )
            )
        return self._page(query, limit, _backup, lambda row: (str(row.started_unix_ns), row.node_id, row.name))

    def _page(
        self,
        query: Select[Any],
        limit: int,
        render: Callable[[Row[Any]], dict[str, Any]],
        position: Callable[[Row[Any]], Sequence[str]],
    ) -> Page:
        if not 1 <= limit <= PAGE_MAX:
            raise ConfigError("usage.invalid", f"limit must be between 1 and {PAGE_MAX}")
        with self._store.read() as connection:
            rows = connection.execute(query.limit(limit + 1)).all()
        more = len(rows) > limit
        return Page([render(row) for row in rows[:limit]], _make_cursor(position(rows[limit - 1])) if more else None)

    def _node(self, row: Row[Any]) -> dict[str, Any]:
        live = self._herd.heard(row.agent_id)
        report: NodeReport | None = next((one for one in live.nodes if one.id == row.id), None) if live else None
        return {
            "id": row.id,
            "alias": row.alias,
            "cluster": row.cluster,
            "agent_id": row.agent_id,
            "instance": row.instance,
            "system_identifier": row.system_identifier,
            "server_version_num": (report.server_version_num if report else 0) or row.server_version_num,
            "role": report.role if report else "unknown",
            "condition": report.condition if report else "unknown",
            "last_role": row.role,
            "last_condition": row.condition,
            "observed_unix_ns": live.heard_unix_ns if live and report else row.observed_unix_ns,
        }

    def _agent(self, row: Row[Any]) -> dict[str, Any]:
        live = self._herd.heard(row.id)
        fresh: Mapping[str, Any] = live.facts if live else {}
        shown = ("skew_ns", "round_trip_ns", "software_version", "protocol_version", "verbs_allowed")
        spool = ("spool_bytes", "spool_oldest_unix_ns")
        return {
            "id": row.id,
            "name": row.name,
            "status": row.status,
            "connected": live is not None,
            "labels": row.labels,
            "joined_unix_ns": row.joined_unix_ns,
            "revoked_unix_ns": row.revoked_unix_ns,
            "last_heartbeat_unix_ns": live.heard_unix_ns if live else row.last_heartbeat_unix_ns,
            **{name: fresh.get(name, getattr(row, name)) for name in (*shown, *spool)},
        }


def _command(row: Row[Any]) -> dict[str, Any]:
    return {
        "id": row.id,
        "node_id": row.node_id,
        "node": row.node_alias,
        "cluster": row.node_cluster,
        "agent_id": row.agent_id,
        "verb": row.verb,
        "arguments": row.arguments,
        "actor": row.actor,
        "via": row.via,
        "epoch": row.epoch,
        "state": row.state,
        "open": State(row.state) in OPEN_STATES,
        "issued_unix_ns": row.issued_unix_ns,
        "accept_deadline_unix_ns": row.accept_deadline_unix_ns,
        "offered_unix_ns": row.offered_unix_ns,
        "accepted_unix_ns": row.accepted_unix_ns,
        "finished_unix_ns": row.finished_unix_ns,
        "progress": row.progress,
        "result": row.result,
        "error": row.error,
    }


def _backup(row: Row[Any]) -> dict[str, Any]:
    members = {name: getattr(row, name) for name in backups.c.keys() if name != "node_id"}  # noqa: SIM118 - columns
    return {"node_id": row.node_id, "node": row.node_alias, "cluster": row.node_cluster, **members}


def _make_cursor(position: Sequence[str]) -> str:
    return base64.urlsafe_b64encode("\0".join(position).encode()).decode().rstrip("=")


def _open_cursor(cursor: str, parts: int, *, numbered: bool = False) -> list[str]:
    """The position in a cursor; `numbered` when its first part is a number.

    Raises ConfigError usage.invalid for anything that isn't a cursor of this listing.
    """
    try:
        position = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode().split("\0")
    except (binascii.Error, UnicodeDecodeError, ValueError):
        position = []
    is_numbered = bool(position) and _NUMBER.fullmatch(position[0]) is not None and int(position[0]) <= _NUMBER_MAX
    if len(position) != parts or (numbered and not is_numbered):
        raise ConfigError("usage.invalid", "not a cursor of this listing", hint="take next_cursor of the last page as it is")
    return position

"""What the agents say of themselves and their nodes: live in memory, kept in the control store in batches.

Silence isn't a state of PostgreSQL: a node whose agent hasn't been heard for three heartbeats is `unknown`,
whatever was last stored. One transaction per `flush` whatever the number of agents bounds the write rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, insert, select, update

from pgherd.collector.control.ledger import write_audit
from pgherd.collector.ingest.admit import Said
from pgherd.proto.clock import Clock
from pgherd.proto.commands import check_uuid
from pgherd.proto.control.v1 import control_pb2 as pb
from pgherd.proto.errors import DeniedError, PeerError
from pgherd.storage.control.schema import agents, nodes
from pgherd.storage.control.store import ControlStore

SILENT_AFTER_HEARTBEATS = 3
NODES_PER_AGENT_MAX = 64
_TEXT_MAX = 255

_ROLES = {pb.ROLE_PRIMARY: "primary", pb.ROLE_STANDBY: "standby"}
_CONDITIONS = {
    pb.CONDITION_UP: "up",
    pb.CONDITION_DOWN: "down",
    pb.CONDITION_SATURATED: "saturated",
    pb.CONDITION_AUTH_FAILED: "auth_failed",
    pb.CONDITION_HUNG: "hung",
}


@dataclass(frozen=True, slots=True)
class NodeReport:
    """One node as its agent sees it now."""

    id: str
    alias: str
    cluster: str
    system_identifier: str
    instance: str
    server_version_num: int
    role: str
    condition: str

    @classmethod
    def from_wire(cls, wire: pb.Node) -> NodeReport:
        """Raises PeerError peer.protocol. Values that this version doesn't know are `unknown`."""
        texts = (wire.alias, wire.cluster, wire.system_identifier, wire.instance)
        if not wire.alias or any(len(text) > _TEXT_MAX for text in texts):
            raise PeerError("peer.protocol", "a node without an alias or with an overlong name")
        return cls(
            check_uuid(wire.node_id, "node_id"),
            *texts,
            wire.server_version_num,
            _ROLES.get(wire.role, "unknown"),
            _CONDITIONS.get(wire.condition, "unknown"),
        )


def node_reports(wire: Sequence[pb.Node]) -> tuple[NodeReport, ...]:
    """Raises PeerError peer.protocol for too many nodes or a bad one."""
    if len(wire) > NODES_PER_AGENT_MAX:
        raise PeerError("peer.protocol", f"{len(wire)} nodes; an agent serves at most {NODES_PER_AGENT_MAX}")
    return tuple(NodeReport.from_wire(node) for node in wire)


@dataclass(slots=True)
class LiveAgent:
    """An agent with a session. `heard_mono_s` decides silence, `heard_unix_ns` is for showing."""

    heard_mono_s: float
    heard_unix_ns: int
    nodes: tuple[NodeReport, ...]
    facts: dict[str, Any]
    dirty: bool = False


class Herd:
    """Live agents over the control store. Methods that touch the store are synchronous: call them in a thread."""

    def __init__(self, store: ControlStore, clock: Clock, *, heartbeat_interval_s: float) -> None:
        self._store = store
        self._clock = clock
        self._silent_after_s = SILENT_AFTER_HEARTBEATS * heartbeat_interval_s
        self._live: dict[str, LiveAgent] = {}

    # ---- from sessions --------------------------------------------------------------------------

    def claim(self, agent_id: str, reports: Sequence[NodeReport], facts: Mapping[str, Any]) -> None:
        """Store what a hello says, atomically; then the agent's nodes are its own.

        Raises DeniedError identity.mismatch, audited, when a node, its name within the cluster or its instance belongs to
        another agent that isn't revoked, silent or not: who could take a silent one's names could end the alert about its
        silence. Raises DeniedError identity.missing when the store knows no such agent.
        """
        now_unix_ns = self._clock.wall_unix_ns()
        with self._store.begin() as connection:
            known = connection.execute(
                update(agents).where(agents.c.id == agent_id).values(last_heartbeat_unix_ns=now_unix_ns, **facts)
            )
            if not known.rowcount:
                raise DeniedError(
                    "identity.missing", "this collector knows no such agent", hint="join again", agent_id=agent_id
                )
            owners = _owners(connection, [report.id for report in reports])
            refusal = _refusal(connection, agent_id, reports, owners)
            if refusal is None:
                for report in reports:
                    _claim(connection, agent_id, report, owners.get(report.id), now_unix_ns)
            else:
                actor, subject, detail = (
                    f"agent:{agent_id}",
                    str(refusal.context["node_id"]),
                    {"owner": refusal.context["owner"]},
                )
                write_audit(connection, now_unix_ns, actor, "grpc", "node.claim_refused", subject, detail)
        if refusal is not None:
            raise refusal

    def arrive(self, agent_id: str, reports: tuple[NodeReport, ...], facts: Mapping[str, Any]) -> None:
        """A session began; its hello was claimed."""
        self._live[agent_id] = LiveAgent(self._clock.mono_s(), self._clock.wall_unix_ns(), reports, dict(facts), dirty=True)

    def heartbeat(self, agent_id: str, reports: tuple[NodeReport, ...], facts: Mapping[str, Any]) -> bool:
        """Take a heartbeat in; True when it names nodes, or nodes by names, that this session hasn't claimed."""
        live = self._live[agent_id]
        claimed = {_said(report) for report in live.nodes}
        if any(_said(report) not in claimed for report in reports):
            return True
        live.heard_mono_s, live.heard_unix_ns = self._clock.mono_s(), self._clock.wall_unix_ns()
        live.nodes = reports
        live.facts.update(facts)
        live.dirty = True
        return False

    def depart(self, agent_id: str) -> None:
        """The session ended; what it last said is stored by the caller's next `flush`, shown as unknown at once."""
        live = self._live.get(agent_id)
        if live is not None:
            live.heard_mono_s = float("-inf")
            live.dirty = True

    # ---- the store ------------------------------------------------------------------------------

    def flush(self) -> int:
        """Write what changed since the last time, in one transaction; returns the number of agents."""
        batch = [(agent_id, live) for agent_id, live in list(self._live.items()) if live.dirty]
        if not batch:
            return 0
        for _, live in batch:
            live.dirty = False
        try:
            with self._store.begin() as connection:
                for agent_id, live in batch:
                    _store_agent(connection, agent_id, live)
        except BaseException:
            for _, live in batch:
                live.dirty = True
            raise
        return len(batch)

    # ---- for showing ----------------------------------------------------------------------------

    def heard(self, agent_id: str) -> LiveAgent | None:
        """The agent, if it was heard within three heartbeats; None means unknown."""
        live = self._live.get(agent_id)
        if live is None or self._clock.mono_s() - live.heard_mono_s > self._silent_after_s:
            return None
        return live

    def owns(self, agent_id: str, said: Said) -> bool:
        """Whether a node is this agent's, as its hello claimed it now or ever, under names that aren't another's. Thread-safe.

        Names that hello didn't claim are an earlier configuration's, still in the spool: they pass unless they are
        another agent's now. Without a node id it is the agent that speaks, of itself.

        Raises TransientError store.unavailable.
        """
        live = self._live.get(agent_id)
        if live is not None and said in map(_said, live.nodes):
            return True
        with self._store.read() as connection:
            owner = select(nodes.c.agent_id).where(nodes.c.id == said.node_id)
            if said.node_id and connection.execute(owner).scalar() != agent_id:
                return False
            return _namesake(connection, agent_id, said) is None

    @property
    def connected(self) -> int:
        """How many agents were heard lately (for the collector's own metrics)."""
        return sum(1 for agent_id in list(self._live) if self.heard(agent_id) is not None)


def _owners(connection: Connection, ids: Sequence[str]) -> dict[str, tuple[str, str]]:
    query = select(nodes.c.id, nodes.c.agent_id, agents.c.status).join(agents, agents.c.id == nodes.c.agent_id)
    return {row.id: (row.agent_id, row.status) for row in connection.execute(query.where(nodes.c.id.in_(ids)))}


def _refusal(
    connection: Connection, agent_id: str, reports: Sequence[NodeReport], owners: Mapping[str, tuple[str, str]]
) -> DeniedError | None:
    """Why these nodes can't be this agent's; its context has the `node_id` and its `owner`."""
    for report in reports:
        owner, status = owners.get(report.id, (agent_id, ""))
        if owner != agent_id and status != "revoked":
            return DeniedError(
                "identity.mismatch",
                f"node {report.alias} ({report.id}) belongs to another agent",
                hint="a state directory was copied: remove nodes.json on the copy, or revoke the other agent",
                node_id=report.id,
                owner=owner,
            )
    for report in reports:
        if (other := _namesake(connection, agent_id, _said(report))) is not None:
            return DeniedError(
                "identity.mismatch",
                f"node {report.cluster}/{report.alias} at {report.instance or '(no instance)'} has a name of node"
                f" {other.cluster}/{other.alias} at {other.instance or '(no instance)'} of agent {other.agent}: if this host took"
                f" its place, `pgherd agents revoke {other.agent_id}`; else give this node an alias and an `instance` of its own",
                node_id=other.id,
                owner=other.agent_id,
            )
    return None


def _said(report: NodeReport) -> Said:
    return Said(report.id, report.cluster, report.alias, report.instance)


def _namesake(connection: Connection, agent_id: str, said: Said) -> Row[Any] | None:
    """The node of another agent, not revoked, that has this name or instance by what that agent said last.

    An agent's nodes are written with its heartbeat's time: one that is older isn't among those it names now.
    """
    same_name = (nodes.c.alias == said.node) & (nodes.c.cluster == said.cluster) & (said.node_id != "")
    same_instance = (nodes.c.instance == said.instance) & (said.instance != "")
    query = (
        select(nodes, agents.c.name.label("agent"))
        .join(agents, agents.c.id == nodes.c.agent_id)
        .where(nodes.c.agent_id != agent_id, agents.c.status != "revoked")
        .where(nodes.c.observed_unix_ns >= agents.c.last_heartbeat_unix_ns)
        .where(same_name | same_instance)
    )
    return connection.execute(query.limit(1)).first()


def _claim(connection: Connection, agent_id: str, report: NodeReport, owner: tuple[str, str] | None, now_unix_ns: int) -> None:
    values = _node_values(report, now_unix_ns)
    if owner is None:
        connection.execute(insert(nodes).values(id=report.id, agent_id=agent_id, first_seen_unix_ns=now_unix_ns, **values))
        return
    if owner[0] != agent_id:
        detail = {"from": owner[0]}
        write_audit(connection, now_unix_ns, f"agent:{agent_id}", "grpc", "node.taken_over", report.id, detail)
    connection.execute(update(nodes).where(nodes.c.id == report.id).values(agent_id=agent_id, **values))


def _node_values(report: NodeReport, observed_unix_ns: int) -> dict[str, Any]:
    """A value that the agent can't see now doesn't erase what was known: version, identifier, address."""
    values: dict[str, Any] = {
        "alias": report.alias,
        "cluster": report.cluster,
        "role": report.role,
        "condition": report.condition,
        "observed_unix_ns": observed_unix_ns,
    }
    if report.system_identifier:
        values["system_identifier"] = report.system_identifier
    if report.instance:
        values["instance"] = report.instance
    if report.server_version_num:
        values["server_version_num"] = report.server_version_num
    return values


def _store_agent(connection: Connection, agent_id: str, live: LiveAgent) -> None:
    connection.execute(
        update(agents).where(agents.c.id == agent_id).values(last_heartbeat_unix_ns=live.heard_unix_ns, **live.facts)
    )
    for report in live.nodes:
        mine = (nodes.c.id == report.id) & (nodes.c.agent_id == agent_id)
        connection.execute(update(nodes).where(mine).values(**_node_values(report, live.heard_unix_ns)))

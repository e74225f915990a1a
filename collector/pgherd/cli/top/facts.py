"""One look at the collector: everything that a page of `pgherd top` is made of, in a handful of requests."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pgherd.cli.client import Client
from pgherd.cli.top.questions import FLEET, NODE, Row, Subject, rows_of, union
from pgherd.proto.errors import PgherdError, PreconditionError

_BACKUPS_MAX = 8
_ALERTS_MAX = 2000
_NODES_MAX = 5000


@dataclass(frozen=True, slots=True)
class Facts:
    """What the collector said. `rows` are the answers by question; `problems` names the questions it couldn't answer."""

    taken_unix_ns: int
    nodes: Sequence[Mapping[str, Any]]
    alerts: Sequence[Mapping[str, Any]]
    rows: Mapping[str, Sequence[Row]]
    backups: Sequence[Mapping[str, Any]] = ()
    problems: Sequence[str] = field(default=())

    def of(self, question: str, node: Mapping[str, Any]) -> list[Row]:
        """The rows of one question about one node."""
        return [
            row
            for row in self.rows.get(question, ())
            if row.labels.get("node") == node["alias"] and row.labels.get("cluster", "") == node["cluster"]
        ]


def look_at_herd(client: Client) -> Facts:
    """All nodes. Raises PgherdError when the collector can't be asked at all."""
    nodes = list(client.pages("/api/v1/nodes", {"limit": 1000}, items_max=_NODES_MAX))
    return _look(client, nodes, FLEET, Subject())


def look_at_node(client: Client, name: str) -> Facts:
    """One node, by alias, cluster/alias or id. Raises PreconditionError node.not_found, and as `look_at_herd`."""
    nodes = [
        node
        for node in client.pages("/api/v1/nodes", {"limit": 1000}, items_max=_NODES_MAX)
        if name in (node["alias"], node["id"], f"{node['cluster']}/{node['alias']}")
    ]
    if len(nodes) != 1:
        what = f"several nodes are called {name!r}" if nodes else f"no node is called {name!r}"
        hint = "name it CLUSTER/NODE" if nodes else "see `pgherd nodes ls`"
        raise PreconditionError("node.not_found", what, hint=hint)
    node = nodes[0]
    backups = list(itertools.islice(client.pages("/api/v1/backups", {"node": node["id"], "limit": _BACKUPS_MAX}), _BACKUPS_MAX))
    return _look(client, nodes, NODE, Subject(node["alias"], node["cluster"]), backups)


def _look(
    client: Client,
    nodes: Sequence[Mapping[str, Any]],
    questions: Mapping[str, str],
    subject: Subject,
    backups: Sequence[Mapping[str, Any]] = (),
) -> Facts:
    taken_unix_ns = time.time_ns()
    alerts = list(client.pages("/api/v1/alerts", {"limit": 1000}, items_max=_ALERTS_MAX))
    try:
        answer = client.get("/prometheus/api/v1/query", {"query": union(questions, subject)})
        rows, problems = rows_of(answer["data"]["result"]), []
    except PgherdError as error:
        if error.code == "peer.unreachable":
            raise
        rows, problems = {}, [f"the collector can't answer queries now: {error.message}"]
    return Facts(taken_unix_ns, nodes, alerts, rows, backups, problems)

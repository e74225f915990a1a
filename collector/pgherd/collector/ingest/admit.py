"""What may enter the store, and from whom. Pure.

Never broken:
- a sample of a node is admitted only from the agent that owns the node, under that agent's certificate, and under no
  name (cluster and node, or instance) of another agent's node;
- job="pgherd", cluster and node can't be claimed by a foreign client;
- accepted + rejected points = points sent, and every rejected point has a reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pgherd.proto.errors import DeniedError

AGENT_KIND = "agent"
PGHERD_JOB = "pgherd"


class Peer(Protocol):
    """Who sent the request, by its certificate (pgherd.collector.identity.peer.Peer satisfies this)."""

    @property
    def kind(self) -> str:
        """`agent` or `client`."""
        ...

    @property
    def id(self) -> str:
        """The UUID in its certificate."""
        ...


class Reason(StrEnum):
    """Why a point was rejected; the label of the counter and part of the answer."""

    FUTURE = "timestamp too far in the future"
    PAST = "timestamp too old"
    TEMPORALITY = "aggregation temporality isn't stated"
    DELTA = "delta of a sum that isn't monotonic; export cumulative"
    BUCKETS = "buckets and bounds don't fit, or are too many"
    NO_VALUE = "data point without a value"
    NAME = "metric name is empty or invalid"
    LABELS = "label invalid, too long, or too many labels"
    SERIES_SHARE = "the sender's share of series is used up"
    SERIES_MAX = "the store's limit of series is reached"


@dataclass(frozen=True, slots=True)
class AdmitLimits:
    """Bounds of one request and of its points."""

    request_bytes_max: int = 4 * 1024 * 1024
    points_max: int = 200_000
    containers_max: int = 50_000  # resources, scopes and metrics: each costs as much as a point, and may hold none
    labels_max: int = 64
    buckets_max: int = 512  # of one histogram or summary
    name_chars_max: int = 256
    label_value_chars_max: int = 4096
    future_max_s: float = 600.0
    past_max_s: float = 7 * 86400.0


@dataclass(frozen=True, slots=True)
class Said:
    """What a resource, or a hello, says of whom it speaks: the node and the labels by which rules know it."""

    node_id: str
    cluster: str = ""
    node: str = ""
    instance: str = ""


@dataclass(frozen=True, slots=True)
class Claim:
    """What a resource says it is; empty when it doesn't say."""

    agent_id: str
    said: Said
    job: str


# Whether an agent may speak of a node, or of itself, under these labels.
Owns = Callable[[str, Said], bool]


def check_claims(peer: Peer, claims: Iterable[Claim], owns: Owns) -> None:
    """Refuse a request of which any resource isn't the peer's to speak for.

    Raises DeniedError identity.mismatch.
    """
    for claim in claims:
        if peer.kind == AGENT_KIND:
            if claim.agent_id != peer.id:
                raise _mismatch(f"a resource names agent {claim.agent_id or '(none)'}", peer)
            said = claim.said
            if (said.node_id or said.instance) and not owns(peer.id, said):
                names = f"{said.cluster}/{said.node} at {said.instance or '(no instance)'}"
                raise _mismatch(
                    f"a resource names node {said.node_id or '(none)'} {names}: it or its name isn't this agent's", peer
                )
        elif claim.agent_id or claim.said.node_id or claim.job == PGHERD_JOB:
            raise _mismatch("a client's resource claims to be a pgherd agent or node", peer)


def _mismatch(what: str, peer: Peer) -> DeniedError:
    return DeniedError(
        "identity.mismatch", f"{what}; the certificate is of {peer.kind} {peer.id}",
        hint="check the sender's pgherd.agent.id and pgherd.node.id, and that no other agent has a node of that name", peer_id=peer.id,
    )  # fmt: skip


def admit_times(
    times_ns: NDArray[np.uint64], ordinals: NDArray[np.int32], nows_unix_ns: tuple[int, ...], limits: AdmitLimits
) -> tuple[NDArray[np.bool_] | None, Counter[Reason]]:
    """Which samples lie within the stated bounds of the collector's clock; None means all of them.

    What is refused here is lost for good, so after a step of that clock both times count: what it says, and what it would
    say without the step. Counted are the data points that the samples are from: `ordinals`, ascending.
    """
    newest = np.uint64(max(0, max(nows_unix_ns) + int(limits.future_max_s * 1e9)))
    oldest = np.uint64(max(0, min(nows_unix_ns) - int(limits.past_max_s * 1e9)))
    future, past = times_ns > newest, times_ns < oldest
    rejected: Counter[Reason] = Counter()
    if not (future.any() or past.any()):
        return None, rejected
    rejected[Reason.FUTURE], rejected[Reason.PAST] = points_among(ordinals[future]), points_among(ordinals[past])
    return ~(future | past), +rejected


def points_among(ordinals: NDArray[np.int32]) -> int:
    """How many data points samples with these ordinals, ascending, are from."""
    return int(np.count_nonzero(np.diff(ordinals))) + 1 if len(ordinals) else 0


def describe(rejected: Mapping[Reason, int]) -> str:
    """One line for partial_success.error_message."""
    return "; ".join(f"{count} × {reason}" for reason, count in sorted(rejected.items()))

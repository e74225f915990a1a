"""Lag as series: reads the live tier's samples from the series store, judges, writes what it knows.

    pgherd_replication_lag_seconds           behind the primary beyond recovery_min_apply_delay; absent when unknown
    pgherd_replication_lag_bytes             WAL that the primary has written and this standby hasn't replayed; the same
    pgherd_replication_lag_unknown{reason}   1 while the lag can't be told
    pgherd_replication_lag_at_least_seconds  a proven lower bound while it is unknown
    pgherd_replication_broken                1 while an expected standby doesn't stream, idle or not; absent when unknown
    pgherd_cluster_primaries{cluster}        reachable nodes that take writes; absent until a primary was seen, and while one may live

with job="pgherd" and the node's instance, cluster and node. A lag is stamped with the time of the standby's sample that it
was read from, everything else with the collector's. Nothing but the series store remembers: after a restart the history is
read from the last hours of samples, and a standby that was expected is expected again. What agents deliver late fills holes
of the history; a lag that was written (or wasn't) is not rewritten.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast

import numpy as np
from sqlalchemy import Connection, select

from pgherd.collector.replication.history import SHARE
from pgherd.collector.replication.lag import DEAF_AFTER_S, ClusterLag, Hold, Known, Name, Observation, Reason, Unknown
from pgherd.proto.clock import Clock
from pgherd.proto.errors import PgherdError
from pgherd.proto.samples import STALE_NAN, Metric, MetricKind
from pgherd.proto.selectors import NAME_LABEL, Matcher, MatchOp
from pgherd.runtime.logging import get_logger
from pgherd.storage.control.schema import agents, nodes
from pgherd.storage.control.store import ControlStore
from pgherd.storage.series.batch import Batch, Labels, Window, labels_of, layout_of

LAG_SECONDS = Metric(
    "pgherd_replication_lag_seconds", MetricKind.GAUGE,
    "Lag behind the primary beyond recovery_min_apply_delay, by the primary's own positions; no sample when unknown", "s",
)  # fmt: skip
LAG_BYTES = Metric(
    "pgherd_replication_lag_bytes", MetricKind.GAUGE, "WAL the primary has written and this standby hasn't replayed", "By"
)
LAG_UNKNOWN = Metric("pgherd_replication_lag_unknown", MetricKind.GAUGE, "1 while the lag can't be told, with the reason")
LAG_AT_LEAST = Metric(
    "pgherd_replication_lag_at_least_seconds", MetricKind.GAUGE, "Proven lower bound of a lag that is unknown", "s"
)
BROKEN = Metric("pgherd_replication_broken", MetricKind.GAUGE, "1 while an expected standby doesn't stream, idle or not")
PRIMARIES = Metric("pgherd_cluster_primaries", MetricKind.GAUGE, "Reachable nodes of the cluster that take writes")
_METRICS = (LAG_SECONDS, LAG_BYTES, LAG_UNKNOWN, LAG_AT_LEAST, BROKEN, PRIMARIES)

# What one tick of the live tier says of a node.
_POSITION = "pgherd_wal_position_bytes"
_FINISHED = "pgherd_transactions_finished"
_IS_REPLICA = "pg_replication_is_replica"
_TIMELINE = "pgherd_timeline"
_STREAMING = "pgherd_wal_receiver_streaming"
_HEARD_AGE = "pgherd_wal_receiver_heard_age_seconds"
_DELAY = "pgherd_recovery_min_apply_delay_seconds"
_TICK = (_POSITION, _FINISHED, _IS_REPLICA, _TIMELINE, _STREAMING, _HEARD_AGE, _DELAY)
_RECEIVER_TIMEOUT = "pg_settings_wal_receiver_timeout_seconds"

SKEW_MAX_S = 60.0  # beyond it an agent's samples aren't used: every read would have to look that far back

_WINDOW_S = 15.0  # what a turn looks through for ticks it hasn't taken in
_FUTURE_MS = 5_000  # a tick further ahead of the corrected clock isn't believed
_LOOKBACK_MS = 300_000  # Prometheus' own: for so long a value without a successor stands
_SETTINGS_EVERY_S = 60.0
_HOLE_MS = 5_000
_HOLE_LOOKS_S = (0.0, 60.0)  # an agent delivers the past before the present; the second look is for one that didn't
_HOLES_MAX = 1_000
_REBUILD_S = 6 * 3600.0  # what a start reads of the past
_REBUILD_CHUNK_S = 600.0
_START_S = 60.0
_APPEND_TIMEOUT_S = 30.0
_LAG_GROUP, _BROKEN_GROUP, _COUNT_GROUP = "lag", "broken", "primaries"

_log = get_logger(__name__)


class Report(Protocol):
    """A node as its agent sees it now (pgherd.collector.control.herd.NodeReport)."""

    @property
    def id(self) -> str: ...

    @property
    def condition(self) -> str: ...


class Heard(Protocol):
    """An agent that was heard lately (pgherd.collector.control.herd.LiveAgent)."""

    @property
    def nodes(self) -> Sequence[Report]: ...

    @property
    def facts(self) -> Mapping[str, Any]: ...


class Herd(Protocol):
    """Who is heard (pgherd.collector.control.herd.Herd)."""

    def heard(self, agent_id: str, /) -> Heard | None:
        """None when the agent is silent."""
        ...


class Series(Protocol):
    """The store of samples (pgherd.storage.series.store.SeriesStore)."""

    def select(self, matchers: Sequence[Matcher], start_ms: int, end_ms: int, /) -> list[Window]: ...

    def append(self, batch: Batch, /) -> Future[Any]: ...


@dataclass(frozen=True, slots=True)
class Member:
    """A node of the herd: how its series are labelled, where it belongs, how its agent's clock stands."""

    labels: Labels
    cluster: tuple[str, str]  # label and system identifier
    condition: str | None  # what its agent says of it; None while the agent is silent
    skew_ms: int  # the collector's clock minus the agent's


def members(connection: Connection, herd: Herd) -> list[Member]:
    """Every node whose agent may speak. A node that hasn't told its system identifier yet is of its label's only one."""
    rows = connection.execute(
        select(nodes.c.id, nodes.c.alias, nodes.c.cluster, nodes.c.instance, nodes.c.system_identifier)
        .add_columns(agents.c.id.label("agent_id"), agents.c.skew_ns)
        .join(agents, agents.c.id == nodes.c.agent_id)
        .where(agents.c.status != "revoked")
    ).all()
    identifiers: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row.system_identifier:
            identifiers[row.cluster].add(row.system_identifier)
    found = []
    for row in rows:
        live = herd.heard(row.agent_id)
        only = next(iter(identifiers[row.cluster])) if len(identifiers[row.cluster]) == 1 else ""
        skew_ns = (live.facts.get("skew_ns") if live is not None else None) or row.skew_ns or 0
        found.append(
            Member(
                labels=_node_labels({"instance": row.instance or "", "cluster": row.cluster, "node": row.alias}),
                cluster=(row.cluster, row.system_identifier or only),
                condition=next((report.condition for report in live.nodes if report.id == row.id), None) if live else None,
                skew_ms=round(skew_ns / 1e6),
            )
        )
    return found


def _node_labels(labels: Mapping[str, str]) -> Labels:
    return labels_of({"job": "pgherd", **{name: labels.get(name, "") for name in ("instance", "cluster", "node")}})


@dataclass(frozen=True, slots=True)
class _Hole:
    """A stretch of a node's time that was jumped over, to be read again: its samples may have come late."""

    due_mono_s: float
    node: Labels
    start_ms: int  # both by the agent's clock
    end_ms: int


_Said: TypeAlias = dict[Labels, tuple[int, float]]  # series → stamp and value
_Group: TypeAlias = tuple[str, Labels]  # what is said together about a node or a cluster


class LagSeries:
    """Judges and writes every `interval_s`."""

    def __init__(self, store: ControlStore, herd: Herd, series: Series, clock: Clock, *, interval_s: float = 2.0) -> None:
        self._store = store
        self._herd = herd
        self._series = series
        self._clock = clock
        self._interval_s = interval_s
        self._started_mono_s = clock.mono_s()
        self._is_rebuilt = False
        self._clusters: dict[tuple[str, str], ClusterLag] = {}
        self._read_ms: dict[Labels, int] = {}  # by node: its newest tick that was taken in, by its agent's clock
        self._deaf_after_s: dict[Labels, float] = {}
        self._settings_due_mono_s = 0.0
        self._holes: list[_Hole] = []
        self._standing: dict[_Group, dict[Labels, int]] = {}  # series that have a value, with its stamp

    async def run(self) -> None:
        """Judge and write until cancelled. A turn that fails is a gap, and the next is tried."""
        while True:
            try:
                await self.write()
            except (PgherdError, TimeoutError) as error:
                _log.warning("replication.lag_not_written", error=str(error))
            await asyncio.sleep(self._interval_s)

    async def write(self) -> int:
        """One turn, durable when it returns; the number of samples. Raises PgherdError, TimeoutError."""
        said = await asyncio.to_thread(self.turn)
        batch, standing = _batch(self._standing, said)
        if batch.points:
            await asyncio.wait_for(asyncio.wrap_future(self._series.append(batch)), _APPEND_TIMEOUT_S)
        self._standing = standing
        return batch.points

    def turn(self) -> dict[_Group, _Said | None]:
        """Read what is new and say what is known now, by group; None: what was said last stands. Blocking."""
        now_ms = self._clock.wall_unix_ns() // 1_000_000
        with self._store.read() as connection:
            herd = {member.labels: member for member in members(connection, self._herd)}
        self._settle(herd)
        if not self._is_rebuilt:
            self._rebuild(herd, now_ms)
            self._is_rebuilt = True
        if self._clock.mono_s() >= self._settings_due_mono_s:
            self._read_settings(now_ms)
            self._settings_due_mono_s = self._clock.mono_s() + _SETTINGS_EVERY_S
        self._read(herd, now_ms)
        self._fill_holes(herd)
        return {**self._judge(herd, now_ms), **self._count(herd, now_ms)}

    def _settle(self, herd: Mapping[Labels, Member]) -> None:
        """Every node in its cluster, and no node that has left."""
        nodes_of: dict[tuple[str, str], list[Labels]] = defaultdict(list)
        for member in herd.values():
            nodes_of[member.cluster].append(member.labels)
        self._clusters = {key: self._clusters.get(key) or ClusterLag() for key in nodes_of}
        for key, cluster in self._clusters.items():
            cluster.forget(keep=nodes_of[key])
        for known in (self._read_ms, self._deaf_after_s):
            for labels in known.keys() - herd.keys():
                del known[labels]

    # ---- reading

    def _read(self, herd: Mapping[Labels, Member], now_ms: int) -> None:
        skews_ms = [member.skew_ms for member in herd.values() if _is_usable(member)]
        start_ms = now_ms - int(_WINDOW_S * 1000) - max([0, *skews_ms])
        end_ms = now_ms + _FUTURE_MS - min([0, *skews_ms])
        ticks: dict[tuple[Labels, int], dict[str, float]] = defaultdict(dict)
        for window in self._series.select([Matcher(NAME_LABEL, MatchOp.REGEX, "|".join(_TICK))], start_ms, end_ms):
            node = _node_labels(window.labels)
            if window.labels.get("job") != "pgherd" or node not in herd:
                continue
            begin = int(np.searchsorted(window.times_ms, self._read_ms.get(node, -1), side="right"))
            field = window.labels[NAME_LABEL] + window.labels.get("position", "")
            for at_ms, value in zip(window.times_ms[begin:].tolist(), window.values[begin:].tolist(), strict=True):
                ticks[node, at_ms][field] = value
        seen = [(at_ms + herd[node].skew_ms, node, at_ms, tick) for (node, at_ms), tick in ticks.items() if _IS_REPLICA in tick]
        for corrected_ms, node, at_ms, tick in sorted(seen, key=lambda one: one[0]):
            member = herd[node]
            if not _is_usable(member) or corrected_ms > now_ms + _FUTURE_MS:
                continue
            cluster = self._clusters[member.cluster]
            if math.isnan(tick[_IS_REPLICA]):
                cluster.lose(node, corrected_ms)
                continue
            observation = _observation(node, corrected_ms, tick)
            if observation is None:
                continue
            before_ms = self._read_ms.get(node)
            if before_ms is not None and at_ms - before_ms > _HOLE_MS:
                now_mono_s = self._clock.mono_s()
                self._holes += [_Hole(now_mono_s + later_s, node, before_ms + 1, at_ms - 1) for later_s in _HOLE_LOOKS_S]
            self._read_ms[node] = at_ms
            cluster.observe(observation)

    def _read_settings(self, now_ms: int) -> None:
        """How long a live receiver may hear nothing: it asks after half of wal_receiver_timeout."""
        for window in self._series.select([_named(_RECEIVER_TIMEOUT)], now_ms - _LOOKBACK_MS, now_ms + _FUTURE_MS):
            timeout_s = float(window.values[-1])
            if not math.isnan(timeout_s):
                self._deaf_after_s[_node_labels(window.labels)] = timeout_s / 2 + 5 if timeout_s > 0 else math.inf

    def _written(self, start_ms: int, end_ms: int, *more: Matcher) -> list[tuple[Labels, Window, dict[int, float]]]:
        """What primaries said: node, positions, and transactions finished by time."""
        finished = {
            _node_labels(window.labels): dict(zip(window.times_ms.tolist(), window.values.tolist(), strict=True))
            for window in self._series.select([_named(_FINISHED), *more], start_ms, end_ms)
        }
        positions = [_named(_POSITION), Matcher("position", MatchOp.EQUAL, "flush"), *more]
        windows = [(_node_labels(window.labels), window) for window in self._series.select(positions, start_ms, end_ms)]
        return [(node, window, finished.get(node, {})) for node, window in windows]

    def _fill_holes(self, herd: Mapping[Labels, Member]) -> None:
        due = [hole for hole in self._holes if hole.due_mono_s <= self._clock.mono_s()]
        self._holes = [hole for hole in self._holes if hole not in due][-_HOLES_MAX:]
        for hole in due:
            member = herd.get(hole.node)
            if member is None:
                continue
            only = [Matcher(name, MatchOp.EQUAL, value) for name, value in hole.node]
            start_ms = max(hole.start_ms, hole.end_ms - int(_REBUILD_S * 1000))
            for _, window, finished in self._written(start_ms, hole.end_ms, *only):
                for observation in _primary_observations(member, window, finished):
                    self._clusters[member.cluster].backfill(observation)

    def _rebuild(self, herd: Mapping[Labels, Member], now_ms: int) -> None:
        """What an earlier process knew, from what it and the agents wrote."""
        delays_ms: dict[tuple[str, str], float] = defaultdict(float)
        for window in self._series.select([_named(_DELAY)], now_ms - _LOOKBACK_MS, now_ms + _FUTURE_MS):
            if (member := herd.get(_node_labels(window.labels))) is not None and not math.isnan(window.values[-1]):
                delays_ms[member.cluster] = max(delays_ms[member.cluster], float(window.values[-1]) * 1000)
        end_ms = now_ms - int(_WINDOW_S * 1000)
        start_ms = now_ms - int(_REBUILD_S * 1000)
        while start_ms < end_ms:
            until_ms = min(start_ms + int(_REBUILD_CHUNK_S * 1000), end_ms)
            seen: list[Observation] = []
            for node, window, finished in self._written(start_ms, until_ms - 1):
                member = herd.get(node)
                if member is not None and _is_usable(member):
                    age_ms = max(0.0, now_ms - until_ms - delays_ms[member.cluster])
                    seen += _primary_observations(member, window, finished, apart_ms=int(SHARE / 2 * age_ms))
            for observation in sorted(seen, key=lambda one: one.at_ms):
                self._clusters[herd[cast("Labels", observation.node)].cluster].observe(observation)
            start_ms = until_ms
        self._remember(herd, now_ms)

    def _remember(self, herd: Mapping[Labels, Member], now_ms: int) -> None:
        """Which standbys were expected, and which of our series still have a value that has to be ended some day."""
        for window in self._series.select([_named(BROKEN.name)], now_ms - int(_REBUILD_S * 1000), now_ms):
            node, times_ms = _node_labels(window.labels), window.times_ms[~np.isnan(window.values)]
            if node in herd and len(times_ms):
                self._clusters[herd[node].cluster].remember_standby(node, int(times_ms[-1]))
        names = "|".join(metric.name for metric in _METRICS)
        for window in self._series.select(
            [Matcher(NAME_LABEL, MatchOp.REGEX, names)], now_ms - _LOOKBACK_MS, now_ms + _FUTURE_MS
        ):
            if not math.isnan(window.values[-1]):
                group = _group(window.labels[NAME_LABEL], window.labels)
                self._standing.setdefault(group, {})[labels_of(window.labels)] = int(window.times_ms[-1])

    # ---- saying

    def _judge(self, herd: Mapping[Labels, Member], now_ms: int) -> dict[_Group, _Said | None]:
        said: dict[_Group, _Said | None] = {}
        for cluster in self._clusters.values():
            for node in cast("list[Labels]", cluster.standbys()):
                member = herd[node]
                said[_LAG_GROUP, node] = self._say_lag(cluster, member, now_ms)
                deaf_after_s = self._deaf_after_s.get(node, DEAF_AFTER_S)
                broken = cluster.broken(node, now_ms, member.condition, deaf_after_s)
                said[_BROKEN_GROUP, node] = {} if broken is None else {_series(BROKEN, node): (now_ms, float(broken))}
        return said

    def _say_lag(self, cluster: ClusterLag, member: Member, now_ms: int) -> _Said | None:
        node = member.labels
        verdict = cluster.judge(node, now_ms) if _is_usable(member) else Unknown(Reason.CLOCK_SKEW)
        match verdict:
            case Hold():
                return None
            case Known(at_ms, seconds, wal_bytes):
                stamp_ms = at_ms - member.skew_ms
                return {_series(LAG_SECONDS, node): (stamp_ms, seconds), _series(LAG_BYTES, node): (stamp_ms, float(wal_bytes))}
            case Unknown(reason, at_least_s):
                said = {_series(LAG_UNKNOWN, node, reason=reason): (now_ms, 1.0)}
                if at_least_s is not None:
                    said[_series(LAG_AT_LEAST, node)] = (now_ms, at_least_s)
                return said

    def _count(self, herd: Mapping[Labels, Member], now_ms: int) -> dict[_Group, _Said | None]:
        said: dict[_Group, _Said | None] = {}
        conditions: dict[Name, str | None] = {node: member.condition for node, member in herd.items()}
        up_s = self._clock.mono_s() - self._started_mono_s
        labels = Counter(label for label, _ in self._clusters)
        for (label, identifier), cluster in self._clusters.items():
            if cluster.primary_seen_ms is None:
                continue
            # Two clusters under one label are a mistake of the configuration; theirs aren't added up.
            more = {"system_identifier": identifier} if labels[label] > 1 else {}
            count = cluster.known_primaries(now_ms, conditions)
            series = _series(PRIMARIES, labels_of({"job": "pgherd", "cluster": label, **more}))
            # Agents need a moment to find a collector that has just started: a primary it hasn't seen itself isn't missed yet.
            is_awaited = up_s < _START_S and cluster.primary_seen_ms <= now_ms - int(up_s * 1000)
            if count is None or (count == 0 and is_awaited):
                said[_COUNT_GROUP, series] = None if is_awaited else {}
            else:
                said[_COUNT_GROUP, series] = {series: (now_ms, float(count))}
        return said


def _batch(
    standing: Mapping[_Group, Mapping[Labels, int]], said: Mapping[_Group, _Said | None]
) -> tuple[Batch, dict[_Group, dict[Labels, int]]]:
    """What was said and a staleness marker for every series that had a value and has none; and what has one now."""
    points: _Said = {}
    after: dict[_Group, dict[Labels, int]] = {}
    for group in standing.keys() | said.keys():
        before, new = standing.get(group, {}), said.get(group, {})
        if new is None:
            after[group] = dict(before)
            continue
        after[group] = {series: stamp_ms for series, (stamp_ms, _) in new.items()}
        points.update(new)
        for series in before.keys() - new.keys():
            # Right behind the last value: nothing is known from there on, and the next value may be stamped before now.
            points[series] = (before[series] + 1, STALE_NAN)
    labels = list(points)
    batch = Batch(
        layout=layout_of((dict(series) for series in labels), _METRICS),
        series=np.arange(len(labels), dtype=np.int32),
        times_ms=np.array([points[series][0] for series in labels], dtype=np.int64),
        values=np.array([points[series][1] for series in labels], dtype=np.float64),
    )
    return batch, {group: series for group, series in after.items() if series}


def _observation(node: Labels, at_ms: int, tick: Mapping[str, float]) -> Observation | None:
    """None for a tick without positions: another tier's."""
    told = {field: value for field, value in tick.items() if not math.isnan(value)}

    def whole(field: str) -> int | None:
        return int(told[field]) if field in told else None

    if not any(field.startswith(_POSITION) for field in told):
        return None
    return Observation(
        node=node,
        at_ms=at_ms,
        is_replica=told[_IS_REPLICA] != 0,
        timeline=whole(_TIMELINE),
        written=whole(_POSITION + "flush"),
        finished=whole(_FINISHED),
        replayed=whole(_POSITION + "replay"),
        delay_s=told.get(_DELAY, 0.0),
        streaming=told[_STREAMING] != 0 if _STREAMING in told else None,
        heard_age_s=told.get(_HEARD_AGE),
    )


def _primary_observations(
    member: Member, window: Window, finished: Mapping[int, float], apart_ms: int = 0
) -> Iterator[Observation]:
    """What a primary's stored positions say; of samples less than `apart_ms` apart only one."""
    next_ms = -1
    for at_ms, value in zip(window.times_ms.tolist(), window.values.tolist(), strict=True):
        if at_ms >= next_ms and not math.isnan(value):
            next_ms = at_ms + apart_ms
            ended = finished.get(at_ms, math.nan)
            yield Observation(
                node=member.labels,
                at_ms=at_ms + member.skew_ms,
                is_replica=False,
                written=int(value),
                finished=None if math.isnan(ended) else int(ended),
            )


def _is_usable(member: Member) -> bool:
    return abs(member.skew_ms) <= SKEW_MAX_S * 1000


def _named(name: str) -> Matcher:
    return Matcher(NAME_LABEL, MatchOp.EQUAL, name)


def _series(metric: Metric, labels: Labels, **more: str) -> Labels:
    return labels_of({NAME_LABEL: metric.name, **dict(labels), **more})


def _group(name: str, labels: Mapping[str, str]) -> _Group:
    """The group that a series of ours belongs to."""
    if name == PRIMARIES.name:
        return _COUNT_GROUP, labels_of(labels)
    return (_BROKEN_GROUP if name == BROKEN.name else _LAG_GROUP), _node_labels(labels)

"""Replication lag on real clusters beside a truth that doesn't look at positions.

A writer commits numbered beats on the primary and notes when; a standby that shows beat n at some moment is behind by that
moment minus the time of beat n + 1, if that was committed at all. `Watch` samples every server once a second as the agent's
live tier does, stores the samples in a real series store, lets the collector's LagSeries judge them, and notes the truth and
what others say at the same ticks.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from psycopg.rows import dict_row

from pgherd.agent.probes.catalog import Probe, load_catalog
from pgherd.agent.probes.rows import samples_of
from pgherd.collector.control.herd import Herd, NodeReport
from pgherd.collector.replication.series import LagSeries
from pgherd.proto.samples import STALE_NAN, Sample
from pgherd.proto.selectors import Matcher, MatchOp
from pgherd.runtime.clock import SystemClock
from pgherd.storage.control.store import ControlStore
from pgherd.storage.series.batch import Batch, layout_of
from pgherd.storage.series.store import SeriesSettings, SeriesStore
from support.control import enrol
from support.link import Link
from support.postgres import Fleet, Server
from support.waiting import wait_until

TICK_S = 1.0
CLUSTER = "herd"

# What an exporter says on a standby, what the upstream's own view says, and the truth.
_BESIDE = """
SELECT CASE WHEN NOT pg_is_in_recovery() OR pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn() THEN 0
            ELSE extract(epoch FROM now() - pg_last_xact_replay_timestamp())::float8 END AS exporter,
       (SELECT number FROM beats) AS beat,
       (SELECT max(extract(epoch FROM replay_lag))::float8 FROM pg_stat_replication) AS senders_replay_lag
"""


@functools.cache
def live_probe(major: int) -> Probe:
    """What the agent asks every second."""
    return next(probe for probe in load_catalog().for_major(major) if probe.name == "live")


@dataclass(frozen=True, slots=True)
class Reading:
    """What was true and what was said of one standby at one of its ticks. None: nothing was said, or (truth) not measured."""

    phase: str
    node: str
    at_ms: int
    truth_s: float | None
    exporter_s: float | None
    sender_s: float | None  # pg_stat_replication.replay_lag as its upstream shows it
    ours_s: float | None = None
    wal_bytes: float | None = None
    unknown: str | None = None
    at_least_s: float | None = None
    broken: float | None = None

    @property
    def error_s(self) -> float | None:
        return None if self.ours_s is None or self.truth_s is None else abs(self.ours_s - self.truth_s)

    @property
    def is_within_promise(self) -> bool:
        """error <= max(1 s, 10 %)"""
        return self.error_s is None or self.truth_s is None or self.error_s <= max(1.0, 0.1 * self.truth_s)


class Beats:
    """The writer of beats: `running` or paused, optionally with bulk WAL beside every beat."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.committed: list[tuple[float, int]] = []  # (Unix seconds, number), ascending
        self._wanted = threading.Event()
        self._ended = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._bulk_rows = 0
        self._thread = threading.Thread(target=self._run, name="beats", daemon=True)

    def start(self) -> None:
        self._server.execute("CREATE TABLE beats (number int); INSERT INTO beats VALUES (0); CREATE TABLE bulk (filler text)")
        self._thread.start()

    def go(self, bulk_rows: int = 0) -> None:
        self._bulk_rows = bulk_rows
        self._idle.clear()
        self._wanted.set()

    def pause(self) -> None:
        """Returns when nothing is being written any more."""
        self._wanted.clear()
        self._idle.wait(30)

    def end(self) -> None:
        self._ended.set()
        self._wanted.set()
        self._thread.join(30)

    def move_to(self, server: Server) -> None:
        """Write there from the next beat on (after a promotion)."""
        self._server = server

    def lag_s(self, shown: int, due_unix_s: float) -> float:
        """How far behind a reader is that shows beat `shown` and should show everything committed by `due`."""
        unseen = next((at_s for at_s, number in self.committed if number > shown), None)
        return 0.0 if unseen is None or unseen > due_unix_s else due_unix_s - unseen

    def _run(self) -> None:
        number = 0
        while not self._ended.is_set():
            if not self._wanted.is_set():
                self._idle.set()
                self._wanted.wait()
                continue
            with contextlib.suppress(psycopg.Error), self._server.connect() as connection:
                while self._wanted.is_set() and not self._ended.is_set():
                    if self._bulk_rows:
                        connection.execute(
                            "INSERT INTO bulk SELECT repeat('x', 900) FROM generate_series(1, %s)", [self._bulk_rows]
                        )
                    number += 1
                    connection.execute("UPDATE beats SET number = %s", [number])
                    self.committed.append((time.time(), number))  # noqa: TID251 - the truth's own clock
                    self._ended.wait(0.1)
            self._ended.wait(0.1)


@dataclass
class _Target:
    server: Server
    node_id: str
    connection: psycopg.Connection[Any] | None = None
    report: NodeReport | None = None


@dataclass(frozen=True, slots=True)
class _Answer:
    tick: dict[str, Any]
    samples: list[Sample]
    beside: dict[str, Any]


@dataclass
class Watch:
    """Samples, judges and notes, once a second until it ends. `phase` labels what follows."""

    store: SeriesStore
    control: ControlStore
    beats: Beats
    targets: dict[str, _Target]
    upstream: dict[str, str]
    phase: str = ""
    ticks: int = 0
    readings: list[Reading] = field(default_factory=list)
    problems: list[BaseException] = field(default_factory=list)
    turn_seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._agent_id = enrol(self.control)
        self._herd = Herd(self.control, SystemClock(), heartbeat_interval_s=3600)
        identifier = str(
            next(iter(self.targets.values())).server.execute("SELECT system_identifier FROM pg_control_system()")[0][0]
        )
        for name, target in self.targets.items():
            target.report = NodeReport(target.node_id, name, CLUSTER, identifier, f"{name}:5432", 150000, "unknown", "up")
        self._herd.claim(self._agent_id, self._reports(), {})
        self._herd.arrive(self._agent_id, self._reports(), {"skew_ns": 0})
        self.lag = LagSeries(self.control, self._herd, self.store, SystemClock(), interval_s=TICK_S)
        self._ended = threading.Event()
        self._pool = ThreadPoolExecutor(len(self.targets))
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def _reports(self) -> tuple[NodeReport, ...]:
        return tuple(target.report for target in self.targets.values() if target.report is not None)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        self._thread.join(30)
        self._pool.shutdown()
        for target in self.targets.values():
            if target.connection is not None:
                target.connection.close()

    def during(self, phase: str, seconds: float) -> None:
        """Let `seconds` of ticks pass under a phase's name."""
        self.phase = phase
        until = self.ticks + round(seconds / TICK_S)
        wait_until(lambda: self.ticks >= until or self.problems, 10 * seconds + 20, f"the ticks of {phase}")
        if self.problems:
            raise self.problems[0]

    def _run(self) -> None:
        due_mono_s = time.monotonic()
        while not self._ended.wait(max(0.0, due_mono_s - time.monotonic())):
            due_mono_s += TICK_S
            try:
                self._tick()
            except BaseException as error:
                self.problems.append(error)
                raise
            self.ticks += 1

    def _tick(self) -> None:
        phase = self.phase
        # The primary last: a standby's sample is judged once the primary's samples reach it.
        first = [name for name, target in self.targets.items() if not self._was_primary(target)]
        answers = dict(zip(first, self._pool.map(self._ask, first), strict=True))
        answers |= {name: self._ask(name) for name in self.targets.keys() - answers.keys()}
        self._herd.heartbeat(self._agent_id, self._reports(), {"skew_ns": 0})
        for future in [self.store.append(_tick_batch(name, *answer)) for name, answer in answers.items()]:
            future.result(30)
        started = time.perf_counter()
        asyncio.run(self.lag.write())
        self.turn_seconds.append(time.perf_counter() - started)
        for name, (at_ms, row) in answers.items():
            if row is None or not row.tick["is_replica"]:
                continue
            sender = answers.get(self.upstream.get(name, ""), (0, None))[1]
            self.readings.append(
                Reading(
                    phase, name, at_ms,
                    truth_s=self.beats.lag_s(row.beside["beat"], at_ms / 1000 - row.tick["apply_delay"]),
                    exporter_s=row.beside["exporter"],
                    sender_s=None if sender is None else sender.beside["senders_replay_lag"],
                )
            )  # fmt: skip

    @staticmethod
    def _was_primary(target: _Target) -> bool:
        return target.report is not None and target.report.role == "primary"

    def _ask(self, name: str) -> tuple[int, _Answer | None]:
        target = self.targets[name]
        assert target.report is not None
        at_ms = time.time_ns() // 1_000_000  # as the agent: before the question
        try:
            if target.connection is None:
                target.connection = target.server.connect()
            cursor = target.connection.cursor(row_factory=dict_row)
            probe = live_probe(target.server.major)
            tick = cursor.execute(probe.sql).fetchall()
            answer = _Answer(tick[0], samples_of(probe, tick), cursor.execute(_BESIDE).fetchall()[0])
        except psycopg.Error:
            if target.connection is not None:
                target.connection.close()
            target.connection, target.report = None, replace(target.report, condition="down")
            return at_ms, None
        target.report = replace(target.report, condition="up", role="standby" if answer.tick["is_replica"] else "primary")
        return at_ms, answer

    # ---- what was said

    def judged(self) -> list[Reading]:
        """The readings with what our series said at their times."""
        seconds, wal_bytes = self._series("pgherd_replication_lag_seconds"), self._series("pgherd_replication_lag_bytes")
        broken = self._series("pgherd_replication_broken")
        unknown = self._series("pgherd_replication_lag_unknown")
        at_least = self._series("pgherd_replication_lag_at_least_seconds")
        done = []
        for one in self.readings:
            near = range(one.at_ms, one.at_ms + 900)  # those that are stamped by the collector
            reason = next(
                (
                    labels["reason"]
                    for labels, points in unknown
                    if labels["node"] == one.node and any(points.get(ms) == 1 for ms in near)
                ),
                None,
            )
            done.append(
                replace(
                    one,
                    ours_s=_at(seconds, one.node, [one.at_ms]),
                    wal_bytes=_at(wal_bytes, one.node, [one.at_ms]),
                    broken=_at(broken, one.node, near),
                    at_least_s=_at(at_least, one.node, near),
                    unknown=reason,
                )
            )  # fmt: skip
        return done

    def _series(self, name: str) -> list[tuple[dict[str, str], dict[int, float]]]:
        windows = self.store.select([Matcher("__name__", MatchOp.EQUAL, name)], 0, 1 << 60)
        return [(dict(w.labels), dict(zip(w.times_ms.tolist(), w.values.tolist(), strict=True))) for w in windows]

    def last(self, name: str, **labels: str) -> float | None:
        """The newest value of one series; None if it has none or ended."""
        for found, points in self._series(name):
            if labels.items() <= found.items():
                value = points[max(points)]
                return None if np.isnan(value) else value
        return None


def _at(series: list[tuple[dict[str, str], dict[int, float]]], node: str, times: Any) -> float | None:
    for labels, points in series:
        if labels["node"] == node:
            return next((points[ms] for ms in times if ms in points and not np.isnan(points[ms])), None)
    return None


def _tick_batch(node: str, at_ms: int, answer: _Answer | None) -> Batch:
    labels = {"job": "pgherd", "instance": f"{node}:5432", "cluster": CLUSTER, "node": node}
    if answer is None:
        series, values = [{**labels, "__name__": "pg_replication_is_replica"}], [STALE_NAN]
    else:
        series = [{**labels, **sample.labels, "__name__": sample.metric.name} for sample in answer.samples]
        values = [sample.value for sample in answer.samples]
    numbers = np.arange(len(series), dtype=np.int32)
    return Batch(layout_of(series), numbers, np.full(len(series), at_ms, np.int64), np.array(values, np.float64))


@contextlib.contextmanager
def watch(fleet: Fleet, directory: Path, major: int | None = None) -> Iterator[tuple[Watch, Link]]:
    """A primary, a standby behind a link, and a standby of that; watched, with beats that don't run yet."""
    # Without autovacuum: what it commits on an otherwise idle primary is lag, but no beat.
    quick = {"wal_retrieve_retry_interval": "200ms", "max_wal_size": "256MB", "autovacuum": "off"}
    primary = fleet.server(major, quick, own_identifier=True)
    beats = Beats(primary)
    beats.start()
    with contextlib.ExitStack() as stack:
        stack.callback(beats.end)
        link = stack.enter_context(Link(primary.port))
        standby = fleet.standby(primary, quick)
        cascade = fleet.standby(standby, quick, application_name="cascade")
        servers = {"primary": primary, "standby": standby, "cascade": cascade}
        for server in servers.values():
            stack.callback(server.stop)
        standby.set(primary_conninfo=f"host=127.0.0.1 port={link.port} user=postgres application_name=standby")
        wait_until(lambda: link.connections and _streams(standby), 20, "streaming through the link")
        wait_until(lambda: _streams(cascade), 20, "streaming to the cascade")
        targets = {
            name: _Target(server, f"00000000-0000-4000-8000-00000000000{i}") for i, (name, server) in enumerate(servers.items())
        }
        control = ControlStore.open(directory / "control.db")
        stack.callback(control.close)
        store = SeriesStore.open(directory / "series.duckdb", SeriesSettings(), SystemClock())
        stack.callback(store.close)
        seen = Watch(store, control, beats, targets, {"standby": "primary", "cascade": "standby"})
        stack.callback(seen.end)
        seen.start()
        yield seen, link


def _streams(server: Server) -> bool:
    return bool(server.execute("SELECT 1 FROM pg_stat_wal_receiver WHERE status = 'streaming'"))


def all_phases(seen: Watch, link: Link, scale: float = 1.0) -> None:
    """Every phase once; `scale` stretches them. `settling` is what nobody asserts anything stronger about than the promise."""
    servers = {name: target.server for name, target in seen.targets.items()}
    beats = seen.beats

    def caught_up() -> bool:
        last = beats.committed[-1][1]
        return all(servers[name].execute("SELECT number FROM beats")[0][0] == last for name in ("standby", "cascade"))

    seen.during("idle", 4 * scale)
    beats.go(bulk_rows=500)
    seen.during("streaming under load", 4 * scale)
    servers["cascade"].set(recovery_min_apply_delay=f"{3 * scale:g}s")
    seen.during("delayed by configuration", 3 + 4 * scale)
    beats.pause()
    seen.during("delayed, then idle", 4 * scale)
    servers["cascade"].set(recovery_min_apply_delay="0")
    servers["standby"].execute("SELECT pg_wal_replay_pause()")
    beats.go()
    seen.during("replay paused", 5 * scale)
    servers["standby"].execute("SELECT pg_wal_replay_resume()")
    seen.during("settling", 1)
    link.cut()
    seen.during("link cut, writes go on", 6 * scale)
    link.mend()
    wait_until(caught_up, 30, "catching up")
    seen.during("settling", 1)
    link.deaf()
    seen.during("link deaf, writes go on", 6 * scale)
    link.mend()
    beats.pause()
    wait_until(caught_up, 30, "catching up")
    seen.during("settling", 2)
    link.cut()
    seen.during("link cut, idle", 2 * scale)
    servers["primary"].execute("CHECKPOINT")  # WAL that no transaction stands behind
    seen.during("link cut, idle", 4 * scale)
    link.mend()
    wait_until(lambda: _streams(servers["standby"]), 20, "streaming again")
    seen.during("settling", 2)
    servers["primary"].kill()
    seen.during("primary dead", 4 * scale)
    servers["standby"].promote()
    beats.move_to(servers["standby"])
    seen.during("just promoted", 2)
    beats.go()
    seen.during("after the promotion", 4 * scale)
    beats.pause()


def table(readings: list[Reading]) -> list[dict[str, Any]]:
    """Per phase and standby: the ranges of the truth, of ours with its worst error, and of what others say."""
    rows = []
    for phase, node in dict.fromkeys((one.phase, one.node) for one in readings):
        these = [one for one in readings if (one.phase, one.node) == (phase, node)]
        errors = [one.error_s for one in these if one.error_s is not None]
        rows.append(
            {
                "phase": phase,
                "node": node,
                "truth_s": _range(one.truth_s for one in these),
                "ours_s": _range(one.ours_s for one in these),
                "unknown": "/".join(dict.fromkeys(one.unknown for one in these if one.unknown)),
                "worst_error_s": round(max(errors), 2) if errors else None,
                "broken": _range(one.broken for one in these),
                "exporter_s": _range(one.exporter_s for one in these),
                "replay_lag_s": _range(one.sender_s for one in these),
            }
        )
    return rows


def _range(values: Any) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    low, high = f"{min(known):.1f}", f"{max(known):.1f}"
    return low if low == high else f"{low}-{high}"


def lines(rows: list[dict[str, Any]]) -> str:
    """The table as text."""
    heads = list(rows[0])
    widths = [max(len(str(row[head])) for row in [*rows, dict(zip(heads, heads, strict=True))]) for head in heads]
    table = [heads, *[[str(row[head]) for head in heads] for row in rows]]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table)

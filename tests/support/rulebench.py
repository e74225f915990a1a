"""Rule groups over the real engine, recorder and control store, driven slot by slot; only the series store is in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from pgherd.alerts.load import parse_rules
from pgherd.collector.alerting.evaluation import Evaluator
from pgherd.collector.alerting.group import Facts
from pgherd.collector.alerting.query import promql_query
from pgherd.collector.alerting.recorded import RecordedSeries
from pgherd.promql.engine import evaluate_instant
from pgherd.promql.parse import parse
from pgherd.promql.values import Vector
from pgherd.proto.errors import TransientError
from pgherd.proto.selectors import Matcher
from pgherd.runtime.clock import SystemClock
from pgherd.storage.control.store import ControlStore
from pgherd.storage.series.batch import Batch
from support.alerts import TestClock, no_facts
from support.memory_series import MemorySeries, MemoryWindow

Labels = tuple[tuple[str, str], ...]


class AppendedSeries:
    """The series store's two faces that rules use; `full` refuses as a full disk does."""

    def __init__(self) -> None:
        self.samples: dict[Labels, list[tuple[int, float]]] = {}
        self.full = False

    def append(self, batch: Batch) -> Future[Any]:
        done: Future[Any] = Future()
        if self.full:
            done.set_exception(TransientError("store.unavailable", "no space left"))
            return done
        for index, at_ms, value in zip(batch.series, batch.times_ms, batch.values, strict=True):
            self.add(dict(batch.layout.labels[index]), int(at_ms), value)
        done.set_result(None)
        return done

    def add(self, labels: Mapping[str, str], at_ms: int, value: float) -> None:
        self.samples.setdefault(tuple(sorted(labels.items())), []).append((at_ms, value))

    def select(self, matchers: Sequence[Matcher], start_ms: int, end_ms: int) -> Sequence[MemoryWindow]:
        source = MemorySeries()
        for labels, samples in self.samples.items():
            times, values = zip(*samples, strict=True)
            source.add_arrays(dict(labels), np.array(times, dtype=np.int64), np.array(values, dtype=np.float64))
        return source.select(matchers, start_ms, end_ms)


class RuleBench:
    """`restart` is what a kill -9 leaves: the control store and the series store."""

    def __init__(self, directory: Path, rules: str, facts: Facts = no_facts) -> None:
        self.store = ControlStore.open(directory / "control.sqlite")
        self.series = AppendedSeries()
        self.clock = TestClock()
        self.rules, self.facts = rules, facts
        self.restart()

    def restart(self) -> None:
        recorded = RecordedSeries(self.series, self.series.append)
        self.evaluator = Evaluator(
            groups=parse_rules(self.rules, "r.yaml", interval_ns=15_000_000_000, check_expression=parse),
            store=self.store,
            query=promql_query(recorded, SystemClock(), timeout_s=30),
            facts=self.facts,
            clock=self.clock,
            recorded=recorded,
        )
        self.evaluator.restore()

    @property
    def now_ms(self) -> int:
        return self.clock.wall_unix_ns() // 1_000_000

    def turn(self, *values: tuple[Mapping[str, str], float], after_s: float = 15) -> int:
        """Move time, store `values` now, evaluate each group once; returns the number of transitions."""
        self.clock.advance(after_s)
        for labels, value in values:
            self.series.add(labels, self.now_ms, value)
        return sum(
            evaluation.evaluate(self.clock.wall_unix_ns(), self.clock.mono_s(), self.clock)
            for evaluation in self.evaluator._evaluations
        )

    def stored(self, expr: str) -> dict[str, float]:
        """What the store alone answers now: labels as text → value."""
        vector = evaluate_instant(expr, self.now_ms, self.series)
        assert isinstance(vector, Vector)
        return {
            ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()) if k != "__name__"): sample.value
            for sample in vector.samples
        }

    def states(self) -> list[str]:
        return [one.state.value for g in self.evaluator.status() for r in g.alerting for one in r.instances.values()]

    def errors(self) -> list[str]:
        return [rule.last_error for group in self.evaluator.status() for rule in group.rules]

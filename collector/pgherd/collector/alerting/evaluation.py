"""Evaluate rule groups on their interval, for as long as the collector runs.

Slots lie on a monotonic grid, so that `for: 60s` at an interval of 15 s is exactly four slots whatever the
wall clock does; the wall clock says at which time the series are read and stamps what is shown. An evaluation
that takes longer than its interval skips slots, and counts them. What one slot does is group.py.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Sequence

from pgherd.alerts.model import Group, RecordingRule
from pgherd.collector.alerting import rows
from pgherd.collector.alerting.group import Facts, GroupEvaluation, GroupStatus, Inputs
from pgherd.collector.alerting.query import Query, metric_names
from pgherd.collector.alerting.recorded import RecordedSeries
from pgherd.proto.clock import Clock
from pgherd.storage.control.store import ControlStore

_FIRST_EVALUATION_S = 30.0


class Evaluator:
    """All groups. `status()` may be called from any thread at any time."""

    def __init__(
        self,
        *,
        groups: Sequence[Group],
        store: ControlStore,
        query: Query,
        facts: Facts,
        clock: Clock,
        recorded: RecordedSeries | None = None,
        external_url: str = "",
        inputs: Inputs = metric_names,
        committed: Callable[[], None] = lambda: None,
    ) -> None:
        """`recorded` takes the series that rules write, and `query` reads through it; without it they go nowhere.

        `committed` is called on the event loop after a commit that somebody is to be told of (Notifier.wake).
        """
        self._store = store
        self._recorded = recorded
        self._clock = clock
        self._committed = committed
        self._evaluations = tuple(
            GroupEvaluation(group, store, query, facts, inputs, recorded, external_url) for group in groups
        )

    def status(self) -> tuple[GroupStatus, ...]:
        """Every group in the order of the files."""
        return tuple(evaluation.status for evaluation in self._evaluations)

    @property
    def points_lost(self) -> int:
        """Samples that rules wrote and the series store didn't take, since this process began."""
        return 0 if self._recorded is None else self._recorded.points_lost

    def restore(self) -> int:
        """Take up the stored instances; returns how many. Call once, on a thread, before `run`.

        Those of rules that are no longer configured are deleted; the notifier tells their receivers so.
        Raises TransientError store.unavailable.
        """
        with self._store.begin() as connection:
            stored = rows.read_instances(connection)
            configured = {status.rule.id for evaluation in self._evaluations for status in evaluation.status.alerting}
            for rule_id in stored.keys() - configured:
                del stored[rule_id]
                rows.delete_rule(connection, rule_id)
        now_unix_ns = self._clock.wall_unix_ns()
        for evaluation in self._evaluations:
            evaluation.adopt(stored)
            evaluation.resume_series(now_unix_ns, self._written_alone())
        return sum(len(instances) for instances in stored.values())

    def _written_alone(self) -> frozenset[str]:
        """Metrics that only one of the rules records."""
        rules = [status.rule for evaluation in self._evaluations for status in evaluation.status.rules]
        times = Counter(rule.record for rule in rules if isinstance(rule, RecordingRule))
        return frozenset(name for name, count in times.items() if count == 1)

    async def run(self) -> None:
        """Evaluate until cancelled; a running evaluation is let finish first."""
        async with asyncio.TaskGroup() as tasks:
            for evaluation in self._evaluations:
                tasks.create_task(self._run_group(evaluation))

    async def _run_group(self, evaluation: GroupEvaluation) -> None:
        interval_s = evaluation.status.group.interval_ns / 1e9
        slot_mono_s = self._clock.mono_s()
        while True:
            await asyncio.sleep(slot_mono_s - self._clock.mono_s())
            late_s = self._clock.mono_s() - slot_mono_s
            slot_unix_ns = self._clock.wall_unix_ns() - int(late_s * 1e9)
            work = asyncio.ensure_future(asyncio.to_thread(evaluation.evaluate, slot_unix_ns, slot_mono_s, self._clock))
            try:
                transitions = await asyncio.shield(work)
            except asyncio.CancelledError:
                await asyncio.wait([work])  # bounded by the query's own timeout; the store must not close under it
                raise
            if transitions:
                self._committed()
            missed = max(0, math.floor((self._clock.mono_s() - slot_mono_s) / interval_s))
            if missed:
                evaluation.missed(missed)
            slot_mono_s += (missed + 1) * interval_s


async def first_evaluation(status: Callable[[], Sequence[GroupStatus]], clock: Clock) -> None:
    """Wait until every group was evaluated in this process, or could have been.

    What was restored is how things stood before we were away: a repeat, or a page after a silence, would tell of what may
    be over. A store that can't be written mustn't keep silent for ever what was to be told before.
    """
    deadline_mono_s = clock.mono_s() + _FIRST_EVALUATION_S
    # Evaluations happen on threads, most of them without news that could wake anybody.
    while clock.mono_s() < deadline_mono_s and any(group.evaluated_unix_ns is None for group in status()):  # noqa: ASYNC110
        await asyncio.sleep(0.1)

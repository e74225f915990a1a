"""Evaluate rule groups on their interval and make what follows durable.

Per group: query each rule at the slot's time, step the pure machine, and commit next instances *and* letters
to the receivers in one transaction of the control store. Only then does memory move on. Killed at any point,
either nothing happened or all of it; no `for` clock is lost, no notification is missed.

Slots lie on a monotonic grid, so that `for: 60s` at an interval of 15 s is exactly four slots whatever the
wall clock does; the wall clock says at which time the series are read and stamps what is shown. An evaluation
that takes longer than its interval skips slots, and counts them.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from pgherd.alerts.knowledge import Knowledge
from pgherd.alerts.model import Group, Instance, QueryRow, Rule, Transition
from pgherd.alerts.state import Known, Moment, retire, step
from pgherd.collector.alerting import rows
from pgherd.collector.alerting.query import Query, metric_names
from pgherd.proto.clock import Clock
from pgherd.proto.errors import PgherdError
from pgherd.proto.selectors import NAME_LABEL, Matcher, MatchOp
from pgherd.runtime.logging import get_logger
from pgherd.storage.control.store import ControlStore

_log = get_logger(__name__)

# What is heard at a time (ms since the epoch). Called on a thread; raises PgherdError.
Facts = Callable[[int], Knowledge]
# The names of the metrics that an expression reads (query.metric_names).
Inputs = Callable[[str], frozenset[str]]

# The longest stretch without evaluation that counts towards `for`, in intervals: a restart of the collector
# or a slow query costs nothing, an hour's outage doesn't turn one observation into an hour's.
_GAP_INTERVALS = 4


class Health(StrEnum):
    """Prometheus' words for how a rule's last evaluation went."""

    UNKNOWN = "unknown"
    OK = "ok"
    ERR = "err"


@dataclass(frozen=True, slots=True)
class RuleStatus:
    """A rule with its instances (by fingerprint) as last committed."""

    rule: Rule
    instances: Mapping[str, Instance]
    health: Health = Health.UNKNOWN
    last_error: str = ""
    evaluated_unix_ns: int | None = None
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """A group as of its last evaluation; counters since this process began."""

    group: Group
    rules: tuple[RuleStatus, ...]
    evaluated_unix_ns: int | None = None
    duration_s: float = 0.0
    evaluations: int = 0
    failures: int = 0  # evaluations of single rules that failed
    commits_failed: int = 0
    slots_missed: int = 0
    letters_given_up: int = 0


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
        receivers: Sequence[str],
        inputs: Inputs = metric_names,
        committed: Callable[[], None] = lambda: None,
        pending_max: int = 10_000,
    ) -> None:
        """`committed` is called on the event loop after a commit that holds letters (OutboxWorker.wake)."""
        self._store = store
        self._clock = clock
        self._receivers = tuple(receivers)
        self._committed = committed
        self._pending_max = pending_max
        self._evaluations = tuple(
            GroupEvaluation(group, store, query, facts, inputs, receivers, pending_max) for group in groups
        )

    def status(self) -> tuple[GroupStatus, ...]:
        """Every group in the order of the files."""
        return tuple(evaluation.status for evaluation in self._evaluations)

    def restore(self) -> int:
        """Take up the stored instances; returns how many. Call once, on a thread, before `run`.

        Rules that are no longer configured end their open episodes ("rule removed"): nobody else would ever
        tell the receivers. Raises TransientError store.unavailable.
        """
        with self._store.begin() as connection:
            stored = rows.read_instances(connection)
            configured = {status.rule.id for evaluation in self._evaluations for status in evaluation.status.rules}
            now_unix_ns = self._clock.wall_unix_ns()
            for rule_id in stored.keys() - configured:
                transitions = retire(rule_id, stored.pop(rule_id), now_unix_ns)
                rows.post(connection, transitions, self._receivers, now_unix_ns, self._pending_max)
                rows.delete_rule(connection, rule_id)
        for evaluation in self._evaluations:
            evaluation.adopt(stored)
        return sum(len(instances) for instances in stored.values())

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
                letters = await asyncio.shield(work)
            except asyncio.CancelledError:
                await asyncio.wait([work])  # bounded by the query's own timeout; the store must not close under it
                raise
            if letters:
                self._committed()
            missed = max(0, math.floor((self._clock.mono_s() - slot_mono_s) / interval_s))
            if missed:
                evaluation.missed(missed)
            slot_mono_s += (missed + 1) * interval_s


class GroupEvaluation:
    """One group between its evaluations. Evaluated by one thread at a time."""

    def __init__(
        self,
        group: Group,
        store: ControlStore,
        query: Query,
        facts: Facts,
        inputs: Inputs,
        receivers: Sequence[str],
        pending_max: int,
    ) -> None:
        self._store = store
        self._query = query
        self._facts = facts
        self._inputs = inputs
        self._receivers = tuple(receivers)
        self._pending_max = pending_max
        self._stepped_mono_s: dict[str, float] = {}  # rule id → slot of its last committed evaluation
        self._in_doubt = False  # a commit failed: what is stored may be either
        self.status = GroupStatus(group, tuple(RuleStatus(rule, {}) for rule in group.rules))

    def adopt(self, stored: Mapping[str, Mapping[str, Instance]]) -> None:
        """Begin from stored instances: rule id → fingerprint → instance."""
        self.status = replace(
            self.status, rules=tuple(replace(status, instances=stored.get(status.rule.id, {})) for status in self.status.rules)
        )

    def missed(self, slots: int) -> None:
        """Note slots that passed while an evaluation ran."""
        self.status = replace(self.status, slots_missed=self.status.slots_missed + slots)
        _log.warning("alert.evaluation.slots_missed", group=self.status.group.name, slots=slots)

    def evaluate(self, unix_ns: int, mono_s: float, clock: Clock) -> int:
        """Evaluate the group for one slot; returns how many transitions were committed.

        Never raises for a rule, a query or the store: that is counted, shown as the rule's health, and what
        was known before stays.
        """
        started_mono_s = clock.mono_s()
        facts = self._facts_now(unix_ns // 1_000_000)
        before = self.status.rules
        try:
            if self._in_doubt:
                self._reload()
                before = self.status.rules
            after: list[RuleStatus] = []
            transitions: list[Transition] = []
            for status in before:
                stepped, announced = self._evaluate_rule(status, unix_ns, mono_s, facts, clock)
                after.append(stepped)
                transitions += announced
            given_up = self._commit(before, after, transitions, unix_ns)
        # The guard of the evaluation loop: a full disk passes, and a bug must not end alerting for good.
        except Exception as error:  # noqa: BLE001
            self._in_doubt = True
            problem = _problem(error)
            self.status = replace(
                self.status,
                rules=tuple(replace(status, health=Health.ERR, last_error=problem) for status in self.status.rules),
                commits_failed=self.status.commits_failed + 1,
            )
            _log.error("alert.commit_failed", group=self.status.group.name, error=problem)
            return 0
        if given_up:
            _log.error("notify.outbox.overflow", letters_given_up=given_up, pending_max=self._pending_max)
        failures = 0
        for status in after:
            if status.health is Health.OK:
                self._stepped_mono_s[status.rule.id] = mono_s
            else:
                failures += 1
        self.status = replace(
            self.status,
            rules=tuple(after),
            evaluated_unix_ns=unix_ns,
            duration_s=clock.mono_s() - started_mono_s,
            evaluations=self.status.evaluations + 1,
            failures=self.status.failures + failures,
            letters_given_up=self.status.letters_given_up + given_up,
        )
        return len(transitions)

    def _facts_now(self, at_ms: int) -> Knowledge | None:
        try:
            return self._facts(at_ms)
        # A guard like the rules' own: firing must not wait for facts.
        except Exception as error:  # noqa: BLE001
            _log.warning("alert.facts_unavailable", error=_problem(error))
            return None

    def _known(self, rule: Rule, at_ms: int, facts: Knowledge | None) -> Known:
        """What the machine asks about instances of `rule` that vanished."""
        if facts is None:
            return lambda _labels: False  # without facts nobody may say that something is over
        heard: dict[str, frozenset[str]] = {}  # metric → instances that have a value now

        def inputs_heard(instance: str) -> bool:
            metrics = self._inputs(rule.expr)
            for metric in metrics - heard.keys():
                selector = f"{{{Matcher(NAME_LABEL, MatchOp.EQUAL, metric)}}}"
                heard[metric] = frozenset(labels.get("instance", "") for labels, _value in self._query(selector, at_ms))
            return bool(metrics) and all(instance in heard[metric] for metric in metrics)

        return lambda labels: facts.known(labels, inputs_heard)

    def _evaluate_rule(
        self, status: RuleStatus, unix_ns: int, mono_s: float, facts: Knowledge | None, clock: Clock
    ) -> tuple[RuleStatus, tuple[Transition, ...]]:
        rule, group = status.rule, self.status.group
        stepped_mono_s = self._stepped_mono_s.get(rule.id)
        moment = Moment(
            unix_ns=unix_ns,
            gap_max_ns=_GAP_INTERVALS * group.interval_ns,
            # Rounded to a microsecond: the grid's floating point must not cost `for` a whole slot.
            elapsed_ns=None if stepped_mono_s is None else round((mono_s - stepped_mono_s) * 1e6) * 1000,
        )
        started_mono_s = clock.mono_s()
        try:
            result = [QueryRow(labels, value) for labels, value in self._query(rule.expr, unix_ns // 1_000_000)]
            known = self._known(rule, unix_ns // 1_000_000, facts)
            outcome = step(rule, status.instances, result, moment, known, limit=group.limit)
        # The guard of the loop over rules: whatever one rule does, the others are evaluated.
        except Exception as error:  # noqa: BLE001
            problem = _problem(error)
            _log.error("alert.rule_failed", rule=rule.id, error=problem)
            failed = replace(
                status,
                health=Health.ERR,
                last_error=problem,
                evaluated_unix_ns=unix_ns,
                duration_s=clock.mono_s() - started_mono_s,
            )
            return failed, ()
        done = RuleStatus(rule, outcome.instances, Health.OK, "", unix_ns, clock.mono_s() - started_mono_s)
        return done, outcome.transitions

    def _commit(
        self, before: Sequence[RuleStatus], after: Sequence[RuleStatus], transitions: Sequence[Transition], unix_ns: int
    ) -> int:
        with self._store.begin() as connection:
            for old, new in zip(before, after, strict=True):
                rows.write_instances(connection, new.rule.id, old.instances, new.instances)
            return rows.post(connection, transitions, self._receivers, unix_ns, self._pending_max)

    def _reload(self) -> None:
        with self._store.read() as connection:
            self.adopt(rows.read_instances(connection))
        # If the commit did happen, the stored stamps are newer than these slots: measure from the stamps.
        self._stepped_mono_s.clear()
        self._in_doubt = False


def _problem(error: Exception) -> str:
    return error.message if isinstance(error, PgherdError) else f"{type(error).__name__}: {error}"

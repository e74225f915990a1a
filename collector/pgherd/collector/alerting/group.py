"""One group of rules between and during its evaluations.

Per slot, at one instant: query each rule in turn, let the next ones see what it recorded, step the pure machine of
each alert, and commit the next instances in one transaction of the control store. Only then does memory move on, and who is
to be told is found from it (notifier.py). Killed at any point, either nothing happened or all of it; no `for` clock is
lost. Series of alerts are stored after that commit: what they tell has happened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from pgherd.alerts.knowledge import Knowledge, has_risen
from pgherd.alerts.lint import emitted_by_pgherd
from pgherd.alerts.model import Group, Instance, QueryRow, RecordingRule, Rule, Transition, fingerprint_of
from pgherd.alerts.recording import ALERTS, ALERTS_FOR_STATE, Labels, alert_series, canonical, record
from pgherd.alerts.state import Known, Moment, step
from pgherd.alerts.template import Surroundings
from pgherd.collector.alerting import rows
from pgherd.collector.alerting.query import Query
from pgherd.collector.alerting.recorded import Point, RecordedSeries
from pgherd.proto.clock import Clock
from pgherd.proto.errors import PgherdError
from pgherd.proto.samples import STALE_NAN
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
# What rules say about themselves isn't heard from anybody.
_OWN_SERIES = frozenset((ALERTS, ALERTS_FOR_STATE))


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
class RecordingStatus:
    """A recording rule and the series it wrote last."""

    rule: RecordingRule
    series: frozenset[Labels] = frozenset()
    health: Health = Health.UNKNOWN
    last_error: str = ""
    evaluated_unix_ns: int | None = None
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """A group as of its last evaluation; counters since this process began."""

    group: Group
    rules: tuple[RuleStatus | RecordingStatus, ...]
    evaluated_unix_ns: int | None = None
    duration_s: float = 0.0
    evaluations: int = 0
    failures: int = 0  # evaluations of single rules that failed
    commits_failed: int = 0
    slots_missed: int = 0

    @property
    def alerting(self) -> tuple[RuleStatus, ...]:
        """The alerting rules alone."""
        return tuple(status for status in self.rules if isinstance(status, RuleStatus))


class GroupEvaluation:
    """One group between its evaluations. Evaluated by one thread at a time."""

    def __init__(
        self,
        group: Group,
        store: ControlStore,
        query: Query,
        facts: Facts,
        inputs: Inputs,
        recorded: RecordedSeries | None,
        external_url: str,
    ) -> None:
        self._store = store
        self._query = query
        self._facts = facts
        self._inputs = inputs
        self._recorded = recorded
        self._external_url = external_url
        self._stepped_mono_s: dict[str, float] = {}  # rule id → slot of its last committed evaluation
        self._in_doubt = False  # a commit failed: what is stored may be either
        self._written: dict[str, frozenset[Labels]] = {}  # rule id → series that aren't marked stale
        self._to_resume: frozenset[str] = frozenset()  # metrics whose last series are to be read from the store
        self.status = GroupStatus(
            group,
            tuple(RuleStatus(rule, {}) if isinstance(rule, Rule) else RecordingStatus(rule) for rule in group.rules),
        )

    def adopt(self, stored: Mapping[str, Mapping[str, Instance]]) -> None:
        """Begin from stored instances: rule id → fingerprint → instance."""
        self.status = replace(
            self.status,
            rules=tuple(
                replace(status, instances=stored.get(status.rule.id, {})) if isinstance(status, RuleStatus) else status
                for status in self.status.rules
            ),
        )

    def resume_series(self, now_unix_ns: int, written_alone: frozenset[str]) -> None:
        """Take up the series of a former process, once, after `adopt`.

        Alerts' series come from their durable state, so that an expression that reads ALERTS sees after a kill what it
        saw before. Recorded ones are looked up in the store at the first evaluation if only one rule writes them.
        """
        self._to_resume = written_alone
        for status in self.status.alerting:
            series = alert_series(status.instances.values())
            self._written[status.rule.id] = frozenset(series)
            self._show([Point(labels, self._read_ms(now_unix_ns), value) for labels, value in series.items()])

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
        after: list[RuleStatus | RecordingStatus] = []
        told: list[Point] = []  # about alerts: true only once their states are committed
        recorded: list[Point] = []
        try:
            if self._in_doubt:
                self._reload()
                before = self.status.rules
            transitions = 0
            for status in before:
                if isinstance(status, RecordingStatus):
                    after.append(self._evaluate_recording(status, unix_ns, clock, recorded))
                else:
                    stepped, announced = self._evaluate_rule(status, unix_ns, mono_s, facts, clock, told)
                    after.append(stepped)
                    transitions += len(announced)
            self._commit(before, after)
        # The guard of the evaluation loop: a full disk passes, and a bug must not end alerting for good.
        except Exception as error:  # noqa: BLE001
            self._in_doubt = True
            self._keep(after, recorded, without=told)
            problem = _problem(error)
            self.status = replace(
                self.status,
                rules=tuple(replace(status, health=Health.ERR, last_error=problem) for status in self.status.rules),
                commits_failed=self.status.commits_failed + 1,
            )
            _log.error("alert.commit_failed", group=self.status.group.name, error=problem)
            return 0
        self._keep(after, [*told, *recorded])
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
        )
        return transitions

    def _facts_now(self, at_ms: int) -> Knowledge | None:
        try:
            return self._facts(at_ms)
        # A guard like the rules' own: firing must not wait for facts.
        except Exception as error:  # noqa: BLE001
            _log.warning("alert.facts_unavailable", error=_problem(error))
            return None

    def _known(self, status: RuleStatus, at_ms: int, facts: Knowledge | None) -> Known:
        """What the machine asks about instances of a rule that vanished."""
        if facts is None:
            return lambda _labels: False  # without facts nobody may say that something is over
        metrics = self._inputs(status.rule.expr) - _OWN_SERIES
        probes = self._probes_of(metrics)
        read: dict[str, Sequence[tuple[Mapping[str, str], float]]] = {}  # metric → its series that have a value now

        def now(metric: str) -> Sequence[tuple[Mapping[str, str], float]]:
            if metric not in read:
                read[metric] = self._query(f"{{{Matcher(NAME_LABEL, MatchOp.EQUAL, metric)}}}", at_ms)
            return read[metric]

        def inputs_heard(instance: str) -> bool:
            return bool(metrics) and all(
                any(labels.get("instance", "") == instance for labels, _value in now(metric)) for metric in metrics
            )

        def known(labels: Mapping[str, str]) -> bool:
            if facts.known(labels, inputs_heard, probes):
                return True
            if len(metrics) != 1 or probes != frozenset():  # not the collector's, or more than a count
                return False
            (count,) = metrics
            return has_risen(labels, status.instances[fingerprint_of(labels)].value, now(count))

        return known

    @staticmethod
    def _probes_of(metrics: frozenset[str]) -> frozenset[str] | None:
        """Which probes yield what a rule reads; None when that is anybody's guess."""
        probes: set[str] = set()
        for metric in metrics:
            if (of_metric := emitted_by_pgherd().probes.get(metric)) is None:
                return None
            probes |= of_metric
        return frozenset(probes)

    def _evaluate_recording(self, status: RecordingStatus, unix_ns: int, clock: Clock, points: list[Point]) -> RecordingStatus:
        rule, at_ms = status.rule, self._read_ms(unix_ns)
        started_mono_s = clock.mono_s()
        try:
            result = [QueryRow(labels, value) for labels, value in self._query(rule.expr, at_ms)]
            series = record(rule, result, limit=self.status.group.limit)
            points += self._change(rule.id, series, at_ms, self._resumed(rule, at_ms))
        # The guard of the loop over rules: whatever one rule does, the others are evaluated.
        except Exception as error:  # noqa: BLE001
            problem = _problem(error)
            _log.error("alert.rule_failed", rule=rule.id, error=problem)
            return replace(
                status,
                health=Health.ERR,
                last_error=problem,
                evaluated_unix_ns=unix_ns,
                duration_s=clock.mono_s() - started_mono_s,
            )
        return RecordingStatus(rule, frozenset(series), Health.OK, "", unix_ns, clock.mono_s() - started_mono_s)

    def _evaluate_rule(
        self,
        status: RuleStatus,
        unix_ns: int,
        mono_s: float,
        facts: Knowledge | None,
        clock: Clock,
        points: list[Point],
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
            at_ms = self._read_ms(unix_ns)
            result = [QueryRow(labels, value) for labels, value in self._query(rule.expr, at_ms)]
            known = self._known(status, at_ms, facts)
            around = Surroundings(self._external_url, {}, lambda expr: self._query(expr, at_ms), unix_ns)
            outcome = step(rule, status.instances, result, moment, known, limit=group.limit, around=around)
            points += self._change(rule.id, alert_series(outcome.instances.values()), at_ms)
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

    def _commit(self, before: Sequence[RuleStatus | RecordingStatus], after: Sequence[RuleStatus | RecordingStatus]) -> None:
        with self._store.begin() as connection:
            for old, new in zip(before, after, strict=True):
                if isinstance(old, RuleStatus) and isinstance(new, RuleStatus):
                    rows.write_instances(connection, new.rule.id, old.instances, new.instances)

    # --- series ---

    def _read_ms(self, unix_ns: int) -> int:
        """The time at which series are read, and written."""
        return (unix_ns - self.status.group.query_offset_ns) // 1_000_000

    def _change(
        self, rule_id: str, series: Mapping[Labels, float], at_ms: int, before: frozenset[Labels] | None = None
    ) -> list[Point]:
        """The points of one evaluation of a rule, stale markers for what it no longer yields included; shown at once."""
        gone = (self._written.get(rule_id, frozenset()) if before is None else before) - series.keys()
        points = [Point(labels, at_ms, value) for labels, value in series.items()]
        points += [Point(labels, at_ms, STALE_NAN) for labels in gone]
        self._show(points)
        return points

    def _resumed(self, rule: RecordingRule, at_ms: int) -> frozenset[Labels] | None:
        """What a former process recorded last; None when this one has recorded already or others write it too."""
        if rule.id in self._written or rule.record not in self._to_resume or self._recorded is None:
            return None
        matchers = [Matcher(NAME_LABEL, MatchOp.EQUAL, rule.record)]
        matchers += [Matcher(name, MatchOp.EQUAL, value) for name, value in rule.labels.items()]
        selector = "{" + ",".join(map(str, matchers)) + "}"
        return frozenset(canonical(labels) for labels, _value in self._query(selector, at_ms))

    def _show(self, points: Iterable[Point]) -> None:
        if self._recorded is not None:
            self._recorded.show(points)

    def _keep(
        self, after: Sequence[RuleStatus | RecordingStatus], points: Sequence[Point], without: Sequence[Point] = ()
    ) -> None:
        """Store `points` and forget those that turned out not to be true."""
        for status in after:
            if status.health is not Health.OK:
                continue
            if isinstance(status, RecordingStatus):
                self._written[status.rule.id] = status.series
            elif not without:
                self._written[status.rule.id] = frozenset(alert_series(status.instances.values()))
        if self._recorded is not None:
            self._recorded.withdraw(without)
            self._recorded.write(points)

    def _reload(self) -> None:
        with self._store.read() as connection:
            self.adopt(rows.read_instances(connection))
        # If the commit did happen, the stored stamps are newer than these slots: measure from the stamps.
        self._stepped_mono_s.clear()
        self._in_doubt = False


def _problem(error: Exception) -> str:
    return error.message if isinstance(error, PgherdError) else f"{type(error).__name__}: {error}"

"""The alert state machine: previous instances, query result, rule, moment → next instances and transitions.

Never broken (tests/property/test_alert_state.py):
 1. Nothing fires before it was observed to hold for `for`; clocks that step in either direction and
    times without evaluation don't count as observation (beyond `gap_max_ns`).
 2. An episode is announced as firing once and as resolved once, in that order, and never resolved while
    what feeds the instance is unknown.
 3. A restart changes nothing: all state is input, none is held here.
 4. Evaluating again at the same moment with the same result changes nothing and announces nothing.
 5. A refused evaluation (duplicate label sets, limit) leaves the state as it was: raised, not returned.

  state      | expression returns it       | it doesn't, source known      | it doesn't, source unknown
  (absent)   | → pending, or firing        |                               |
  pending    | held ≥ for → firing         | dropped; episode → resolved   | dropped; episode → unknown
  firing     | stays                       | keep_firing_for, → resolved   | keep_firing_for, → unknown
  unknown    | → pending (same episode)    | → resolved                    | stays
  resolved   | → pending (a new episode)   | dropped after 15 min          | dropped after 15 min

Evaluation is Prometheus-exact; only UNKNOWN is ours: Prometheus resolves an alert whose series vanished,
and so announces "resolved" for the very server that has just gone silent. An instance that returns from
UNKNOWN runs through its `for` again without a second "firing": receivers still hold the first.
Source: Prometheus rules/alerting.go, AlertingRule.Eval; compliance/alert_generator/specification.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from pgherd.alerts.model import (
    ALERT_NAME_LABEL,
    Instance,
    QueryRow,
    Rule,
    State,
    Transition,
    TransitionKind,
    fingerprint_of,
    transition_id,
)
from pgherd.alerts.template import NOWHERE, Surroundings, TemplateData, expand
from pgherd.proto.errors import PreconditionError
from pgherd.proto.selectors import NAME_LABEL

RESOLVED_RETENTION_NS = 15 * 60 * 1_000_000_000

# Whether what feeds an instance with these labels is being heard: see knowledge.py.
Known = Callable[[Mapping[str, str]], bool]
Instances = Mapping[str, Instance]  # by fingerprint


@dataclass(frozen=True, slots=True)
class Moment:
    """The instant of an evaluation.

    `unix_ns` is the wall clock: it stamps. `elapsed_ns` is monotonic time since this rule was last
    evaluated with success, None for the first time in this process; then wall clock stands in, bounded.
    `gap_max_ns` is the longest stretch between two evaluations that counts as observed.
    """

    unix_ns: int
    gap_max_ns: int
    elapsed_ns: int | None = None

    def observed_ns(self, since_unix_ns: int) -> int:
        """How much of the time since `since_unix_ns` counts as observed; never negative."""
        elapsed_ns = self.elapsed_ns if self.elapsed_ns is not None else self.unix_ns - since_unix_ns
        return max(0, min(elapsed_ns, self.gap_max_ns))


@dataclass(frozen=True, slots=True)
class Step:
    """The outcome of one evaluation of one rule."""

    instances: Instances
    transitions: tuple[Transition, ...]


def step(
    rule: Rule,
    previous: Instances,
    result: Sequence[QueryRow],
    moment: Moment,
    known: Known,
    *,
    limit: int = 0,
    around: Surroundings = NOWHERE,
) -> Step:
    """Evaluate `rule` once; `around` is what its templates may speak of.

    Raises PreconditionError alerts.duplicate when two rows have equal labels after templating,
    alerts.limit when more than `limit` instances would be pending or firing.
    """
    seen = _label_rows(rule, result, around)
    instances: dict[str, Instance] = {}
    transitions: list[Transition] = []
    for fingerprint, (labels, row) in seen.items():
        instance = _present(rule, previous.get(fingerprint), labels, row, moment, around)
        if instance.state is State.FIRING and instance.episode_unix_ns is None:
            instance = replace(instance, episode_unix_ns=moment.unix_ns)
            transitions.append(_announce(rule, instance, TransitionKind.FIRING))
        instances[fingerprint] = instance
    for fingerprint, before in previous.items():
        if fingerprint in seen:
            continue
        after = _absent(rule, before, moment, known)
        if after is None:
            continue
        if before.state is not State.RESOLVED and after.state is State.RESOLVED:
            transitions.append(_announce(rule, after, TransitionKind.RESOLVED, reason="recovered"))
        instances[fingerprint] = after
    active = sum(instance.state in (State.PENDING, State.FIRING) for instance in instances.values())
    if limit and active > limit:
        raise PreconditionError(
            "alerts.limit",
            f"rule {rule.alert} exceeds its group's limit of {limit} with {active} alerts",
            hint="aggregate the expression or raise the group's limit; until then this rule announces nothing",
            rule=rule.id,
            limit=limit,
            alerts=active,
        )
    return Step(instances, tuple(transitions))


def _label_rows(rule: Rule, result: Sequence[QueryRow], around: Surroundings) -> dict[str, tuple[Mapping[str, str], QueryRow]]:
    seen: dict[str, tuple[Mapping[str, str], QueryRow]] = {}
    for row in result:
        data = TemplateData(row.labels, row.value, around)
        labels = {name: value for name, value in row.labels.items() if name != NAME_LABEL}
        for name, template in rule.labels.items():
            labels[name] = expand(template, data)
        labels[ALERT_NAME_LABEL] = rule.alert
        labels = {name: value for name, value in labels.items() if value}  # an empty label is no label
        fingerprint = fingerprint_of(labels)
        if fingerprint in seen:
            raise PreconditionError(
                "alerts.duplicate",
                f"rule {rule.alert}: two rows have equal labels after the rule's labels are applied",
                hint="make the expression keep a label that tells them apart, or take it out of the rule's labels",
                rule=rule.id,
            )
        seen[fingerprint] = (labels, row)
    return seen


def _present(
    rule: Rule, before: Instance | None, labels: Mapping[str, str], row: QueryRow, moment: Moment, around: Surroundings
) -> Instance:
    data = TemplateData(row.labels, row.value, around)
    annotations = {name: expand(template, data) for name, template in rule.annotations.items()}
    if before is None or before.state in (State.RESOLVED, State.UNKNOWN):
        after = Instance(
            labels=labels,
            annotations=annotations,
            value=row.value,
            state=State.PENDING,
            active_unix_ns=moment.unix_ns,
            evaluated_unix_ns=moment.unix_ns,
            episode_unix_ns=before.episode_unix_ns if before is not None and before.state is State.UNKNOWN else None,
        )
    else:
        held_ns = (
            before.held_ns + moment.observed_ns(before.evaluated_unix_ns) if before.state is State.PENDING else before.held_ns
        )
        after = replace(
            before,
            labels=labels,
            annotations=annotations,
            value=row.value,
            held_ns=held_ns,
            absent_ns=None,
            evaluated_unix_ns=moment.unix_ns,
        )
    if after.state is State.PENDING and after.held_ns >= rule.for_ns:
        after = replace(after, state=State.FIRING, fired_unix_ns=moment.unix_ns)
    return after


def _absent(rule: Rule, before: Instance, moment: Moment, known: Known) -> Instance | None:
    if before.state is State.RESOLVED:
        # Stamps may step: a resolution in the future is as old as one cares to keep.
        kept = abs(moment.unix_ns - (before.resolved_unix_ns or 0)) <= RESOLVED_RETENTION_NS
        return before if kept else None
    if before.state is State.FIRING and rule.keep_firing_for_ns:
        observed_ns = moment.observed_ns(before.evaluated_unix_ns)
        absent_ns = 0 if before.absent_ns is None else before.absent_ns + observed_ns
        if absent_ns < rule.keep_firing_for_ns:
            return replace(before, absent_ns=absent_ns, evaluated_unix_ns=moment.unix_ns)
    if before.episode_unix_ns is None:
        return None  # pending, never announced
    if not known(before.labels):
        return replace(before, state=State.UNKNOWN, held_ns=0, absent_ns=None, evaluated_unix_ns=moment.unix_ns)
    return replace(
        before, state=State.RESOLVED, absent_ns=None, resolved_unix_ns=moment.unix_ns, evaluated_unix_ns=moment.unix_ns
    )


def _announce(rule: Rule, instance: Instance, kind: TransitionKind, *, reason: str = "") -> Transition:
    return _announcement(rule.id, rule.expr, instance, kind, reason)


def _announcement(rule_id: str, expr: str, instance: Instance, kind: TransitionKind, reason: str) -> Transition:
    episode_unix_ns = instance.episode_unix_ns or 0
    return Transition(
        id=transition_id(rule_id, instance.fingerprint, episode_unix_ns, kind),
        kind=kind,
        rule_id=rule_id,
        labels=instance.labels,
        annotations=instance.annotations,
        value=instance.value,
        starts_unix_ns=episode_unix_ns,
        ends_unix_ns=instance.resolved_unix_ns if kind is TransitionKind.RESOLVED else None,
        reason=reason,
        expr=expr,
    )

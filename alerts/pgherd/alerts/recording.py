"""The series that rules leave behind: results of recording rules, and `ALERTS` of alerting rules. Pure.

    ALERTS{alertname, alertstate="pending"|"firing", …} 1       as Prometheus
    ALERTS{alertname, alertstate="unknown", …} 1                ours: receivers were told "firing", and now nobody can tell
    ALERTS_FOR_STATE{alertname, …}                              as Prometheus: since when it is active, Unix seconds

"unknown" stands beside Prometheus' own states and never instead of them, so that an expression which keeps an
alert until a lower threshold is passed (`… ALERTS{alertstate=~"firing|unknown"}`) doesn't forget it in a gap.
Source: Prometheus rules/recording.go, RecordingRule.Eval; rules/alerting.go, sample and forStateSample.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pgherd.alerts.model import Instance, QueryRow, RecordingRule, State
from pgherd.proto.errors import PreconditionError
from pgherd.proto.selectors import NAME_LABEL

ALERTS = "ALERTS"
ALERTS_FOR_STATE = "ALERTS_FOR_STATE"
ALERT_STATE_LABEL = "alertstate"

# A label set in canonical form: sorted, without empty values.
Labels = tuple[tuple[str, str], ...]


def canonical(labels: Mapping[str, str]) -> Labels:
    """The one form of a label set by which series are compared."""
    return tuple(sorted((name, value) for name, value in labels.items() if value))


def record(rule: RecordingRule, result: Sequence[QueryRow], *, limit: int = 0) -> dict[Labels, float]:
    """The series that `rule` makes of its expression's result.

    Raises PreconditionError alerts.duplicate when two of them have equal labels, alerts.limit when they are more than
    `limit` (0: none).
    """
    recorded: dict[Labels, float] = {}
    for row in result:
        labels = canonical({**row.labels, NAME_LABEL: rule.record, **rule.labels})
        if labels in recorded:
            raise PreconditionError(
                "alerts.duplicate",
                f"record {rule.record}: two rows have equal labels after the rule's labels are applied",
                hint="make the expression keep a label that tells them apart, or take it out of the rule's labels",
                rule=rule.id,
            )
        recorded[labels] = row.value
    if limit and len(recorded) > limit:
        raise PreconditionError(
            "alerts.limit",
            f"record {rule.record} exceeds its group's limit of {limit} with {len(recorded)} series",
            hint="aggregate the expression or raise the group's limit; until then this rule records nothing",
            rule=rule.id,
            limit=limit,
            series=len(recorded),
        )
    return recorded


def alert_series(instances: Iterable[Instance]) -> dict[Labels, float]:
    """The series that tell how the alerts of a rule stand."""
    series: dict[Labels, float] = {}
    for instance in instances:
        if instance.state is State.RESOLVED:
            continue
        if instance.state in (State.PENDING, State.FIRING):
            series[_alerts(instance, instance.state)] = 1.0
            series[canonical({**instance.labels, NAME_LABEL: ALERTS_FOR_STATE})] = float(
                instance.active_unix_ns // 1_000_000_000
            )
        if instance.state is not State.FIRING and instance.episode_unix_ns is not None:
            series[_alerts(instance, State.UNKNOWN)] = 1.0
    return series


def _alerts(instance: Instance, state: State) -> Labels:
    return canonical({**instance.labels, NAME_LABEL: ALERTS, ALERT_STATE_LABEL: state.value})

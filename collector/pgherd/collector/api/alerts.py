"""Alerts over HTTP: pgherd's own list, and what Prometheus' clients (Grafana) expect.

Own states are four: pending, firing, unknown (was firing; what feeds it is silent) and resolved (lately).
The Prometheus-shaped answers show evaluation as Prometheus would: pending and firing only.
Source: https://prometheus.io/docs/prometheus/latest/querying/api/#rules, #alerts
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query

from pgherd.alerts.gotemplate.gofmt import go_float
from pgherd.alerts.model import Instance, State
from pgherd.alerts.notification import rfc3339
from pgherd.collector.alerting.evaluation import Evaluator
from pgherd.collector.alerting.group import GroupStatus, RecordingStatus, RuleStatus
from pgherd.collector.alerting.silencing import Silencer
from pgherd.proto.clock import Clock

_ZERO_TIME = "0001-01-01T00:00:00Z"  # Go's: never
_SHOWN_BY_PROMETHEUS = (State.PENDING, State.FIRING)
PAGE_MAX = 1000


def alerts_router(
    evaluator: Evaluator, silencer: Silencer, clock: Clock, require: Callable[[str], Callable[..., Any]]
) -> APIRouter:
    """Own routes under /api/v1, to be included by the composition root. `require(scope)` makes the dependency."""
    router = APIRouter(prefix="/api/v1", tags=["alerts"], dependencies=[Depends(require("viewer"))])

    @router.get("/alerts")
    async def alerts(
        state: Annotated[list[State] | None, Query()] = None,
        limit: Annotated[int, Query(ge=1, le=PAGE_MAX)] = 100,
        cursor: Annotated[str | None, Query(max_length=512)] = None,
    ) -> dict[str, Any]:
        """One page of alert instances in a stable order, narrowed to some states."""
        now_unix_ns = clock.wall_unix_ns()
        found = [
            (f"{status.rule.id} {fingerprint}", status, fingerprint, instance)
            for group in evaluator.status()
            for status in group.alerting
            for fingerprint, instance in status.instances.items()
            if state is None or instance.state in state
        ]
        found.sort(key=lambda entry: entry[0])
        page = [entry for entry in found if cursor is None or entry[0] > cursor][: limit + 1]
        more = len(page) > limit
        page = page[:limit]
        return {
            "items": [
                {
                    **_own(status, fingerprint, instance),
                    "silenced_by": silencer.silenced_by(fingerprint, instance.labels, now_unix_ns),
                }
                for _key, status, fingerprint, instance in page
            ],
            "next_cursor": page[-1][0] if more else None,
        }

    return router


def prometheus_alerts_router(evaluator: Evaluator, require: Callable[[str], Callable[..., Any]]) -> APIRouter:
    """GET /prometheus/api/v1/alerts and /rules."""
    router = APIRouter(prefix="/prometheus/api/v1", tags=["prometheus"], dependencies=[Depends(require("viewer"))])

    @router.get("/alerts")
    async def alerts() -> dict[str, Any]:
        """Pending and firing alerts."""
        return _success(
            {"alerts": [alert for group in evaluator.status() for rule in group.alerting for alert in _alerts(rule)]}
        )

    @router.get("/rules")
    async def rules(
        type_: Annotated[Literal["alert", "record"] | None, Query(alias="type")] = None,
        rule_name: Annotated[list[str] | None, Query(alias="rule_name[]")] = None,
        rule_group: Annotated[list[str] | None, Query(alias="rule_group[]")] = None,
        file: Annotated[list[str] | None, Query(alias="file[]")] = None,
        exclude_alerts: bool = False,
    ) -> dict[str, Any]:
        """Groups with their rules."""
        groups = []
        for status in evaluator.status():
            if (rule_group and status.group.name not in rule_group) or (file and status.group.source not in file):
                continue
            shown = [
                rule
                for rule in status.rules
                if type_ in (None, "record" if isinstance(rule, RecordingStatus) else "alert")
                and (not rule_name or _name(rule) in rule_name)
            ]
            if shown or not (type_ or rule_name):
                groups.append(_group(status, shown, exclude_alerts=exclude_alerts))
        return _success({"groups": groups})

    return router


def _success(data: Mapping[str, Any]) -> dict[str, Any]:
    return {"status": "success", "data": data}


def _own(status: RuleStatus, fingerprint: str, instance: Instance) -> dict[str, Any]:
    return {
        "rule": status.rule.alert,
        "group": status.rule.group,
        "rule_id": status.rule.id,
        "fingerprint": fingerprint,
        "labels": dict(instance.labels),
        "annotations": dict(instance.annotations),
        "state": instance.state.value,
        "value": instance.value if math.isfinite(instance.value) else go_float(instance.value),
        "active_unix_ns": instance.active_unix_ns,
        "fired_unix_ns": instance.fired_unix_ns,
        "announced_unix_ns": instance.episode_unix_ns,
        "resolved_unix_ns": instance.resolved_unix_ns,
        "evaluated_unix_ns": instance.evaluated_unix_ns,
    }


def _alerts(status: RuleStatus) -> list[dict[str, Any]]:
    shown = []
    for instance in status.instances.values():
        if instance.state not in _SHOWN_BY_PROMETHEUS:
            continue
        alert: dict[str, Any] = {
            "labels": dict(instance.labels),
            "annotations": dict(instance.annotations),
            "state": instance.state.value,
            "activeAt": rfc3339(instance.active_unix_ns),
            "value": _exponent_form(instance.value),
        }
        if instance.absent_ns is not None:
            alert["keepFiringSince"] = rfc3339(instance.evaluated_unix_ns - instance.absent_ns)
        shown.append(alert)
    return shown


def _name(status: RuleStatus | RecordingStatus) -> str:
    return status.rule.alert if isinstance(status, RuleStatus) else status.rule.record


def _group(status: GroupStatus, rules: list[RuleStatus | RecordingStatus], *, exclude_alerts: bool) -> dict[str, Any]:
    return {
        "name": status.group.name,
        "file": status.group.source,
        "interval": status.group.interval_ns / 1e9,
        "limit": status.group.limit,
        "rules": [
            _rule(rule, exclude_alerts=exclude_alerts) if isinstance(rule, RuleStatus) else _recording(rule) for rule in rules
        ],
        "evaluationTime": status.duration_s,
        "lastEvaluation": _when(status.evaluated_unix_ns),
    }


def _rule(status: RuleStatus, *, exclude_alerts: bool) -> dict[str, Any]:
    states = {instance.state for instance in status.instances.values()}
    state = next((one.value for one in (State.FIRING, State.PENDING) if one in states), "inactive")
    shown: dict[str, Any] = {
        "type": "alerting",
        "name": status.rule.alert,
        "state": state,
        "query": status.rule.expr,
        "duration": status.rule.for_ns / 1e9,
        "keepFiringFor": status.rule.keep_firing_for_ns / 1e9,
        "labels": {name: template.text for name, template in status.rule.labels.items()},
        "annotations": {name: template.text for name, template in status.rule.annotations.items()},
        "health": status.health.value,
        "evaluationTime": status.duration_s,
        "lastEvaluation": _when(status.evaluated_unix_ns),
        "alerts": [] if exclude_alerts else _alerts(status),
    }
    if status.last_error:
        shown["lastError"] = status.last_error
    return shown


def _recording(status: RecordingStatus) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "type": "recording",
        "name": status.rule.record,
        "query": status.rule.expr,
        "labels": dict(status.rule.labels),
        "health": status.health.value,
        "evaluationTime": status.duration_s,
        "lastEvaluation": _when(status.evaluated_unix_ns),
    }
    if status.last_error:
        shown["lastError"] = status.last_error
    return shown


def _when(unix_ns: int | None) -> str:
    return _ZERO_TIME if unix_ns is None else rfc3339(unix_ns)


def _exponent_form(value: float) -> str:
    """Go's strconv.FormatFloat(value, 'e', -1, 64), which Prometheus uses for alerts: "1e+00"."""
    if not math.isfinite(value):
        return go_float(value)
    return next(text for places in range(18) if float(text := f"{value:.{places}e}") == value)

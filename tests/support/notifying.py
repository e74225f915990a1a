"""A notifier over an evaluator: one receiver, groups of one alert, no waiting unless a test says so."""

from __future__ import annotations

from collections.abc import Sequence

from pgherd.alerts.routing import GROUP_BY_EVERYTHING, Inhibition, Route, Routing, Timing
from pgherd.collector.alerting.evaluation import Evaluator
from pgherd.collector.alerting.notifier import Notifier
from pgherd.collector.alerting.silencing import Silencer
from pgherd.proto.clock import Clock
from pgherd.storage.control.store import ControlStore

SECOND_NS = 1_000_000_000


def timing(*, wait_s: float = 0, interval_s: float = 0, repeat_s: float = 4 * 3600) -> Timing:
    return Timing(int(wait_s * SECOND_NS), int(interval_s * SECOND_NS), int(repeat_s * SECOND_NS))


def routing(receiver: str = "hook", *, group_by: Sequence[str] = (GROUP_BY_EVERYTHING,), when: Timing | None = None) -> Routing:
    return Routing((), (Route(receiver, (), tuple(group_by), when or timing()),))


def notifier(
    store: ControlStore,
    evaluator: Evaluator,
    clock: Clock,
    *,
    silencer: Silencer | None = None,
    routes: Routing | None = None,
    inhibitions: Sequence[Inhibition] = (),
    pending_max: int = 100,
    places_max: int = 50_000,
) -> Notifier:
    return Notifier(
        status=evaluator.status,
        store=store,
        routing=routes or routing(),
        silencer=silencer or Silencer(store, clock),
        inhibitions=inhibitions,
        clock=clock,
        pending_max=pending_max,
        places_max=places_max,
    )

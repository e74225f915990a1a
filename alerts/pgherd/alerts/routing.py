"""Where an alert goes: routes, groups and inhibition. Pure.

Routes are tried in their order; the first that matches takes the alert, and the ones after it only if it says so
(`continue_matching`). An alert that no route takes goes to the default routes: no page is lost for want of a rule.
Source: Alertmanager documentation, configuration, <route> and <inhibit_rule>.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pgherd.alerts.matchers import FullMatch, matches
from pgherd.alerts.model import fnv1a_64
from pgherd.proto.selectors import Matcher

GROUP_BY_EVERYTHING = "..."


@dataclass(frozen=True, slots=True)
class Timing:
    """How a group speaks: first `wait_ns` after its first alert, then at most every `interval_ns`; what goes on unchanged
    is told again after `repeat_ns`."""

    wait_ns: int
    interval_ns: int
    repeat_ns: int


@dataclass(frozen=True, slots=True)
class Route:
    """Alerts that match go to `receiver`, in groups of equal `group_by` labels."""

    receiver: str
    matchers: tuple[Matcher, ...]
    group_by: tuple[str, ...]
    timing: Timing
    continue_matching: bool = False


@dataclass(frozen=True, slots=True)
class Routing:
    """All routes; `default` take what none of `routes` does."""

    routes: tuple[Route, ...]
    default: tuple[Route, ...]

    def of(self, labels: Mapping[str, str], full_match: FullMatch) -> list[Route]:
        """The routes that an alert with these labels takes; never none, if there are defaults."""
        taken: list[Route] = []
        for route in self.routes:
            if matches(route.matchers, labels, full_match):
                taken.append(route)
                if not route.continue_matching:
                    return taken
        return taken or list(self.default)


@dataclass(frozen=True, slots=True)
class Place:
    """One group of one route. `digest` is its identity in the control store and in notifications' keys."""

    route: Route
    labels: tuple[tuple[str, str], ...]

    @property
    def digest(self) -> str:
        """16 hexadecimal digits; a group keeps it over restarts and over edits of the route's timing."""
        matchers = [str(matcher) for matcher in self.route.matchers]
        return fnv1a_64((self.route.receiver, *matchers, "", *(text for pair in self.labels for text in pair)))

    @property
    def key(self) -> str:
        """As Alertmanager writes it: the route's matchers and the group's labels."""
        route = ",".join(map(str, self.route.matchers))
        labels = ", ".join(f'{name}="{value}"' for name, value in self.labels)
        return f"{{{route}}}:{{{labels}}}"


def place(route: Route, labels: Mapping[str, str]) -> Place:
    """The group of an alert within a route."""
    names: Iterable[str] = sorted(labels) if GROUP_BY_EVERYTHING in route.group_by else sorted(set(route.group_by))
    return Place(route, tuple((name, labels[name]) for name in names if labels.get(name)))


@dataclass(frozen=True, slots=True)
class Inhibition:
    """While an alert that matches `source` fires, those that match `target` with equal `equal` labels are mute."""

    source: tuple[Matcher, ...]
    target: tuple[Matcher, ...]
    equal: tuple[str, ...]


def inhibited(alerts: Mapping[str, Mapping[str, str]], rules: Sequence[Inhibition], full_match: FullMatch) -> frozenset[str]:
    """Keys of the alerts (key → labels) that another one makes mute; what is on both sides of a rule isn't."""
    muted: set[str] = set()
    for rule in rules:
        sources = {key for key, labels in alerts.items() if matches(rule.source, labels, full_match)}
        held = {tuple(alerts[key].get(name, "") for name in rule.equal) for key in sources}
        if held:
            muted |= {
                key
                for key, labels in alerts.items()
                if key not in sources
                and tuple(labels.get(name, "") for name in rule.equal) in held
                and matches(rule.target, labels, full_match)
            }
    return frozenset(muted)

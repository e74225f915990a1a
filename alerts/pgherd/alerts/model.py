"""What an alert rule, a rule group and an alert instance are. Pure data, frozen.

Words are Prometheus' own (group, rule, `for`, `keep_firing_for`, active since); times are `_unix_ns`,
spans `_ns`. An *episode* is what a receiver sees: it begins with one "firing" and ends with one
"resolved" notification, however often the instance went unknown in between.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from pgherd.alerts.template import Template

ALERT_NAME_LABEL = "alertname"

_FNV_OFFSET = 0xCBF29CE484222325
_FNV_PRIME = 0x100000001B3
_MASK_64 = 0xFFFFFFFFFFFFFFFF


def fnv1a_64(parts: Iterable[str]) -> str:
    """16 hexadecimal digits over `parts`, each ended by the byte 255 that UTF-8 never contains."""
    digest = _FNV_OFFSET
    for part in parts:
        for byte in (*part.encode(), 0xFF):
            digest = ((digest ^ byte) * _FNV_PRIME) & _MASK_64
    return f"{digest:016x}"


def fingerprint_of(labels: Mapping[str, str]) -> str:
    """The identity of an alert: equal to what Alertmanager computes for the same labels.

    Source: prometheus/common, model/fnv.go and LabelSet.Fingerprint (FNV-1a over sorted pairs).
    """
    return fnv1a_64(text for name in sorted(labels) for text in (name, labels[name]))


class State(StrEnum):
    """Where an instance stands. Absent from the table means inactive.

    UNKNOWN: the expression no longer returns it, but what feeds it is silent, so nobody may say it is
    over. RESOLVED instances are kept for a while so that people can see what just ended.
    """

    PENDING = "pending"
    FIRING = "firing"
    UNKNOWN = "unknown"
    RESOLVED = "resolved"


@dataclass(frozen=True, slots=True)
class Rule:
    """One alerting rule. `labels` and `annotations` are compiled templates; `origin` is "file:line"."""

    group: str
    alert: str
    expr: str
    for_ns: int = 0
    keep_firing_for_ns: int = 0
    labels: Mapping[str, Template] = field(default_factory=dict)
    annotations: Mapping[str, Template] = field(default_factory=dict)
    origin: str = ""

    @property
    def id(self) -> str:
        """Stable over restarts and edits of expression, spans and annotations: state survives those.

        The label texts belong to it, because the same alert at two severities is two rules.
        """
        texts = [text for name in sorted(self.labels) for text in (name, self.labels[name].text)]
        return f"{self.group[:80]}/{self.alert[:120]}#{fnv1a_64((self.group, self.alert, *texts))}"


@dataclass(frozen=True, slots=True)
class RecordingRule:
    """One recording rule: the result of `expr` becomes the series `record`. Its labels are plain text, as in Prometheus."""

    group: str
    record: str
    expr: str
    labels: Mapping[str, str] = field(default_factory=dict)
    origin: str = ""

    @property
    def id(self) -> str:
        """Stable over restarts and edits of the expression."""
        texts = [text for name in sorted(self.labels) for text in (name, self.labels[name])]
        return f"{self.group[:80]}/{self.record[:120]}#{fnv1a_64((self.group, self.record, *texts))}"


@dataclass(frozen=True, slots=True)
class Group:
    """Rules evaluated one after the other at one instant, every `interval_ns`; each sees what those before it recorded.

    `limit` bounds the pending and firing instances, or the recorded series, of each rule (0: none). The series are
    read `query_offset_ns` before the instant, for senders that are late. `source` is the file.
    """

    name: str
    interval_ns: int
    rules: tuple[Rule | RecordingRule, ...]
    limit: int = 0
    query_offset_ns: int = 0
    source: str = ""

    @property
    def alerting(self) -> tuple[Rule, ...]:
        """The alerting rules alone."""
        return tuple(rule for rule in self.rules if isinstance(rule, Rule))


@dataclass(frozen=True, slots=True)
class QueryRow:
    """One element of the expression's result vector; `labels` may still hold `__name__`."""

    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class Instance:
    """One alert of one rule: its labels after templating, and how far it has come.

    `active_unix_ns` is when the expression first returned it (shown; never decides). What decides is
    `held_ns`, the time over which it was *observed* to hold, and `absent_ns`, the time since a firing
    instance vanished. `evaluated_unix_ns` is the last evaluation that touched it. `episode_unix_ns` is the
    start of the episode that receivers were told of, None when they know of none.
    """

    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    value: float
    state: State
    active_unix_ns: int
    evaluated_unix_ns: int
    held_ns: int = 0
    absent_ns: int | None = None
    fired_unix_ns: int | None = None
    resolved_unix_ns: int | None = None
    episode_unix_ns: int | None = None

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.labels)


class TransitionKind(StrEnum):
    """What receivers are told."""

    FIRING = "firing"
    RESOLVED = "resolved"


@dataclass(frozen=True, slots=True)
class Transition:
    """One fact to announce, complete in itself: it is stored in the outbox as it is.

    `id` is the idempotency key: the same fact has the same id whoever computes it, and however often.
    `reason` says why an episode ended ("recovered", "rule removed"), empty for FIRING.
    """

    id: str
    kind: TransitionKind
    rule_id: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    value: float
    starts_unix_ns: int
    ends_unix_ns: int | None = None
    reason: str = ""
    expr: str = ""

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.labels)


def transition_id(rule_id: str, fingerprint: str, episode_unix_ns: int, kind: TransitionKind) -> str:
    """ "<fingerprint>.<episode start>.<rule>.<kind>", the idempotency key of a notification."""
    return f"{fingerprint}.{episode_unix_ns}.{rule_id[-16:]}.{kind}"

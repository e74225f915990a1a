"""Whether what feeds an alert is being heard: the pure answer behind `State.UNKNOWN`.

The shell gathers facts once per evaluation; `known` judges an alert's labels by them. Silence of the agent, a
server that isn't seen up and a probe that can't read its values all mean that the end of a condition can't be
told from the end of the news.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from pgherd.proto.selectors import NAME_LABEL

# The labels by which an alert names what feeds it, from the narrowest to the widest.
_SUBJECT_LABELS = ("instance", "node", "cluster", "agent", "agent_id")

# In place of a probe's name: nothing of the server can be read.
EVERYTHING = ""

# Whether the series that a rule reads have a value for an instance now.
InputsHeard = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Watched:
    """One node that pgherd watches: its labels as they stand on its series, and the agent that feeds it.

    An agent's name may stand for two identities after a host joined again; its id may not.
    """

    instance: str
    node: str
    cluster: str
    agent: str
    agent_id: str


@dataclass(frozen=True, slots=True)
class Knowledge:
    """Facts at one instant: what is watched, which agents (ids) are alive, and of the instances (label values)
    which were lately seen up and which probes can't tell their values (EVERYTHING: the server itself can't be asked)."""

    watched: tuple[Watched, ...]
    agents_alive: frozenset[str]
    instances_up: frozenset[str]
    instances_troubled: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def known(self, labels: Mapping[str, str], inputs_heard: InputsHeard, probes: frozenset[str] | None = None) -> bool:
        """Whether everything that `labels` speaks of is heard; `inputs_heard` is asked only when in doubt.

        `probes` yield what the rule reads, None when nobody knows. An instance on which one of them can't tell its values is
        known as far as the rule's own inputs have values: the server refuses a new connection (53300), the agent still says
        so, but what it would have to count is missing. What another probe can't tell (percentiles of a server without
        traffic, a volume that is closed to the agent) is no reason to doubt.
        An alert about nothing that pgherd watches (a foreign client's series, a node taken out of the
        herd, an alert over the whole herd) counts as known: there is nothing to wait for.
        """
        subject = {name: labels[name] for name in _SUBJECT_LABELS if labels.get(name)}
        if not subject:
            return True
        concerned = [one for one in self.watched if all(getattr(one, name) == value for name, value in subject.items())]
        about_agent_only = subject.keys() <= {"agent", "agent_id"}
        return all(
            one.agent_id in self.agents_alive and (about_agent_only or self._instance_known(one.instance, inputs_heard, probes))
            for one in concerned
        )

    def _instance_known(self, instance: str, inputs_heard: InputsHeard, probes: frozenset[str] | None) -> bool:
        if instance not in self.instances_up:
            return False
        troubled = self.instances_troubled.get(instance, frozenset())
        concerned = EVERYTHING in troubled or any(probes is None or _is_one_of(probe, probes) for probe in troubled)
        return not concerned or inputs_heard(instance)


def _is_one_of(probe: str, probes: frozenset[str]) -> bool:
    """Some name themselves more closely: disk_pg_wal is of disk."""
    return probe in probes or probe.partition("_")[0] in probes


def has_risen(labels: Mapping[str, str], before: float, counts: Iterable[tuple[Mapping[str, str], float]]) -> bool:
    """Whether the collector's own counts of a cluster say that an alert of `labels` about it is over, whoever else is silent.

    `before` is what the alert saw last, `counts` is what the rule reads as it stands now. A count of who is heard rises only
    by news: a standby was promoted, so the cluster has a primary, though the old one never comes back. One that
    has fallen may have fallen silent (one of two primaries behind a cut link) and proves nothing.
    """
    if "cluster" not in labels or labels.keys() & {"instance", "node"}:
        return False
    own = [value for series, value in counts if (series.items() - {(NAME_LABEL, series.get(NAME_LABEL))}) <= labels.items()]
    return bool(own) and all(value > before for value in own)


def knowledge(
    watched: Collection[Watched],
    agents_alive: Collection[str],
    instances_up: Collection[str],
    instances_troubled: Mapping[str, Collection[str]] | None = None,
) -> Knowledge:
    """Facts from what the shell read."""
    troubled = {instance: frozenset(probes) for instance, probes in (instances_troubled or {}).items()}
    return Knowledge(tuple(watched), frozenset(agents_alive), frozenset(instances_up), troubled)

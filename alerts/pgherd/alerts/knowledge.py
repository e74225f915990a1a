"""Whether what feeds an alert is being heard: the pure answer behind `State.UNKNOWN`.

The shell gathers facts once per evaluation; `known` judges an alert's labels by them. Silence of the agent, a
server that isn't seen up and a probe that can't read its values all mean that the end of a condition can't be
told from the end of the news.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

# The labels by which an alert names what feeds it, from the narrowest to the widest.
_SUBJECT_LABELS = ("instance", "node", "cluster", "agent", "agent_id")

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
    which were lately seen up and which have a probe that can't tell its values."""

    watched: tuple[Watched, ...]
    agents_alive: frozenset[str]
    instances_up: frozenset[str]
    instances_troubled: frozenset[str] = frozenset()

    def known(self, labels: Mapping[str, str], inputs_heard: InputsHeard) -> bool:
        """Whether everything that `labels` speaks of is heard; `inputs_heard` is asked only when in doubt.

        A troubled instance is known as far as the rule's own inputs have values: the server refuses a new
        connection (53300), the agent still says so, but what it would have to count is missing.
        An alert about nothing that pgherd watches (a foreign client's series, a node taken out of the
        herd, an alert over the whole herd) counts as known: there is nothing to wait for.
        """
        subject = {name: labels[name] for name in _SUBJECT_LABELS if labels.get(name)}
        if not subject:
            return True
        concerned = [one for one in self.watched if all(getattr(one, name) == value for name, value in subject.items())]
        about_agent_only = subject.keys() <= {"agent", "agent_id"}
        return all(
            one.agent_id in self.agents_alive and (about_agent_only or self._instance_known(one.instance, inputs_heard))
            for one in concerned
        )

    def _instance_known(self, instance: str, inputs_heard: InputsHeard) -> bool:
        return instance in self.instances_up and (instance not in self.instances_troubled or inputs_heard(instance))


def knowledge(
    watched: Collection[Watched],
    agents_alive: Collection[str],
    instances_up: Collection[str],
    instances_troubled: Collection[str] = (),
) -> Knowledge:
    """Facts from what the shell read."""
    return Knowledge(tuple(watched), frozenset(agents_alive), frozenset(instances_up), frozenset(instances_troubled))

"""What the owner of this host lets the collector ask for. Pure.

Never broken:

- the answer depends on the local configuration and the offer, never on anything else the collector says;
- a verb that isn't allowed by name is denied, also one that a later version adds;
- an epoch smaller than one that was seen is refused, whatever the policy says.

Configuration can widen or narrow; only a local file can do either.
"""

from __future__ import annotations

from dataclasses import dataclass

from pgherd.agent.config import PolicyConfig
from pgherd.proto.commands import Offer, Restore, policy_name
from pgherd.proto.errors import ConfigError, DeniedError

# Restoring into a directory is allowed by default because it needs a root that the owner named first.
DEFAULTS = {
    "ping": True,
    "diagnostics": True,
    "backup.run": True,
    "backup.verify": True,
    "restore.scratch": True,
    "restore.directory": True,
}


@dataclass(frozen=True, slots=True)
class Policy:
    """The policy in force: names of verbs that are allowed, and of restore roots."""

    allowed: frozenset[str]
    restore_roots: frozenset[str] = frozenset()

    def verbs_allowed(self) -> tuple[str, ...]:
        """What the collector is told, for display: a directory restore without any root isn't possible."""
        return tuple(sorted(name for name in self.allowed if name != "restore.directory" or self.restore_roots))


def policy_of(config: PolicyConfig) -> Policy:
    """The defaults with the owner's overrides. Raises ConfigError config.invalid for a name that isn't one:
    a `deny` that a typo turned into nothing would be found out too late.
    """
    unknown = sorted(set(config.verbs) - set(DEFAULTS))
    if unknown:
        raise ConfigError(
            "config.invalid",
            f"policy.verbs names no verb: {', '.join(unknown)}",
            hint=f"the names are {', '.join(DEFAULTS)}",
            key=f"policy.verbs.{unknown[0]}",
        )
    answers = DEFAULTS | {name: answer == "allow" for name, answer in config.verbs.items()}
    return Policy(frozenset(name for name, allowed in answers.items() if allowed), frozenset(config.restore_roots))


def decide(offer: Offer, policy: Policy, seen_epoch: int) -> DeniedError | None:
    """None to allow; else why not (command.denied | command.stale_epoch | restore.outside_roots).

    `seen_epoch` is the highest leadership epoch seen for the offer's node; 0 in the offer claims none.
    """
    name = policy_name(offer.verb)
    if name not in policy.allowed:
        return DeniedError(
            "command.denied",
            f"this host's policy doesn't allow {name}",
            hint=f'its owner can allow it: policy.verbs."{name}" = "allow" in the agent\'s file',
            verb=name,
        )
    if 0 < offer.epoch < seen_epoch:
        return DeniedError(
            "command.stale_epoch",
            f"epoch {offer.epoch} is over; {seen_epoch} was seen",
            epoch=offer.epoch,
            seen_epoch=seen_epoch,
        )
    if isinstance(offer.verb, Restore) and offer.verb.root and offer.verb.root not in policy.restore_roots:
        roots = ", ".join(sorted(policy.restore_roots)) or "none are configured"
        return DeniedError(
            "restore.outside_roots",
            f"{offer.verb.root!r} isn't one of this host's restore roots",
            hint=f"restore roots: {roots}",
            root=offer.verb.root,
        )
    return None

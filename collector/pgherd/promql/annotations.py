"""What a query's answer says beside its value: warnings and infos, in Prometheus' words.

Source: Prometheus documentation, "HTTP API" (warnings, infos); the texts clients show to people.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# As many of a kind are told as Prometheus tells; a count stands for the rest.
TOLD_MAX = 10


@dataclass(frozen=True, slots=True)
class Annotations:
    """Collected while a query is evaluated, each text once, in the order of their first appearance."""

    _warnings: dict[str, None] = field(default_factory=dict)
    _infos: dict[str, None] = field(default_factory=dict)

    def warn(self, text: str) -> None:
        """The answer is probably not what was meant."""
        self._warnings[f"PromQL warning: {text}"] = None

    def inform(self, text: str) -> None:
        """The expression may not mean what its author thinks."""
        self._infos[f"PromQL info: {text}"] = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """At most TOLD_MAX of them and the number of those left out."""
        return _told(self._warnings, "warning")

    @property
    def infos(self) -> tuple[str, ...]:
        """At most TOLD_MAX of them and the number of those left out."""
        return _told(self._infos, "info")


def _told(texts: dict[str, None], kind: str) -> tuple[str, ...]:
    told = list(texts)[:TOLD_MAX]
    left = len(texts) - len(told)
    return (*told, f"{left} more {kind} annotations omitted") if left else tuple(told)

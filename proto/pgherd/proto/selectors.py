"""Label matchers: the one vocabulary between PromQL, the HTTP API and the series store."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

NAME_LABEL = "__name__"


class MatchOp(StrEnum):
    """Prometheus' four operators; regular expressions are anchored at both ends."""

    EQUAL = "="
    NOT_EQUAL = "!="
    REGEX = "=~"
    NOT_REGEX = "!~"


@dataclass(frozen=True, slots=True)
class Matcher:
    """`name op value`; a series without the label counts as having the empty value."""

    name: str
    op: MatchOp
    value: str

    def __str__(self) -> str:
        escaped = self.value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'{self.name}{self.op}"{escaped}"'

"""Whether rules read series that exist. Pure.

A rule over a series that nobody emits never fires and never complains: a misspelt name, a metric that a major version
of PostgreSQL took away. `Emitted` says what agents and collector can emit, by major version; it is generated from the
probe catalogue and the code (docs/generate.py → emitted.json).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources

from pgherd.alerts.model import Group, RecordingRule, Rule
from pgherd.alerts.recording import ALERTS, ALERTS_FOR_STATE

# The names of the metrics that an expression reads; empty when a selector names none.
Reads = Callable[[str], frozenset[str]]


@dataclass(frozen=True, slots=True)
class Emitted:
    """What can be in the series store without foreign senders.

    `majors` are the supported major versions; `series` are names with the majors whose servers yield them; names that begin
    with one of `families` follow the server's own vocabulary (its settings). `probes` says which probe yields a name, as
    pgherd_probe_unknown calls it or begins to; none for what the collector makes.
    """

    majors: frozenset[int]
    series: Mapping[str, frozenset[int]]
    families: tuple[str, ...] = ()
    probes: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def majors_of(self, name: str) -> frozenset[int]:
        """The majors that yield `name`; empty when none does."""
        if name.startswith(self.families):
            return self.majors
        return self.series.get(name, frozenset())


@dataclass(frozen=True, slots=True)
class Finding:
    """One series of one rule that isn't emitted, or only by some majors (`missing`)."""

    origin: str
    rule: str
    series: str
    missing: frozenset[int]
    nowhere: bool
    hint: str = ""

    def __str__(self) -> str:
        if not self.series:
            return f"{self.origin}: {self.rule}: a selector names no metric, so nobody can tell what it reads"
        if self.nowhere:
            return f"{self.origin}: {self.rule}: no supported version emits {self.series}" + (
                f"; {self.hint}" if self.hint else ""
            )
        versions = ", ".join(map(str, sorted(self.missing)))
        return f"{self.origin}: {self.rule}: {self.series} isn't emitted by PostgreSQL {versions}"


@cache
def emitted_by_pgherd() -> Emitted:
    """The shipped list."""
    text = (resources.files("pgherd.alerts") / "rules" / "emitted.json").read_text(encoding="utf-8")
    document = json.loads(text)
    majors = frozenset(document["majors"])
    facts = document["series"]
    return Emitted(
        majors,
        {name: majors - set(fact["missing_in"]) for name, fact in facts.items()},
        tuple(document["families"]),
        {name: frozenset(fact["probes"]) for name, fact in facts.items()},
    )


def lint(groups: Iterable[Group], reads: Reads, emitted: Emitted) -> tuple[Finding, ...]:
    """What the rules read and nobody emits, in the order of the rules. Series that the rules record themselves exist."""
    groups = tuple(groups)
    rules = [rule for group in groups for rule in group.rules]
    recorded = {rule.record for rule in rules if isinstance(rule, RecordingRule)} | {ALERTS, ALERTS_FOR_STATE}
    return tuple(finding for rule in rules for finding in _of_rule(rule, reads(rule.expr), recorded, emitted))


def _of_rule(rule: Rule | RecordingRule, names: frozenset[str], recorded: set[str], emitted: Emitted) -> Sequence[Finding]:
    called = rule.alert if isinstance(rule, Rule) else rule.record
    if not names:
        return [Finding(rule.origin, called, "", frozenset(), nowhere=False)]
    findings = []
    for name in sorted(names - recorded):
        majors = emitted.majors_of(name)
        if majors == emitted.majors:
            continue
        close = difflib.get_close_matches(name, emitted.series, n=1)
        hint = f"did you mean {close[0]}?" if close and not majors else ""
        findings.append(Finding(rule.origin, called, name, emitted.majors - majors, nowhere=not majors, hint=hint))
    return findings

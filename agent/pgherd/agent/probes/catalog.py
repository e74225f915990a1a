"""The probe catalogue: which statement is asked of which major version, and what its columns mean.

The questions live in `catalog/*.toml` beside this file, a file per family; this module reads them once and
chooses per server. Nothing here talks to a server.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

from pgherd.proto.samples import Metric, MetricKind

OLDEST_MAJOR = 13  # best effort below 15; 15, 17 and 18 are tested
TESTED_MAJORS = (15, 17, 18)

Tier = Literal["live", "cycle", "slow"]
TIERS: tuple[Tier, ...] = ("live", "cycle", "slow")
Shape = Literal["columns", "settings"]


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a probe's answer that becomes samples: of `metrics` (several spellings of one thing)."""

    column: str
    metrics: tuple[Metric, ...]
    labels: tuple[str, ...]
    constants: Mapping[str, str]  # labels that don't come from the row


@dataclass(frozen=True, slots=True)
class Probe:
    """One statement and how to read its rows."""

    name: str
    family: str
    sql: str
    prefix: str
    tier: Tier
    shape: Shape
    columns: tuple[Column, ...]
    reset: str  # column with the counters' start as epoch seconds, "" when there is none
    unknown: str  # column that says why a value is missing, "" when there is none
    texts: tuple[str, ...]  # labels that hold SQL text: normalised before anything else sees them
    grant: str  # what a role needs that this question is hidden from
    from_major: int
    until_major: int


@dataclass(frozen=True, slots=True)
class Catalog:
    """All probes of all versions."""

    probes: tuple[Probe, ...]

    def for_major(self, major: int) -> tuple[Probe, ...]:
        """The probes for a server of this major version; a major newer than all gets the newest known."""
        return tuple(probe for probe in self.probes if probe.from_major <= major <= probe.until_major)


def load_catalog(text: str | None = None) -> Catalog:
    """The built-in catalogue in the order of its tiers, or one given as TOML text (tests)."""
    texts = [text] if text is not None else _built_in()
    probes = [
        _probe(entry, document.get("metrics", {})) for document in map(tomllib.loads, texts) for entry in document["probe"]
    ]
    return Catalog(tuple(sorted(probes, key=lambda probe: TIERS.index(probe.tier))))


def _built_in() -> list[str]:
    directory = resources.files(__package__).joinpath("catalog")
    files = sorted((entry for entry in directory.iterdir() if entry.name.endswith(".toml")), key=lambda entry: entry.name)
    return [entry.read_text(encoding="utf-8") for entry in files]


def _probe(entry: Mapping[str, Any], shared: Mapping[str, Any]) -> Probe:
    labels = tuple(entry.get("labels", ()))
    metrics = entry.get("metrics", {})
    if isinstance(metrics, str):  # several spellings of one probe share one table
        metrics = shared[metrics]
    return Probe(
        name=entry["name"],
        family=entry["family"],
        sql=entry["sql"].strip(),
        prefix=entry["prefix"],
        tier=entry.get("tier", "cycle"),
        shape=entry.get("shape", "columns"),
        columns=tuple(_column(name, facts, entry["prefix"], labels) for name, facts in metrics.items()),
        reset=entry.get("reset", ""),
        unknown=entry.get("unknown", ""),
        texts=tuple(entry.get("texts", ())),
        grant=entry.get("grant", "pg_monitor"),
        from_major=entry.get("from_major", 0),
        until_major=entry.get("until_major", 1_000),
    )


def _column(name: str, facts: Mapping[str, Any], prefix: str, labels: tuple[str, ...]) -> Column:
    names = (facts.get("name", f"{prefix}{name}"), *facts.get("aliases", ()))
    kind = MetricKind(facts.get("kind", "gauge"))
    metrics = tuple(Metric(metric_name, kind, facts["help"], facts.get("unit", "")) for metric_name in names)
    return Column(facts.get("column", name), metrics, tuple(facts.get("labels", labels)), facts.get("constants", {}))

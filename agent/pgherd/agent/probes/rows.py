"""From a probe's rows to samples. Pure.

Never broken: a NULL gives no sample (unknown is a value, and it is not 0); a value that isn't a finite
number gives none either; label values are text, NULL is "".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from pgherd.agent.probes.catalog import Probe
from pgherd.agent.probes.normalise import normalise
from pgherd.proto.samples import Metric, MetricKind, Sample

Row = Mapping[str, Any]

PROBE_UNKNOWN = Metric(
    "pgherd_probe_unknown",
    MetricKind.GAUGE,
    "1 while a probe can't know a value, with the reason, and the grant that would help",
)

_SECONDS = {"us": 1e-6, "ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES_OF_SUFFIX = {"B": 1, "kB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30, "TB": 1 << 40}


def samples_of(probe: Probe, rows: Iterable[Row]) -> list[Sample]:
    """The samples that a probe's answer holds."""
    if probe.shape == "settings":
        return [sample for row in rows if (sample := setting_sample(probe.prefix, row)) is not None]
    return [sample for row in rows for sample in _row_samples(probe, row)]


def unknown_reason(probe: Probe, rows: Iterable[Row]) -> str:
    """Why this probe's answer lacks a value; "" when it lacks none."""
    if not probe.unknown:
        return ""
    return next((str(row[probe.unknown]) for row in rows if row[probe.unknown] is not None), "")


def unknown_sample(probe: str, reason: str, grant: str = "") -> Sample:
    """That a probe can't know a value now, why, and what the role would need."""
    return Sample(PROBE_UNKNOWN, {"probe": probe, "reason": reason} | ({"grant": grant} if grant else {}), 1.0)


def _row_samples(probe: Probe, row: Row) -> Iterable[Sample]:
    start_unix_ns = 0
    if probe.reset and row[probe.reset] is not None:
        start_unix_ns = int(float(row[probe.reset]) * 1_000_000_000)
    labels_of: dict[tuple[str, ...], dict[str, str]] = {}  # shared by the row's samples: told apart once, encoded once
    for column in probe.columns:
        value = row.get(column.column)  # older majors share a metrics table but lack some columns
        if value is None:
            continue
        number = float(value)
        if not math.isfinite(number):
            continue
        labels = labels_of.get(column.labels)
        if labels is None:
            labels = labels_of[column.labels] = _labels(probe, row, column.labels)
        if column.constants:
            labels = {**labels, **column.constants}
        for metric in column.metrics:
            counter = metric.kind is MetricKind.COUNTER
            yield Sample(metric, labels, number, start_unix_ns if counter else 0)


def _labels(probe: Probe, row: Row, names: tuple[str, ...]) -> dict[str, str]:
    return {name: normalise(_text(row[name])) if name in probe.texts else _text(row[name]) for name in names}


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def setting_sample(prefix: str, row: Row) -> Sample | None:
    """A numeric or boolean setting in base units, as postgres_exporter names it; None when it has neither.

    Bytes and seconds get the suffix `_bytes` or `_seconds`; -1 ("off", "unlimited") stays -1 in any unit.
    """
    name = str(row["name"]).replace(".", "_").replace("-", "_")
    setting, unit = str(row["setting"]), str(row["unit"])
    help_text = f"Server Parameter: {row['name']}"
    if row["vartype"] == "bool":
        return Sample(Metric(f"{prefix}{name}", MetricKind.GAUGE, help_text), {}, 1.0 if setting == "on" else 0.0)
    try:
        value = float(setting)
    except ValueError:
        return None  # an extension's parameter that isn't what its type says
    if not math.isfinite(value):
        return None
    if not unit:
        return Sample(Metric(f"{prefix}{name}", MetricKind.GAUGE, help_text), {}, value)
    factor, suffix, ucum = _unit(unit)
    if not suffix:
        return None
    metric = Metric(f"{prefix}{name}_{suffix}", MetricKind.GAUGE, f"{help_text} [Units converted to {suffix}.]", ucum)
    return Sample(metric, {}, value if value == -1 else value * factor)


def _unit(unit: str) -> tuple[float, str, str]:
    if unit in _SECONDS:
        return _SECONDS[unit], "seconds", "s"
    digits = unit.rstrip("kMGTB")
    factor = _BYTES_OF_SUFFIX.get(unit.removeprefix(digits))
    if factor is None or (digits and not digits.isdigit()):
        return 0.0, "", ""
    return float(int(digits or 1) * factor), "bytes", "By"

"""Reader of tests/golden/*.promql: series to load and expressions with the answers they must give.

load 15s                                   one sample per step from time 0
  name{label="value"}  0+10x4 _ stale NaN  start+increment x repeats; `_` is no sample, `stale` a marker
instant 5m: expression                     then one line per element, `scalar 1`, `string text` or `! code`
range 0s to 5m step 1m: expression         then one line per series with one value per step
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pgherd.promql.durations import parse_duration_ms
from pgherd.promql.parse import parse_selector
from pgherd.proto.samples import STALE_NAN
from support.memory_series import MemorySeries

_HEAD = re.compile(r"(?:instant (?P<at>\S+)|range (?P<start>\S+) to (?P<end>\S+) step (?P<step>\S+)): (?P<expr>.*)")
_EXPANDED = re.compile(r"(?P<first>[^x]+?)(?:(?P<increment>[+-][\d.]+))?x(?P<repeats>\d+)")
_LABELLED = re.compile(r"(?P<series>[\w:]*(?:\{.*\})?)\s+(?P<values>.*)")

Labels = frozenset[tuple[str, str]]


@dataclass(slots=True)
class Case:
    """One expression; exactly one kind of expectation is used."""

    where: str
    expr: str
    start_ms: int
    end_ms: int
    step_ms: int | None  # None: instant
    series: dict[Labels, list[float | None]] = field(default_factory=dict)
    scalar: float | None = None
    string: str | None = None
    error: str | None = None


def read_script(path: Path) -> tuple[MemorySeries, list[Case]]:
    """The loaded source and the cases of a file."""
    source = MemorySeries()
    cases: list[Case] = []
    load_step_ms = 0
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        if text.startswith("load "):
            load_step_ms = parse_duration_ms(text.removeprefix("load "), "load")
        elif head := _HEAD.fullmatch(text):
            cases.append(_case(f"{path.name}:{number}", head))
        elif cases:
            _expect(cases[-1], text)
        else:
            labels, values = _labelled(text)
            samples = [(index * load_step_ms, value) for index, value in enumerate(values) if value is not None]
            source.add(dict(labels), samples)
    return source, cases


def _milliseconds(text: str) -> int:
    # "7m59.999s": the test files need moments between milliseconds' neighbours, the API's durations have no fractions.
    total = 0
    for count, unit in re.findall(r"([\d.]+)([hms])", text):
        total += round(float(count) * {"h": 3_600_000, "m": 60_000, "s": 1000}[unit])
    return total


def _case(where: str, head: re.Match[str]) -> Case:
    if head["at"] is not None:
        at_ms = _milliseconds(head["at"])
        return Case(where, head["expr"], at_ms, at_ms, None)
    return Case(where, head["expr"], _milliseconds(head["start"]), _milliseconds(head["end"]), _milliseconds(head["step"]))


def _expect(case: Case, text: str) -> None:
    if text.startswith("! "):
        case.error = text.removeprefix("! ")
    elif text.startswith("scalar "):
        case.scalar = float(text.removeprefix("scalar "))
    elif text.startswith("string "):
        case.string = text.removeprefix("string ")
    else:
        labels, values = _labelled(text)
        case.series[labels] = values


def _labelled(text: str) -> tuple[Labels, list[float | None]]:
    found = _LABELLED.fullmatch(text)
    if found is None:
        raise ValueError(f"neither a series nor an expectation: {text}")
    series = found["series"]
    labels: Labels = frozenset()
    if series != "{}":
        labels = frozenset((matcher.name, matcher.value) for matcher in parse_selector(series))
    return labels, list(_values(found["values"].split()))


def _values(tokens: Sequence[str]) -> Iterator[float | None]:
    for token in tokens:
        expanded = _EXPANDED.fullmatch(token)
        if expanded is None:
            yield _value(token)
            continue
        first, increment = _value(expanded["first"]), float(expanded["increment"] or 0)
        for index in range(int(expanded["repeats"]) + 1):
            yield None if first is None else first + index * increment


def _value(token: str) -> float | None:
    if token == "_":
        return None
    return STALE_NAN if token == "stale" else float(token)

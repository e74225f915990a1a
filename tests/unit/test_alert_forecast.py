"""The shipped DiskForecast and DiskSpace at their full length, over synthetic volumes, through the real engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from pgherd.alerts.load import builtin_files
from support.rulebench import RuleBench

SIZE = 1e12
LABELS = {
    "job": "pgherd",
    "instance": "a:5432",
    "cluster": "c",
    "node": "a",
    "mountpoint": "/data",
    "path_kind": "data_directory",
}


def states_over(bench: RuleBench, used_ratio: Callable[[float], float], hours: float, step_s: float = 60) -> list[set[str]]:
    """The alerts that stand after each evaluation of a volume used to `used_ratio(seconds)`."""
    seen = []
    for turn in range(int(hours * 3600 / step_s)):
        used = used_ratio(turn * step_s)
        bench.turn(
            ({"__name__": "pgherd_disk_avail_bytes", **LABELS}, SIZE * (1 - used)),
            ({"__name__": "pgherd_disk_used_ratio", **LABELS}, used),
            after_s=step_s,
        )
        seen.append(
            {
                f"{row.rule.alert} {one.state}"
                for g in bench.evaluator.status()
                for row in g.alerting
                for one in row.instances.values()
            }
        )
    assert not any(bench.errors())
    return seen


@pytest.fixture
def forecast(tmp_path: Path) -> RuleBench:
    return RuleBench(tmp_path, builtin_files()["builtin/forecast.yaml"])


def test_steady_growth_is_forecast_within_the_time_it_needs_to_know(forecast: RuleBench) -> None:
    """Full in 20 hours from the start: said after 45 minutes of data and ten of agreement, not before."""
    seen = states_over(forecast, lambda s: 0.65 + 0.35 * s / (20 * 3600), 1.2)
    first = next(turn for turn, states in enumerate(seen) if "DiskForecast firing" in states)
    assert 54 <= first <= 58


@pytest.mark.parametrize(
    "used_ratio",
    [
        pytest.param(lambda _s: 0.95, id="flat"),
        pytest.param(lambda s: 0.70 + 0.08 * (s % 300) / 300, id="teeth of five minutes"),
        pytest.param(lambda s: 0.70 + 0.08 * (s % 840) / 840, id="teeth of fourteen minutes"),
        pytest.param(lambda s: 0.70 + 0.05 * math.sin(s / 90), id="waves"),
        pytest.param(lambda s: 0.65 + 0.35 * s / (60 * 3600), id="full in 60 hours"),
        pytest.param(lambda s: 0.30 + 0.20 * s / (4 * 3600), id="growing, but half empty"),
        pytest.param(lambda s: 0.80 - 0.10 * s / (4 * 3600), id="shrinking"),
    ],
)
def test_what_doesnt_run_full_within_a_day_is_not_forecast(forecast: RuleBench, used_ratio: Callable[[float], float]) -> None:
    assert not any("DiskForecast firing" in states for states in states_over(forecast, used_ratio, 3))


def freed_and_taken_again(s: float) -> float:
    """Used to 75 %; every 35 minutes a job frees a tenth of the volume and takes it again 13 minutes later."""
    return 0.75 - 0.10 * (s % 2100 < 780)


def test_only_the_envelope_sees_that_space_which_is_freed_for_minutes_was_never_the_volumes(tmp_path: Path) -> None:
    """Lines through what is free fall for a quarter of an hour over half an hour and over an hour; the least of what is free doesn't."""
    shipped = builtin_files()["builtin/forecast.yaml"]
    without = shipped.replace("min_over_time(pgherd_disk_avail_bytes[15m])", "min_over_time(pgherd_disk_avail_bytes[1m])")
    assert without != shipped
    told = []
    for number, rules in enumerate((shipped, without)):
        directory = tmp_path / str(number)
        directory.mkdir()
        told.append(
            any(
                "DiskForecast firing" in states for states in states_over(RuleBench(directory, rules), freed_and_taken_again, 3)
            )
        )
    assert told == [False, True]


@pytest.mark.parametrize("period_s", [60, 600, 3600])
def test_a_sawtooth_around_the_threshold_makes_one_transition(tmp_path: Path, period_s: float) -> None:
    """80 % ± 2 points (to 78.4, just above where it ends) for six hours."""
    bench = RuleBench(tmp_path, builtin_files()["builtin/capacity.yaml"])
    bench.turn(({"__name__": "pgherd_disk_used_ratio", **LABELS}, 0.5))
    seen = states_over(bench, lambda s: 0.8 + 0.016 * (2 * (s % period_s) / period_s - 1), 6, step_s=30)
    firing = ["DiskSpace firing" in states for states in seen]
    changes = sum(before != after for before, after in pairwise(firing))
    assert changes <= 1

"""What rules write: recorded series, ALERTS, and an alert that stays until a lower threshold is passed."""

from __future__ import annotations

from pathlib import Path

import pytest

from pgherd.alerts.knowledge import Knowledge, Watched
from support.alerts import START_UNIX_NS
from support.rulebench import RuleBench

A, B = {"__name__": "x", "node": "a"}, {"__name__": "x", "node": "b"}


CHAIN = """
groups:
- name: g
  labels: {team: dba}
  rules:
  - record: x:sum
    expr: sum(x)
    labels: {unit: n}
  - record: x:twice
    expr: x:sum * 2
  - alert: Big
    expr: x:twice > 10
  - record: alerts:firing
    expr: count(ALERTS{alertstate="firing"})
"""


def test_later_rules_see_what_earlier_ones_recorded_at_the_same_instant(tmp_path: Path) -> None:
    bench = RuleBench(tmp_path, CHAIN)
    assert bench.turn((A, 2.0), (B, 4.0)) == 1
    assert bench.stored("x:sum") == {"team=dba,unit=n": 6.0}
    assert bench.stored("x:twice") == {"team=dba,unit=n": 12.0}
    assert bench.stored("ALERTS") == {"alertname=Big,alertstate=firing,team=dba,unit=n": 1.0}
    assert bench.stored("ALERTS_FOR_STATE") == {"alertname=Big,team=dba,unit=n": START_UNIX_NS // 10**9 + 15}
    assert bench.stored("alerts:firing") == {"team=dba": 1.0}


def test_a_full_series_store_blinds_no_rule(tmp_path: Path) -> None:
    bench = RuleBench(tmp_path, CHAIN)
    bench.series.full = True
    assert bench.turn((A, 6.0)) == 1
    assert bench.stored("x:sum") == {}
    bench.series.full = False
    assert bench.turn((A, 1.0)) == 1, "resolved"
    assert bench.stored("x:sum") == {"team=dba,unit=n": 1.0}


RECORD = "groups:\n- name: g\n  rules:\n  - record: y\n    expr: x > 1\n"


def test_an_element_that_vanishes_ends_with_a_stale_marker(tmp_path: Path) -> None:
    bench = RuleBench(tmp_path, RECORD)
    bench.turn((A, 2.0), (B, 3.0))
    assert bench.stored("y") == {"node=a": 2.0, "node=b": 3.0}
    bench.turn((A, 0.0), (B, 3.0))
    assert bench.stored("y") == {"node=b": 3.0}
    bench.restart()
    bench.turn((A, 0.0), (B, 0.0))
    assert bench.stored("y") == {}, "also across a kill"


def test_equal_labels_and_the_limit_are_errors_and_record_nothing(tmp_path: Path) -> None:
    bench = RuleBench(tmp_path, RECORD + "    labels: {node: same}\n")
    bench.turn((A, 2.0), (B, 3.0))
    assert "equal labels" in bench.errors()[0]
    assert bench.stored("y") == {}
    bench.rules = RECORD.replace("- name: g", "- name: g\n  limit: 1")
    bench.restart()
    bench.turn((A, 2.0), (B, 0.0))
    assert bench.stored("y") == {"node=a": 2.0}
    bench.turn((A, 2.0), (B, 3.0))
    assert "limit of 1 with 2 series" in bench.errors()[0]
    assert bench.stored("y") == {"node=a": 2.0}


def test_query_offset_reads_and_writes_earlier(tmp_path: Path) -> None:
    bench = RuleBench(tmp_path, RECORD.replace("- name: g", "- name: g\n  query_offset: 10s"))
    bench.turn((A, 2.0))
    assert bench.series.samples.keys() == {tuple(sorted(A.items()))}, "the sample lies after the instant that is read"
    bench.turn((A, 3.0))
    (times,) = [samples for labels, samples in bench.series.samples.items() if ("__name__", "y") in labels]
    assert times == [(bench.now_ms - 10_000, 2.0)]


def test_alerts_series_follow_the_state(tmp_path: Path) -> None:
    bench = RuleBench(tmp_path, "groups:\n- name: g\n  rules:\n  - alert: Big\n    expr: x > 1\n    for: 30s\n")
    seen = []
    for value in (2, 2, 2, 0):
        bench.turn((A, float(value)))
        seen.append(sorted(labels.split(",")[1] for labels in bench.stored("ALERTS")))
    assert seen == [["alertstate=pending"], ["alertstate=pending"], ["alertstate=firing"], []]


HYSTERESIS = """
groups:
- name: g
  rules:
  - alert: DiskSpace
    expr: >-
      x > 0.80
      or (x > 0.775 and on (node) ALERTS{alertname="DiskSpace", alertstate=~"firing|unknown"})
    for: 30s
"""


def _sawtooth(bench: RuleBench, *, periods: int, period: int, kill_every: int) -> int:
    """Rise from 78 to 82 % and fall back, `periods` times, evaluated `period` times each way; the number of transitions."""
    ramp = [0.78 + 0.04 * step / period for step in range(period)]
    transitions = 0
    for turn, value in enumerate((ramp + ramp[::-1]) * periods):
        transitions += bench.turn((A, value))
        if turn % kill_every == kill_every - 1:
            bench.restart()
    return transitions


@pytest.mark.parametrize("period", [3, 10, 80])
@pytest.mark.parametrize("kill_every", [7, 1_000_000])
def test_a_sawtooth_around_the_threshold_is_one_transition(tmp_path: Path, period: int, kill_every: int) -> None:
    """Whether it swings faster or slower than `for` and lookback, and with the collector killed in between."""
    bench = RuleBench(tmp_path, HYSTERESIS)
    assert _sawtooth(bench, periods=6, period=period, kill_every=kill_every) <= 1
    if period > 3:
        assert bench.states() == ["firing"]
    assert bench.turn((A, 0.77)) == (1 if period > 3 else 0), "and below the lower threshold it ends"


def test_without_the_lower_threshold_a_sawtooth_flaps(tmp_path: Path) -> None:
    bench = RuleBench(tmp_path, "groups:\n- name: g\n  rules:\n  - alert: DiskSpace\n    expr: x > 0.80\n    for: 30s\n")
    assert _sawtooth(bench, periods=6, period=10, kill_every=1_000_000) > 6


def test_what_was_told_and_isnt_known_stands_as_unknown_in_alerts(tmp_path: Path) -> None:
    facts = Knowledge((Watched("a:5432", "a", "main", "agent", "id"),), frozenset(), frozenset())
    bench = RuleBench(tmp_path, HYSTERESIS, facts=lambda _at_ms: facts)
    for _ in range(3):
        bench.turn((A, 0.81))
    bench.turn(after_s=301)
    assert bench.states() == ["unknown"]
    assert list(bench.stored("ALERTS")) == ["alertname=DiskSpace,alertstate=unknown,node=a"]
    bench.turn((A, 0.79))
    assert bench.states() == ["pending"], "back between the thresholds it is the same alert, not over"
    assert sorted(bench.stored("ALERTS")) == [f"alertname=DiskSpace,alertstate={s},node=a" for s in ("pending", "unknown")]


def test_an_alert_that_outlives_a_long_outage_keeps_its_lower_threshold(tmp_path: Path) -> None:
    bench = RuleBench(tmp_path, HYSTERESIS)
    for _ in range(4):
        bench.turn((A, 0.81))
    assert bench.states() == ["firing"]
    bench.clock.advance(3600)  # longer than the lookback: the stored ALERTS is out of sight
    bench.restart()
    assert bench.turn((A, 0.79)) == 0
    assert bench.states() == ["firing"]

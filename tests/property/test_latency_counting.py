"""What the latency estimator is built of: exact binomial bounds, buckets, and the tracker that counts each statement once."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pgherd.agent.latency.bounds import incomplete_beta, share_bounds
from pgherd.agent.latency.buckets import MAX_INDEX, MIN_INDEX, Buckets, index_of, lower_bound, middle
from pgherd.agent.latency.observation import Backend, Look, look_of
from pgherd.agent.latency.window import BACKENDS_MAX, CUT_S, QUERY_IDS_MAX, Chance, Tracker, Window
from support.latency import Client, Statement, observe

# ---- bounds


def binomial_at_least(hits: int, trials: int, share: float) -> float:
    return sum(math.comb(trials, k) * share**k * (1 - share) ** (trials - k) for k in range(hits, trials + 1))


@settings(deadline=None)
@given(st.integers(1, 60), st.data())
def test_the_incomplete_beta_function_is_the_binomial_tail(trials: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(1, trials))
    share = data.draw(st.floats(0.001, 0.999))
    assert incomplete_beta(share, hits, trials - hits + 1) == pytest.approx(binomial_at_least(hits, trials, share), abs=1e-9)


@pytest.mark.parametrize("trials", [100, 250, 700])
@pytest.mark.parametrize("share", [0.003, 0.009, 0.01, 0.0101, 0.02, 0.3])
def test_each_side_holds_the_truth_as_often_as_it_says(trials: int, share: float) -> None:
    """Summed over all outcomes, not simulated: the chance that a side misses is at most 5 %."""
    low_misses = high_misses = 0.0
    for hits in range(trials + 1):
        chance = math.comb(trials, hits) * share**hits * (1 - share) ** (trials - hits)
        if chance > 1e-12:
            low, high = share_bounds(hits, trials, 0.95)
            low_misses += chance * (low > share)
            high_misses += chance * (high < share)
    assert low_misses <= 0.05 + 1e-9
    assert high_misses <= 0.05 + 1e-9


@settings(deadline=None)
@given(st.floats(0, 1e5), st.floats(0, 1e6), st.floats(0.5, 0.999))
@example(5e-324, 878460.9, 0.5)
@example(99.99999999, 100.0, 0.9)
def test_bounds_surround_the_share_and_know_nothing_of_nothing(hits: float, trials: float, confidence: float) -> None:
    low, high = share_bounds(hits, trials, confidence)
    assert 0.0 <= low <= high <= 1.0
    if trials > 0:
        assert low - 1e-9 <= min(1.0, hits / trials) <= high + 1e-9
    assert share_bounds(1, 0, 0.95) == (0.0, 1.0)


# ---- buckets


@settings(deadline=None)
@given(st.floats(1e-9, 1e9))
def test_a_bucket_holds_its_value_and_its_middle_is_near(seconds: float) -> None:
    index = index_of(seconds)
    assert MIN_INDEX <= index <= MAX_INDEX
    if lower_bound(MIN_INDEX) < seconds < lower_bound(MAX_INDEX):
        assert lower_bound(index) * (1 - 1e-12) < seconds <= lower_bound(index + 1) * (1 + 1e-12)
        assert middle(index) == pytest.approx(seconds, rel=0.006)


@settings(deadline=None)
@given(st.lists(st.floats(1e-6, 1e4), min_size=1, max_size=200), st.floats(0.0, 1.0))
def test_a_quantile_is_within_a_bucket_of_the_truth(values: list[float], share: float) -> None:
    buckets = Buckets()
    for value in values:
        buckets.add(value)
    ordered = sorted(values)
    rank = min(len(values) - 1, max(0, math.ceil(share * len(values) - 1e-9) - 1))
    assert buckets.quantile(share) == pytest.approx(ordered[rank], rel=0.012)
    assert buckets.total == len(values)


@settings(deadline=None)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False)))
def test_buckets_are_bounded_whatever_falls_in(values: list[float]) -> None:
    buckets = Buckets()
    for value in values:
        buckets.add(value)
    assert all(MIN_INDEX <= index <= MAX_INDEX for index in buckets.counts)


# ---- the tracker


def running(pid: int, since_s: float, query_id: int | None = None) -> Backend:
    return Backend(pid, True, False, since_s, since_s, query_id)


def idle(pid: int, start_s: float, end_s: float, *, in_transaction: bool = False) -> Backend:
    return Backend(pid, False, in_transaction, start_s, end_s)


def tracked(*looks: tuple[float, list[Backend]]) -> Window:
    tracker = Tracker(1.0)
    for now_s, backends in looks:
        tracker.add(Look(now_s, tuple(backends)))
    return tracker.take()


def test_a_statement_seen_running_and_then_finished_has_its_exact_duration() -> None:
    window = tracked((0.0, []), (1.0, [running(1, 0.95)]), (1.1, [running(1, 0.95)]), (2.5, [idle(1, 0.95, 2.25)]))
    assert (window.over_low, window.over_high, window.long.total) == (1, 1, 1)
    assert window.long.quantile(0.5) == pytest.approx(1.3, rel=0.01)
    assert window.ages.total == 2


def test_what_replaced_a_statement_bounds_it() -> None:
    window = tracked((0.0, []), (1.0, [running(1, 0.1)]), (1.1, [running(1, 1.05)]))
    assert window.long_low.quantile(0.5) == pytest.approx(0.9, rel=0.01)
    assert window.long_high.quantile(0.5) == pytest.approx(0.95, rel=0.01)
    assert (window.over_low, window.over_high) == (0, 0)


def test_a_session_that_hung_up_ended_its_statement_between_two_looks() -> None:
    window = tracked((0.0, []), (1.0, [running(1, 0.05)]), (1.1, []))
    assert (window.over_low, window.over_high, window.long.total) == (0, 1, 1)
    assert window.long_low.quantile(0.5) == pytest.approx(0.95, rel=0.01)
    assert window.long_high.quantile(0.5) == pytest.approx(1.05, rel=0.01)


def test_the_same_finished_statement_counts_once_however_often_it_is_shown() -> None:
    shown = idle(1, 0.95, 0.999)
    window = tracked((0.0, []), (1.0, [shown]), (1.002, [shown]), (1.004, [shown]), (1.1, [shown]))
    assert window.after_transaction.total == 1


def test_a_restarted_server_may_give_a_pid_again() -> None:
    window = tracked((0.0, []), (1.0, [running(7, 0.2)]), (5.0, [running(7, 4.95)]), (5.1, [idle(7, 4.95, 5.09)]))
    assert window.long.total == 2  # the first ended at an unknown time, the second took 0.14 s
    assert window.over_high == 1
    assert window.over_low == 0


@pytest.mark.parametrize("step_s", [-3600.0, 3600.0])
def test_a_step_of_the_servers_clock_gives_no_durations(step_s: float) -> None:
    tracker = Tracker(1.0)
    tracker.add(Look(0.0, ()))
    tracker.add(Look(1.0, (running(1, 0.95), idle(2, 0.5, 0.9))))
    later_s = 1.1 + step_s
    tracker.add(Look(later_s, (idle(1, 0.95, later_s - 0.05), idle(2, 0.5, 0.9))))
    tracker.add(Look(later_s + 0.1, (idle(1, 0.95, later_s - 0.05),)))
    window = tracker.take()
    assert window.after_transaction.total <= 2
    if step_s < 0:
        assert window.clock_steps == 1
        assert window.over_high == 0
    else:  # forward: the statement's times really are an hour apart, and the gap says how blind the window was
        assert window.blind_share > 0.9


def test_memory_is_bounded_by_the_last_look() -> None:
    tracker = Tracker(1.0)
    for round_number in range(50):
        now_s = 1.0 + round_number * 0.1
        backends = [running(pid, now_s - 0.01, pid) for pid in range(round_number * 7000, round_number * 7000 + 3000)]
        backends += [idle(-pid, now_s - 0.02, now_s - 0.01) for pid in range(1, 3000)]
        tracker.add(Look(now_s, tuple(backends)))
        assert tracker.followed <= BACKENDS_MAX
    window = tracker.take()
    assert window.unfollowed == 5999 - BACKENDS_MAX
    assert len(window.ages.counts) < 2000


def test_queries_over_the_threshold_are_named_up_to_a_bound() -> None:
    tracker = Tracker(1.0)
    tracker.add(Look(0.0, ()))
    tracker.add(Look(2.0, tuple(running(pid, 0.1, pid) for pid in range(200))))
    tracker.add(Look(2.1, ()))
    window = tracker.take()
    assert window.over_low == 200
    assert len(window.over_by_query) == QUERY_IDS_MAX


def test_missed_looks_lower_the_chance_and_never_make_it_look_fast() -> None:
    tracker = Tracker(1.0)
    for number in range(100):
        if 20 <= number < 60:
            tracker.miss()
        else:
            tracker.add(Look(number * 0.1, ()))
    window = tracker.take()
    chance = Chance(window)
    assert (window.looks, window.missed) == (59, 40)
    assert chance.of(0.2) < 0.7
    assert chance.of(5.0) == pytest.approx(1.0)
    assert 0.35 < window.blind_share < 0.5


def test_the_chance_is_that_of_a_renewal_process() -> None:
    rng = random.Random(1)
    window, _ = observe(rng, [], 600.0)
    chance = Chance(window)
    assert chance.of(0.05) == pytest.approx(0.5, abs=0.03)  # below the shortest gap: length over mean gap
    assert chance.of(0.1) == pytest.approx(0.875, abs=0.02)  # 1 - (0.15 - d)² / (2 · 0.1 · 0.1)
    assert chance.of(0.151) == pytest.approx(1.0, abs=0.001)


statements = st.lists(st.tuples(st.floats(0.0005, 3.0), st.floats(0.0, 2.0)), min_size=1, max_size=40)  # (duration, think time)


@settings(deadline=None)
@given(st.lists(statements, min_size=1, max_size=6), st.integers(0, 2**32))
def test_counts_above_the_threshold_bracket_the_truth_for_any_schedule(
    schedules: list[list[tuple[float, float]]], seed: int
) -> None:
    """Every statement above a second is seen, looks being at most 0.15 s apart, and each is counted once."""
    clients = []
    for schedule in schedules:
        at_s, made = 1000.2, []
        for duration_s, think_s in schedule:
            if at_s + duration_s > 1055.0:
                break
            made.append(Statement(at_s, at_s + duration_s))
            at_s += duration_s + think_s
        clients.append(Client(made))
    window, ended = observe(random.Random(seed), clients, 60.0)
    true = sum(statement.duration_s > 1.0 for statement in ended)
    assert window.over_low <= true <= window.over_high
    near = sum(0.85 <= statement.duration_s <= 1.15 for statement in ended)
    assert window.over_high - window.over_low <= near
    longer = sum(statement.duration_s >= CUT_S + 0.05 for statement in ended)
    assert longer <= window.long.total + sum(CUT_S <= statement.duration_s < 0.25 for statement in ended)
    assert window.long.total <= len(ended)
    assert window.after_transaction.total <= len(ended)


def test_rows_become_a_look() -> None:
    row = {"now": 5.0, "pid": 1, "state": "active", "query_start": 4.0, "state_change": 4.0, "query_id": 9}
    rows = [
        {**row, "hidden": False, "our_role": False},
        {**row, "pid": 2, "state": "idle in transaction", "state_change": 4.5, "hidden": False, "our_role": True},
        {**row, "pid": 3, "state": "idle", "query_start": None, "hidden": False, "our_role": False},
        {**row, "pid": 4, "state": None, "hidden": True, "our_role": False},
        {**row, "pid": 5, "state": "disabled", "hidden": False, "our_role": False},
    ]
    look = look_of(rows)
    assert look.backends == (Backend(1, True, False, 4.0, 4.0, 9), Backend(2, False, True, 4.0, 4.5, 9))
    assert (look.hidden, look.untracked, look.role_is_shared, look.now_s) == (1, 1, True, 5.0)
    nobody = {**dict.fromkeys(row), "now": 6.0, "hidden": True, "our_role": None}
    assert look_of([nobody]) == replace(Look(6.0, ()), now_s=6.0)

"""Lag: what the map of positions to times and the judgement on it never break, over generated pasts."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from pgherd.collector.replication.history import SHARE, STEPS_MAX, Added, WalHistory
from pgherd.collector.replication.lag import (
    AHEAD_MAX_MS,
    SILENT_MS,
    WIDTH_MAX_MS,
    ClusterLag,
    Hold,
    Known,
    Observation,
    Reason,
    Unknown,
)

T0 = 1_795_000_000_000


def primary(at_s: float, lsn: int, *, node: str = "p", timeline: int = 1) -> Observation:
    return Observation(node, T0 + round(at_s * 1000), is_replica=False, timeline=timeline, written=lsn)


def standby(
    at_s: float, lsn: int | None, *, node: str = "s", timeline: int = 1, delay_s: float = 0.0, heard_s: float = 0.0
) -> Observation:
    return Observation(
        node, T0 + round(at_s * 1000), is_replica=True, timeline=timeline, replayed=lsn, delay_s=delay_s,
        streaming=True, heard_age_s=heard_s,
    )  # fmt: skip


def fed(*seen: Observation) -> ClusterLag:
    cluster = ClusterLag()
    for one in seen:
        cluster.observe(one)
    return cluster


def at(seconds: float) -> int:
    return T0 + round(seconds * 1000)


# A primary's past: (seconds since the sample before, bytes written meanwhile).
PASTS = st.lists(st.tuples(st.integers(700, 2000), st.sampled_from([0, 0, 1, 40, 5_000_000])), min_size=2, max_size=120)


def samples_of(past: list[tuple[int, int]]) -> list[tuple[int, int]]:
    at_ms, lsn, samples = T0, 1 << 40, []
    for step_ms, wrote in past:
        samples.append((at_ms, lsn))
        at_ms, lsn = at_ms + step_ms, lsn + wrote
    return samples


# ---- the history


@given(PASTS, st.randoms(use_true_random=False))
def test_order_and_repetition_dont_change_the_map(past: list[tuple[int, int]], chance: random.Random) -> None:
    samples = samples_of(past)
    straight, shuffled = WalHistory(), WalHistory()
    for sample in samples:
        straight.add(*sample)
    mixed = samples * 2
    chance.shuffle(mixed)
    assert all(shuffled.add(*sample) in (Added.KEPT, Added.KNOWN) for sample in mixed)
    assert straight._steps == shuffled._steps


@given(PASTS, st.integers(-10, 6_000_000 * 120))
def test_a_bracket_holds_the_moment_at_which_the_primary_went_beyond_a_position(
    past: list[tuple[int, int]], ahead: int
) -> None:
    samples = samples_of(past)
    history = WalHistory()
    for sample in samples:
        history.add(*sample)
    lsn = samples[0][1] + ahead
    bracket = history.passed(lsn)
    beyond = [at_ms for at_ms, here in samples if here > lsn]
    until = [at_ms for at_ms, here in samples if here <= lsn]
    assert (bracket is None) == (not beyond)
    if bracket is not None:
        assert bracket.by_ms == beyond[0]
        assert bracket.after_ms == (until[-1] if until else None)


def test_a_week_takes_bounded_memory_and_stays_within_its_share_of_error() -> None:
    history = WalHistory()
    now_ms = T0 + 7 * 86400_000
    busy = random.Random(5)
    lsn, truth = 1, []
    for at_ms in range(T0, now_ms, 1000):
        lsn += busy.randrange(1, 1 << 20)
        history.add(at_ms, lsn)
        if at_ms % 997_000 == 0:
            truth.append((at_ms, lsn))
    assert len(history) < 1500 < STEPS_MAX
    for at_ms, here in truth:
        bracket = history.passed(here)
        assert bracket is not None
        assert bracket.after_ms is not None
        age_ms = now_ms - at_ms
        assert bracket.after_ms <= at_ms < bracket.by_ms
        assert bracket.by_ms - bracket.after_ms <= max(1000, SHARE * age_ms)


def test_an_idle_primary_costs_one_step_and_a_delay_keeps_full_resolution() -> None:
    idle, delayed = WalHistory(), WalHistory()
    delayed.fine_ms = 3600_000
    for second in range(20_000):
        idle.add(T0 + second * 1000, 77)
        delayed.add(T0 + second * 1000, second)
    assert len(idle) == 1
    for second in range(20_000 - 3600, 19_000):
        bracket = delayed.passed(second)
        assert bracket is not None
        assert bracket.width_ms == 1000


def test_a_clock_that_steps_back_is_contradicted_and_a_restored_past_is_told() -> None:
    history = WalHistory()
    for second in range(10):
        history.add(T0 + second * 1000, 100 * second)
    assert history.add(T0 + 2500, 950) is Added.CONTRADICTS
    assert history.add(T0 + 4500, 100) is Added.CONTRADICTS
    assert history.add(T0 + 11_000, 899) is Added.WENT_BACK
    assert len(history) == 10


# ---- the judgement


@given(PASTS, st.integers(0, 119), st.integers(0, 999), st.integers(0, 20))
def test_zero_exactly_when_caught_up_and_otherwise_true_within_half_a_bracket(
    past: list[tuple[int, int]], replayed: int, offset_ms: int, delay_s: int
) -> None:
    """The standby has replayed what the primary had at some sample; the truth is when the primary went on."""
    samples = samples_of(past)
    cluster = ClusterLag()
    for at_ms, lsn in samples:
        cluster.observe(Observation("p", at_ms, is_replica=False, timeline=1, written=lsn))
    has = samples[min(replayed, len(samples) - 1)][1]
    looked_ms = samples[-1][0] - offset_ms % 800
    cluster.observe(
        Observation("s", looked_ms, is_replica=True, timeline=1, replayed=has, delay_s=float(delay_s), streaming=True)
    )
    verdict = cluster.judge("s", samples[-1][0])
    due_ms = looked_ms - delay_s * 1000
    due = [lsn for at_ms, lsn in samples if at_ms <= due_ms]
    if looked_ms < samples[0][0]:
        assert verdict == Hold()
        return
    assert isinstance(verdict, Known)
    assert verdict.wal_bytes == [lsn for at_ms, lsn in samples if at_ms <= looked_ms][-1] - min(
        has, [lsn for at_ms, lsn in samples if at_ms <= looked_ms][-1]
    )
    seen_ms = max((at_ms for at_ms, _ in samples if at_ms <= due_ms), default=due_ms)
    if not due or has >= due[-1]:
        assert verdict.seconds == 0 or verdict.seconds == (due_ms - seen_ms) / 1000 - 1
        latest = (due_ms - seen_ms) / 1000 if any(lsn > has for _, lsn in samples) else 0.0
        assert abs(verdict.seconds - latest) <= 1.0  # the truth is anywhere between 0 and this
    else:
        went_on = next(i for i, (_, lsn) in enumerate(samples) if lsn > has)
        earliest, latest = (due_ms - samples[went_on][0]) / 1000, (due_ms - samples[went_on - 1][0]) / 1000
        assert verdict.seconds > 0
        assert earliest <= verdict.seconds <= latest
        assert max(abs(verdict.seconds - earliest), abs(verdict.seconds - latest)) <= 1.0


@given(PASTS, st.integers(0, 60))
def test_it_grows_with_time_while_the_link_is_cut_and_shrinks_as_more_is_replayed(
    past: list[tuple[int, int]], cut: int
) -> None:
    samples = samples_of(past)
    stuck_lsn = samples[min(cut, len(samples) - 1)][1]
    cluster, last = ClusterLag(), -1.0
    for at_ms, lsn in samples:
        cluster.observe(Observation("p", at_ms, is_replica=False, timeline=1, written=lsn))
        cluster.observe(Observation("s", at_ms, is_replica=True, timeline=1, replayed=min(lsn, stuck_lsn), streaming=True))
        verdict = cluster.judge("s", at_ms)
        assert isinstance(verdict, Known)
        assert verdict.seconds >= last
        last = verdict.seconds if lsn > stuck_lsn else -1.0
    lags = []
    for _, replayed in samples:
        again = ClusterLag()
        for at_ms, lsn in samples:
            again.observe(Observation("p", at_ms, is_replica=False, timeline=1, written=lsn))
        again.observe(Observation("s", samples[-1][0], is_replica=True, timeline=1, replayed=replayed, streaming=True))
        verdict = again.judge("s", samples[-1][0])
        assert isinstance(verdict, Known)
        lags.append(verdict.seconds)
    assert lags == sorted(lags, reverse=True)


def test_an_idle_primary_means_zero_for_hours() -> None:
    cluster = ClusterLag()
    for second in range(0, 7200, 60):
        for tick in range(3):
            cluster.observe(primary(second + tick, 500))
            cluster.observe(standby(second + tick, 500))
        assert cluster.judge("s", at(second + 2)) == Known(at(second + 2), 0.0, 0)


def test_what_a_primary_at_rest_writes_is_no_lag_but_a_commit_behind_it_is() -> None:
    """The link is cut; checkpoints go on, then somebody commits."""

    def at_rest(second: float, lsn: int, finished: int) -> Observation:
        return Observation("p", at(second), is_replica=False, timeline=1, written=lsn, finished=finished)

    cluster = fed(*(at_rest(second, 1000, 7) for second in range(5)))
    for second in range(5, 100):
        cluster.observe(at_rest(second, 1000 + 10 * second, 7))
        cluster.observe(standby(second, 1000))
        assert cluster.judge("s", at(second)) == Known(at(second), 0.0, 10 * second)
    for second in range(100, 120):
        cluster.observe(at_rest(second, 2500 + second, 8))
        cluster.observe(standby(second, 1000))
    verdict = cluster.judge("s", at(119))
    assert isinstance(verdict, Known)
    assert verdict.seconds == 19.5
    cluster.observe(at_rest(120, 2700, 8))
    cluster.observe(standby(120, 2601))  # the commit, and what was flushed within a second of it
    assert cluster.judge("s", at(120)) == Known(at(120), 0.0, 99)


def test_an_asynchronous_commit_is_in_the_wal_that_is_flushed_after_it() -> None:
    """It has finished before it is flushed: the position of that moment doesn't hold it."""

    def ticked(second: float, lsn: int, finished: int) -> Observation:
        return Observation("p", at(second), is_replica=False, timeline=1, written=lsn, finished=finished)

    cluster = fed(ticked(0, 1000, 7), ticked(1, 1050, 8), ticked(2, 1200, 8), ticked(3, 1200, 8))
    for second in range(4, 9):
        cluster.observe(ticked(second, 1200, 8))
        cluster.observe(standby(second, 1050))
    verdict = cluster.judge("s", at(8))
    assert isinstance(verdict, Known)
    assert verdict.seconds > 4


def test_a_silent_primary_is_unknown_and_says_what_is_proven() -> None:
    caught_up = fed(primary(0, 100), primary(1, 200), standby(1, 200))
    assert caught_up.judge("s", at(1)) == Known(at(1), 0.0, 0)
    for second in range(2, 40):
        caught_up.observe(standby(second, 200))
        verdict = caught_up.judge("s", at(second))
        assert verdict == (Hold() if second * 1000 <= 1000 + SILENT_MS else Unknown(Reason.PRIMARY_SILENT))
    behind = fed(primary(0, 100), primary(1, 200), standby(1, 150))
    behind.observe(standby(31, 150))
    assert behind.judge("s", at(31)) == Unknown(Reason.PRIMARY_SILENT, 30.0)
    lost = fed(primary(0, 100), primary(1, 200), standby(1, 200))
    lost.lose("p", at(2))
    assert lost.judge("s", at(2)) == Unknown(Reason.PRIMARY_SILENT)
    assert lost.primaries(at(2)) == 0


def test_a_silent_standby_is_unknown() -> None:
    cluster = fed(primary(0, 100), standby(0, 100), *(primary(second, 100 + second) for second in range(1, 40)))
    assert cluster.judge("s", at(39)) == Unknown(Reason.STANDBY_SILENT)


def test_two_primaries_at_one_time_are_unknown_but_one_after_the_other_is_a_failover() -> None:
    split = fed(primary(0, 100), standby(0, 100))
    for second in range(1, 6):
        split.observe(primary(second, 100 + second))
        split.observe(primary(second + 0.5, 100 + second, node="q", timeline=2))
        split.observe(standby(second, 100 + second))
    assert split.primaries(at(6)) == 2
    assert split.judge("s", at(6)) == Unknown(Reason.SEVERAL_PRIMARIES)
    failover = fed(primary(0, 100), primary(1, 200), standby(0, 100, node="q"), standby(1, 200, node="q"), standby(1, 200))
    failover.observe(primary(4.5, 230, node="q", timeline=2))
    failover.observe(standby(4.5, 200))
    assert failover.primaries(at(5)) == 1
    assert failover.judge("s", at(5)) == Unknown(Reason.TIMELINE)
    failover.observe(standby(5, 230, timeline=2))
    failover.observe(primary(6, 230, node="q", timeline=2))
    assert failover.judge("s", at(6)) == Known(at(5), 0.0, 0)
    assert failover.standbys() == ["s"]


def test_a_standby_that_never_followed_the_promotion_is_never_judged_by_the_new_primary() -> None:
    """It holds WAL of the old timeline that was lost; the new primary's positions overtake it."""
    cluster = fed(primary(0, 100), primary(1, 300), standby(1, 300), standby(1, 200, node="q"))
    cluster.lose("p", at(2))
    for second in range(5, 60):
        cluster.observe(primary(second, 200 + 10 * second, node="q", timeline=2))
        cluster.observe(standby(second, 300))
        assert cluster.judge("s", at(second)) == Unknown(Reason.TIMELINE)


def test_a_position_that_the_primary_never_wrote_is_unknown() -> None:
    cluster = fed(primary(0, 100), standby(0.5, 150))
    assert cluster.judge("s", at(0.5)) == Hold()
    for second in range(1, 10):
        cluster.observe(primary(second, 100))
        cluster.observe(standby(second + 0.5, 150))
    assert AHEAD_MAX_MS < 9_000
    assert cluster.judge("s", at(9.5)) == Unknown(Reason.AHEAD)
    cluster.observe(primary(10, 160))
    assert isinstance(cluster.judge("s", at(10)), Known)


def test_a_primary_restored_to_an_earlier_state_begins_another_past() -> None:
    """A snapshot brought back under the same timeline: what the standby has replayed was never written in this past."""
    cluster = fed(*(primary(second, 1000 + 100 * second) for second in range(5)), standby(4, 1400))
    for second in range(5, 20):
        cluster.observe(primary(second, 900 + second))
        cluster.observe(standby(second, 1400))
        assert not isinstance(cluster.judge("s", at(second)), Known)
    assert cluster.judge("s", at(19)) == Unknown(Reason.AHEAD)


def test_behind_the_beginning_of_the_history_says_at_least() -> None:
    cluster = fed(*(primary(second, 1000 + second) for second in range(30)), standby(29, 5))
    assert cluster.judge("s", at(29)) == Unknown(Reason.BEFORE_HISTORY, 29.0)


def test_a_hole_in_the_history_is_unknown_until_late_samples_fill_it() -> None:
    ticks = [primary(second, 1000 + second) for second in range(100)]
    holed = fed(*ticks[:10], *ticks[80:], standby(99, 1030))
    verdict = holed.judge("s", at(99))
    assert verdict == Unknown(Reason.HISTORY_GAP, 19.0)
    for late in ticks[10:80]:
        holed.backfill(late)
    holed.observe(primary(100, 1100))
    holed.observe(standby(99.5, 1030))
    verdict = holed.judge("s", at(100))
    assert isinstance(verdict, Known)
    assert abs(verdict.seconds - 69) <= 0.5 * WIDTH_MAX_MS / 1000


def test_caught_up_with_a_primary_that_was_not_seen_for_a_while_is_no_zero() -> None:
    """Its live tier was shed: ten seconds between two samples, in the middle of which the standby looked."""
    cluster = fed(*(primary(second, 1000) for second in range(5)), standby(9, 1000), primary(14, 2000))
    assert cluster.judge("s", at(14)) == Unknown(Reason.HISTORY_GAP)
    idle = fed(*(primary(second, 1000) for second in range(5)), standby(9, 1000), primary(14, 1000))
    assert idle.judge("s", at(14)) == Known(at(9), 0.0, 0)


def test_broken_is_told_idle_or_not() -> None:
    cluster = fed(primary(0, 100), standby(0, 100, heard_s=3))
    assert cluster.broken("s", at(1), "up") is False
    assert cluster.broken("s", at(1), None) is None  # its agent is silent
    assert cluster.broken("s", at(1), "down") is True
    assert cluster.broken("s", at(60), "up") is None  # alive, but what it says is old
    cluster.observe(standby(1, 100, heard_s=36))
    assert cluster.broken("s", at(1), "up") is True  # deaf
    assert cluster.broken("s", at(1), "up", deaf_after_s=155) is False
    cluster.observe(Observation("s", at(2), is_replica=True, replayed=100, streaming=False))
    assert cluster.broken("s", at(2), "up") is True


def test_what_an_earlier_process_knew_is_expected_again() -> None:
    cluster = ClusterLag()
    cluster.remember_standby("s", at(0))
    assert cluster.standbys() == ["s"]
    assert cluster.broken("s", at(1), "down") is True
    cluster.observe(primary(1, 100, node="s"))
    cluster.remember_standby("s", at(0))
    assert cluster.standbys() == []

"""Percentiles of a window, each with an interval and the name of how it was got; or "insufficient", with why. Pure.

Never broken:
- a percentile is published only with an interval that is narrower than half of it (or 0.2 ms); otherwise there is the
  interval alone;
- statements of CUT_S and more are counted by having been seen running, weighted by the chance of that; they need no
  assumption. A percentile that lies among them is "counted";
- below, it is "stratified" (a fair sample of finished statements) if that agrees with how many statements were found
  running at each age; else "age_density" (from those ages alone);
- what couldn't be seen (hidden or untracked sessions, long gaps, a count that isn't known) makes it insufficient;
- there is never a percentile of means.

The interval is Woodruff's: exact binomial bounds of the share, read off at the sample's order statistics, widened by
what is uncertain about the number of statements. It costs two searches, where a bootstrap costs hundreds.

Source: Woodruff 1952; Horvitz and Thompson 1952; Kish 1965 (effective sample size).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

from pgherd.agent.latency.ages import Step, age_where, survival
from pgherd.agent.latency.body import Body, Stratum, body_of
from pgherd.agent.latency.bounds import share_bounds
from pgherd.agent.latency.buckets import BUCKET_RATIO, Buckets, middle
from pgherd.agent.latency.count import Count, statement_count
from pgherd.agent.latency.traffic import Traffic
from pgherd.agent.latency.window import CUT_S, Chance, Window

QUANTILES: Final = (0.5, 0.95, 0.99)
STATEMENTS_MIN: Final = 100  # fewer have no percentile worth the name
_SAMPLE_MIN: Final = 100
_INNER_MIN: Final = 100
_AGES_MIN: Final = 400
_CONFIDENCE: Final = 0.975  # each side of a percentile's interval
_ALERT_CONFIDENCE: Final = 0.95  # each side of the share above the threshold
_CLUSTERING: Final = 1.5  # statements of one look resemble each other: their variance is that of fewer
_FRACTION_MAX: Final = 0.8  # even if all were seen: a window's edges aren't the same for the server and for us
_WIDTH_SHARE: Final = 0.5
_WIDTH_S: Final = 0.0002
_TIME_SLACK: Final = 0.12  # active time is reported up to a second late, and holds what the agent itself caused
_TIME_MIN: Final = 0.75
_TAIL_SLACK: Final = 0.1
_BLIND_MAX: Final = 0.2
_BLIND: Final = ("sessions_hidden", "track_activities_off", "gaps", "shed")
_AGE_BANDS_S: Final = (0.001, 0.004, 0.016, 0.064, CUT_S)
_BAND_SIGMA: Final = 3.5
_BAND_SLACK: Final = 0.25
_BAND_SLACK_COUNT: Final = 10.0


@dataclass(frozen=True, slots=True)
class Quantile:
    """One percentile. `low_s` and `high_s` may be known where `value_s` isn't published."""

    share: float
    value_s: float | None
    low_s: float | None
    high_s: float | None
    estimator: str  # how, and after the slash what counted the statements
    reason: str = ""  # why there is no value

    @property
    def is_sufficient(self) -> bool:
        return self.value_s is not None


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a window says."""

    started_s: float  # on the server's clock
    ended_s: float
    count: Count | None
    quantiles: tuple[Quantile, ...]
    over: tuple[float, float] | None  # statements above the threshold: surely, and possibly; None when nothing was seen
    over_by_query: Mapping[int, int]
    running_over: int  # above it and still running at the end
    ratio: tuple[float, float] | None  # binomial bounds of their share; None below STATEMENTS_MIN
    distribution: Buckets | None  # all statements, where the body is known
    notes: tuple[str, ...]  # why something is missing or doubtful
    coverage: float  # of the body's sample
    sampled: float
    looks: int
    missed: int


def estimate(window: Window, traffic: Traffic) -> Estimate:
    """The estimate of a window with what the server counted meanwhile."""
    chance = Chance(window)
    tail = _Tail.of(window, chance)
    body = body_of(window, chance)
    traffic = _without_late_time(traffic, window)
    count = statement_count(traffic, body, tail.count, tail.total_s)
    if count is not None and math.isfinite(count.high):
        body = body_of(window, chance, *_strata_counts(count, traffic, body))
        count = statement_count(traffic, body, tail.count, tail.total_s) or count
    over, ratio = _over(window, chance, count)
    blocked = _blocked(window, count)
    notes = [note for note in (blocked, count.note if count else "", traffic.statements_reason) if note]
    quantiles = tuple(Quantile(share, None, None, None, "insufficient", blocked) for share in QUANTILES)
    distribution = None
    if count is not None and not blocked:
        counts = _strata_counts(count, traffic, body)
        bodies = (body, body_of(window, chance, *counts, by_class=True))
        route, why_not = _route(window, traffic, bodies, tail, count)
        if why_not:
            notes.append(why_not)
        quantiles = tuple(_quantile(share, count, tail, route, why_not) for share in QUANTILES)
        if route is not None and any(quantile.is_sufficient for quantile in quantiles):
            distribution = Buckets()
            distribution.merge([route.distribution(count.best - tail.count), tail.middles])
    elif blocked in _BLIND:  # what was seen can raise an alert; what wasn't can't end one
        over = over if over is not None and over[0] > 0 else None
        ratio = (ratio[0], 1.0) if over is not None and ratio is not None else None
    return Estimate(
        started_s=window.started_s,
        ended_s=window.ended_s,
        count=count,
        quantiles=quantiles,
        over=over,
        over_by_query=window.over_by_query,
        running_over=window.running_over,
        ratio=ratio,
        distribution=distribution,
        notes=tuple(notes),
        coverage=body.after_transaction.coverage,
        sampled=body.sampled,
        looks=window.looks,
        missed=window.missed,
    )


def _without_late_time(traffic: Traffic, window: Window) -> Traffic:
    """Active time only if it holds about what the looks saw being active.

    From 15 on a session reports its times with its next change of table statistics: one that only calls functions never does.
    """
    if traffic.active_s is None or window.looks == 0:
        return traffic
    seen_s = window.ages.total * window.seconds / window.looks
    noise_s = (3.0 * math.sqrt(window.ages.total * _CLUSTERING) + _BAND_SLACK_COUNT) * window.seconds / window.looks
    return replace(traffic, active_s=None) if traffic.active_s < _TIME_MIN * seen_s - noise_s else traffic


def _strata_counts(count: Count, traffic: Traffic, body: Body) -> tuple[float | None, float | None]:
    if not body.has_transactions:
        return count.best, None
    if traffic.transactions is None:
        return None, None
    last = min(count.best, max(float(traffic.transactions), body.after_transaction.seen_about))
    return last, count.best - last


def _blocked(window: Window, count: Count | None) -> str:
    if window.hidden:
        return "sessions_hidden"
    if window.untracked:
        return "track_activities_off"
    if window.unfollowed:
        return "too_many_backends"
    if window.looks == 0 or window.blind_share > _BLIND_MAX:
        return "shed" if window.shed > window.missed / 2 else "gaps"
    if count is None:
        return "no_count"
    if count.high < STATEMENTS_MIN:
        return "few_statements"
    if not math.isfinite(count.high):
        return "no_count"
    return ""


# ---- the threshold: counting ----------------------------------------------------------------------


def _over(window: Window, chance: Chance, count: Count | None) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:
    """How many are (surely, possibly) above the threshold, and the bounds of their share.

    Statements that still run and are over it already belong to both sides of the fraction: a server where nothing
    ends any more is slow, not silent.
    """
    share = chance.of(window.threshold_s)
    low, high = float(window.over_low), window.over_high / share if share > 0 else float(window.over_high)
    if count is None or count.best + window.running_over < STATEMENTS_MIN:
        return (low, high), None
    running = window.running_over
    few, many = count.low + running, count.high + running
    ratio_low = share_bounds(low + running, many, _ALERT_CONFIDENCE)[0] if math.isfinite(many) else 0.0
    ratio_high = share_bounds(high + running, few, _ALERT_CONFIDENCE)[1]
    return (low, high), (ratio_low, max(ratio_low, ratio_high))


# ---- the tail: seen running -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Tail:
    """Statements of CUT_S and more, each weighted by one over its chance of having been seen running."""

    middles: Buckets
    lows: Buckets
    highs: Buckets
    error: float  # of the count, two standard errors and a statement at the window's edge
    total_s: float

    @property
    def count(self) -> float:
        return self.middles.total

    @classmethod
    def of(cls, window: Window, chance: Chance) -> _Tail:
        middles, lows, highs = Buckets(), Buckets(), Buckets()
        variance = 0.0
        for source, target in ((window.long, middles), (window.long_low, lows), (window.long_high, highs)):
            for index, seen in source.counts.items():
                share = max(chance.of(max(middle(index), CUT_S)), 0.05)
                target.add_index(index, seen / share)
                if target is middles:
                    variance += seen * (1 - share) / share**2
        return cls(middles, lows, highs, 2 * math.sqrt(variance) + 1.0, middles.sum())


# ---- the body: two routes -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Sampled:
    """The body from finished statements."""

    durations: Buckets  # weighted by stratum
    effective: float  # so many independent statements it is worth

    name: str = "stratified"

    def span(self, low: float, best: float, high: float, body_count: float) -> tuple[float, float, float]:
        """(low, best, high) seconds below which these shares of the body lie."""
        fraction = min(_FRACTION_MAX, self.effective / body_count) if body_count > 0 else 0.0
        trials = self.effective / ((1.0 - fraction) * _CLUSTERING)
        least = share_bounds(low * trials, trials, _CONFIDENCE)[0]
        most = share_bounds(high * trials, trials, _CONFIDENCE)[1]
        high_s = CUT_S if most >= 1.0 - 1.0 / trials else self.durations.quantile(most)
        return self.durations.quantile(least), self.durations.quantile(best), high_s

    def distribution(self, count: float) -> Buckets:
        scaled = Buckets()
        for index, weight in self.durations.counts.items():
            scaled.add_index(index, weight / self.durations.total * max(0.0, count))
        return scaled


@dataclass(frozen=True, slots=True)
class _Aged:
    """The body from running statements' ages. Its shares are of all statements, the tail's included."""

    fewest: list[Step]  # survival if there were as few statements as possible, i.e. the largest shares
    best: list[Step]
    most: list[Step]

    name: str = "age_density"

    def distribution(self, count: float) -> Buckets:
        """The steps' drops, each at the age where it is; what is over before the first step ends is in its middle."""
        buckets = Buckets()
        previous = 1.0
        for step in self.best:
            if previous > step.share:
                buckets.add(step.from_s or step.to_s / 2, previous - step.share)
            previous = min(previous, step.share)
        scaled = Buckets()
        for index, weight in buckets.counts.items():
            scaled.add_index(index, weight / buckets.total * max(0.0, count) if buckets.total else 0.0)
        return scaled


def _route(
    window: Window, traffic: Traffic, bodies: Sequence[Body], tail: _Tail, count: Count
) -> tuple[_Sampled | _Aged | None, str]:
    """How to know the body, and why not by sampling: the first sample that agrees with everything else that is known."""
    why_not = ""
    for body in bodies:
        sampled, reason = _sampled(traffic, body, tail, count)
        if sampled is not None:
            reason = _contradiction(window, traffic, sampled, body, tail, count)
            if not reason:
                return sampled, ""
        why_not = why_not or reason
    if window.ages.total < _AGES_MIN:
        return None, why_not
    fewest, best, most = (survival(window.ages, window.looks, window.seconds, n) for n in (count.low, count.best, count.high))
    return _Aged(fewest, best, most), why_not


def _contradiction(window: Window, traffic: Traffic, sampled: _Sampled, body: Body, tail: _Tail, count: Count) -> str:
    """What a sample is at odds with: "" for nothing."""
    whole = Buckets()
    whole.merge([sampled.distribution(count.best - tail.count), tail.middles])
    if count.source == "statements" and traffic.active_s is not None:
        body_s = whole.sum() - tail.total_s
        error = max(body.after_transaction.relative_error, body.in_transaction.relative_error if body.has_transactions else 0.0)
        slack_s = (_TIME_SLACK + 2.5 * error) * body_s + _TAIL_SLACK * tail.total_s + traffic.active_slack_s
        if abs(whole.sum() - traffic.active_s) > slack_s:
            return "sample_against_active_time"
    return "" if _agrees_with_ages(window, whole) else "sample_against_ages"


def _sampled(traffic: Traffic, body: Body, tail: _Tail, count: Count) -> tuple[_Sampled | None, str]:
    last, inner = body.after_transaction, body.in_transaction
    body_count = max(0.0, count.best - tail.count)
    # Statements that weren't the last of their transaction. The server's count of transactions is late at times.
    share_of_inner = max(0.0, 1.0 - max(traffic.transactions or 0.0, last.seen_about) / count.best)
    durations = Buckets()
    if share_of_inner > 0.05:
        if inner.sampled < _INNER_MIN:
            return None, "statements_inside_transactions"
        _weigh(durations, last, 1.0 - share_of_inner)
        _weigh(durations, inner, share_of_inner)
        effective = 1.0 / ((1.0 - share_of_inner) ** 2 / max(1.0, last.sampled) + share_of_inner**2 / inner.sampled)
    else:
        _weigh(durations, last, 1.0)
        effective = last.sampled
    fraction = min(_FRACTION_MAX, effective / body_count) if body_count > 0 else _FRACTION_MAX
    if effective <= 0 or effective / (1.0 - fraction) < _SAMPLE_MIN:
        return None, "few_finished_seen"
    return _Sampled(durations, effective), ""


def _weigh(into: Buckets, stratum: Stratum, share: float) -> None:
    for index, weight in stratum.durations.counts.items():
        into.add_index(index, weight / stratum.durations.total * share)


def _agrees_with_ages(window: Window, whole: Buckets) -> bool:
    """Whether as many statements were found running, at each age, as there must have been of these durations."""
    per_second = window.looks / window.seconds
    for low_s, high_s in pairwise(_AGE_BANDS_S):
        expected = per_second * sum(
            weight * (min(middle(index), high_s) - low_s) for index, weight in whole.counts.items() if middle(index) > low_s
        )
        seen = sum(weight for index, weight in window.ages.counts.items() if low_s < middle(index) <= high_s)
        noise = _BAND_SIGMA * math.sqrt(max(seen, expected) * _CLUSTERING)
        if abs(seen - expected) > noise + _BAND_SLACK * expected + _BAND_SLACK_COUNT:
            return False
    return True


# ---- a percentile ---------------------------------------------------------------------------------


def _quantile(share: float, count: Count, tail: _Tail, route: _Sampled | _Aged | None, why_not: str) -> Quantile:
    """By how many statements are above it: few enough, and it is counted; else the body's route tells."""
    above = [(1.0 - share) * n for n in (count.low, count.best, count.high)]
    tail_least, tail_most = max(0.0, tail.count - tail.error), tail.count + tail.error
    counted = above[1] < tail.count
    if route is None and not above[2] < tail_least:
        return Quantile(share, None, None, None, "insufficient", why_not)
    low_s = _tail_value(tail.lows, above[2], tail_least)
    high_s = _tail_value(tail.highs, above[0], tail_most)
    value_s = _tail_value(tail.middles, above[1], tail.count)
    if isinstance(route, _Sampled) and (low_s is None or high_s is None or value_s is None):
        body_count = max(1.0, count.best - tail.count)
        low, best, high = (
            _share_of_body(n, over, out)
            for n, over, out in zip(
                (count.high, count.best, count.low), above[::-1], (tail_least, tail.count, tail_most), strict=True
            )
        )
        body_low, body_best, body_high = route.span(low, best, high, body_count)
        low_s, value_s, high_s = low_s or body_low, value_s or body_best, high_s or body_high
    elif isinstance(route, _Aged):
        outlive = 1.0 - share
        low_s = low_s or age_where(route.most, outlive, -1)
        value_s = value_s or age_where(route.best, outlive, 0)
        high_s = high_s or age_where(route.fewest, outlive, +1)
    estimator = f"{'counted' if counted or route is None else route.name}/{count.source}"
    low_s = low_s if low_s is not None else CUT_S
    value_s = value_s if value_s is not None else CUT_S
    high_s = high_s if high_s is not None else max(CUT_S, tail.highs.quantile(1.0) if tail.count else CUT_S)
    # Durations are known to their bucket.
    low_s, high_s = min(low_s, value_s) / BUCKET_RATIO, max(high_s, value_s) * BUCKET_RATIO
    if high_s - low_s > max(_WIDTH_SHARE * value_s, _WIDTH_S):
        return Quantile(share, None, low_s, high_s, estimator, "wide_interval")
    return Quantile(share, value_s, low_s, high_s, estimator)


def _tail_value(durations: Buckets, above: float, total: float) -> float | None:
    """The duration that `above` statements exceed, when there are `total` in the tail; None when it lies below it."""
    if above >= total or durations.total == 0:
        return None
    return durations.quantile(1.0 - above / total)


def _share_of_body(count: float, above: float, tail_count: float) -> float:
    body_count = count - tail_count
    if body_count <= 0:
        return 1.0
    return min(1.0, max(0.0, 1.0 - (above - tail_count) / body_count))

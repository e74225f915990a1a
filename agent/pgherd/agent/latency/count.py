"""How many statements a window had: the denominator of every percentile, with its uncertainty and its source. Pure.

The ladder: pg_stat_statements' calls; else active time over the mean duration; else transactions, a lower bound. A
rung that others contradict isn't used silently: `note` says which was used instead and why, and the range covers what
is still possible. pg_stat_statements counts prepared BEGIN and END at most once or twice, an extension may count
utility statements not at all, and a failed statement never: where transactions of several statements are likely and
active time can't settle it, two more of each are possible.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from pgherd.agent.latency.body import Body
from pgherd.agent.latency.traffic import Traffic

_EDGE_SHARE: Final = 0.01  # statements that end at the window's edges may be counted in the neighbouring one
_AGREE: Final = 1.25  # sources within this ratio don't contradict each other
_PRECISE: Final = 0.15  # relative standard error above which active time gives no count


@dataclass(frozen=True, slots=True)
class Count:
    """A number of statements: surely within low … high, `best` when one must be named."""

    low: float
    best: float
    high: float
    source: str  # "statements" | "active_time" | "transactions"
    note: str = ""  # which sources contradict each other, "" for none


def statement_count(traffic: Traffic, body: Body, long_count: float, long_s: float) -> Count | None:
    """N of a window; None when nothing counts it. `long_*`: the statements seen running that took CUT_S or longer."""
    floor = max(long_count, body.seen_at_least)
    if traffic.transactions is not None:
        floor = max(floor, traffic.transactions)
    by_time = _by_active_time(traffic, body, long_count, long_s)
    if traffic.statements is not None:
        return _checked(float(traffic.statements), floor, by_time, body, float(traffic.transactions or 0))
    if by_time is not None:
        return Count(max(floor, by_time.low), max(floor, by_time.best), max(floor, by_time.high), "active_time")
    if traffic.transactions is not None and floor > 0:
        return Count(floor, floor, math.inf, "transactions")
    return None


def _checked(calls: float, floor: float, by_time: Count | None, body: Body, transactions: float) -> Count:
    if calls * _AGREE < floor:
        note = "statements_below_what_was_seen"
        if by_time is not None and by_time.best >= floor / _AGREE:
            return Count(max(floor, by_time.low), max(floor, by_time.best), max(floor, by_time.high), "active_time", note)
        return Count(floor, floor, math.inf, "transactions", note)
    trusted = by_time is not None and body.is_fair
    if trusted and by_time is not None and not by_time.low / _AGREE <= calls <= by_time.high * _AGREE:
        note = "statements_against_active_time"
        low, high = min(calls, by_time.low), max(calls, by_time.high)
        if calls < by_time.best and body.has_transactions:
            return Count(low, by_time.best, high, "active_time", note)
        return Count(low, calls, high, "statements", note)
    edge = max(1.0, _EDGE_SHARE * calls)
    low, high, note = max(floor / _AGREE, calls - edge), calls + edge, ""
    if (body.has_transactions or calls > _AGREE * transactions > 0) and not trusted:
        high, note = high + 2 * transactions, "begin_and_end_may_be_uncounted"
    return Count(low, calls, high, "statements", note)


def _by_active_time(traffic: Traffic, body: Body, long_count: float, long_s: float) -> Count | None:
    """Active time is the sum of all durations: what the long ones leave, over the mean of the others, is how many."""
    if traffic.active_s is None or body.sampled == 0:
        return None
    rest_s = max(0.0, traffic.active_s - long_s)
    own = traffic.active_slack_s / rest_s if rest_s > 0 else 1.0
    if not body.has_transactions:
        mean_s, error = body.after_transaction.mean_s, body.after_transaction.relative_error
        if mean_s <= 0 or error > _PRECISE:
            return None
        count = rest_s / mean_s
    else:
        # One statement of each transaction is its last: their number is known, the others share what time is left.
        last, inner = body.after_transaction, body.in_transaction
        if traffic.transactions is None or inner.mean_s <= 0 or last.mean_s <= 0:
            return None
        lasts = max(float(traffic.transactions), last.seen_at_least)
        inners = max(0.0, rest_s - lasts * last.mean_s) / inner.mean_s
        count = lasts + inners
        error = math.hypot(inners * inner.relative_error, lasts * last.relative_error) / count if count else 1.0
        if error > _PRECISE:
            return None
    spread = min(1.0, 2 * error + own + 0.02)
    return Count(long_count + count * (1 - spread), long_count + count, long_count + count * (1 + spread), "active_time")

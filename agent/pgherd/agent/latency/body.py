"""A fair sample of the statements shorter than a look's period, from backends found idle. Pure.

An idle backend tells its last statement's exact duration. But it is found idle the more often the longer it idles:
if clients think longer after some statements than after others, or if quick and slow clients share a server, all of
them together say what idle backends did, not what statements take. What shows it is the idle age at which a
statement was found: right after their end all statements have the same chance to be found, whatever comes later. So
the statements found soon are compared with the rest:
- no difference: all are taken, each alike;
- a difference: for each class of duration only statements found within a horizon h count, the longest one over which
  the class is found at a steady rate, each weighted by one over the chance of a look within h.

How many are found soon after their end also says how many statements there must have been at least.

Statements that leave their transaction open and those that end it idle for different times (a turn of the client, a
think time), so they are sampled apart and weighted by their numbers.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from pgherd.agent.latency.buckets import Buckets, middle
from pgherd.agent.latency.window import CUT_S, IDLE_AGES_S, Chance, Finished, Window

_CLASSES_S: Final = (*(0.000064 * 2**step for step in range(11)), CUT_S)
_SOON: Final = 400  # statements found within the horizon that the rest is compared with
_KIND_MIN: Final = 10
_FITTED: Final = 3.0  # horizons are fitted to the data: such a sample is worth less than its size says
_DEPENDS_SIGMA: Final = 2.33  # one fair sample in a hundred is taken for a dependent one: that costs precision only
_ENOUGH_FOR_A_RATE: Final = 100
# On a busy machine a look waits until a statement ends and frees the CPU. So a statement found right after its end was found
# because it ended, the likelier the longer it had been running. Such finds don't count, except in transactions, where
# sessions hardly idle longer.
_SETTLED_S: Final = 0.00025
_RATE_FROM_S: Final = 0.004
_FAIR: Final = 0.75
_COVERED: Final = 0.9
_TRANSACTIONS_SEEN: Final = 10  # statements found in open transactions that make those worth a stratum


@dataclass(frozen=True, slots=True)
class Stratum:
    """Sampled durations below CUT_S of one kind of statement."""

    durations: Buckets  # weighted by one over the chance of having been found
    sampled: float  # so many equally weighted statements they are worth
    coverage: float  # how many statements they stand for, over how many there were; 1 is all
    seen_at_least: float  # so many statements of the kind there must have been, chance allowed for
    seen_about: float  # two standard errors above how many the ones found soon stand for

    @property
    def mean_s(self) -> float:
        return self.durations.sum() / self.durations.total if self.durations.total else 0.0

    @property
    def relative_error(self) -> float:
        """Standard error of the mean over the mean; 1 when nothing is known."""
        if self.sampled < 2 or self.mean_s <= 0:
            return 1.0
        square = sum(middle(index) ** 2 * weight for index, weight in self.durations.counts.items()) / self.durations.total
        return math.sqrt(max(0.0, square - self.mean_s**2) / self.sampled) / self.mean_s


@dataclass(frozen=True, slots=True)
class Body:
    """Both strata."""

    after_transaction: Stratum
    in_transaction: Stratum

    @property
    def sampled(self) -> float:
        return self.after_transaction.sampled + self.in_transaction.sampled

    @property
    def has_transactions(self) -> bool:
        """Whether transactions of several statements were seen."""
        return self.in_transaction.sampled >= _TRANSACTIONS_SEEN

    @property
    def seen_at_least(self) -> float:
        return self.after_transaction.seen_at_least + self.in_transaction.seen_at_least

    @property
    def is_fair(self) -> bool:
        last = self.after_transaction
        return last.sampled >= _ENOUGH_FOR_A_RATE and last.coverage >= _FAIR


def body_of(
    window: Window,
    chance: Chance,
    last_count: float | None = None,
    inner_count: float | None = None,
    *,
    by_class: bool = False,
) -> Body:
    """The samples of a window; with the numbers of statements that ended a transaction and that didn't, if known.

    `by_class` takes a horizon for each class of duration also where no difference was found.
    """
    return Body(
        _stratum(window.after_transaction, chance, last_count, by_class, _SETTLED_S),
        _stratum(window.in_transaction, chance, inner_count, by_class, 0.0),
    )


def _stratum(finished: Finished, chance: Chance, count: float | None, by_class: bool, after_s: float) -> Stratum:
    """The sample of statements found at least `after_s` after their end."""
    first = bisect_left(IDLE_AGES_S, after_s) + 1 if after_s else 0
    missed = chance.of(after_s) if after_s else 0.0
    shares = [chance.of(horizon_s) - missed if math.isfinite(horizon_s) else 1.0 - missed for horizon_s in IDLE_AGES_S]
    shares = [max(0.0, share) for share in shares]
    by_idle_age = [buckets if place >= first else Buckets() for place, buckets in enumerate(finished.by_idle_age)]
    kinds = _kinds(by_idle_age)
    within = _within(by_idle_age)
    if not kinds or shares[-2] <= 0:
        return Stratum(Buckets(), 0.0, 0.0, 0.0, 0.0)
    found = [
        (n, share)
        for n, share, horizon_s in zip(within, shares, IDLE_AGES_S, strict=True)
        if share > 0 and horizon_s >= _RATE_FROM_S
    ]
    at_least = max((n - 3 * math.sqrt(n)) / share for n, share in found)
    by_class = by_class or _composition_depends_on_idle_age(kinds, within)
    durations = Buckets()
    variance = 0.0
    for kind in kinds:
        place = _horizon(_within(kind), shares) if by_class else len(shares) - 1
        weight = 1.0 / shares[place]
        for buckets in kind[: place + 1]:
            for index, n in buckets.counts.items():
                durations.add_index(index, n * weight)
                variance += n * weight**2
    rates = [(n / share, n) for n, share in found if n >= _ENOUGH_FOR_A_RATE]
    rate, n = max(rates, default=(0.0, 1.0))
    coverage = rate / max(count or 0.0, at_least, 1.0)
    about = rate * (1.0 + 2.0 / math.sqrt(n))
    worth = durations.total**2 / variance / (_FITTED if by_class else 1.0)
    return Stratum(durations, worth, coverage, max(0.0, at_least), about)


def _within(by_idle_age: Sequence[Buckets]) -> list[float]:
    """How many were found within each horizon."""
    return list(accumulate(buckets.total for buckets in by_idle_age))


def _kinds(by_idle_age: Sequence[Buckets]) -> list[list[Buckets]]:
    """The statements below CUT_S by duration class, each by idle age."""
    kinds: list[list[Buckets]] = [[Buckets() for _ in IDLE_AGES_S] for _ in _CLASSES_S]
    for place, buckets in enumerate(by_idle_age):
        for index, n in buckets.counts.items():
            duration_s = middle(index)
            if duration_s < CUT_S:
                kinds[bisect_left(_CLASSES_S, duration_s)][place].add_index(index, n)
    return [kind for kind in kinds if any(buckets.total for buckets in kind)]


def _composition_depends_on_idle_age(kinds: list[list[Buckets]], within: list[float]) -> bool:
    """Whether the statements found soon after their end differ in duration from those found later (chi-squared test)."""
    soon = next((place for place, n in enumerate(within) if n >= min(_SOON, within[-1] / 2)), len(within) - 1)
    pairs = [(sum(b.total for b in kind[: soon + 1]), sum(b.total for b in kind[soon + 1 :])) for kind in kinds]
    pairs = [(early, late) for early, late in pairs if early + late >= _KIND_MIN]
    sum_early, sum_late = sum(early for early, _ in pairs), sum(late for _, late in pairs)
    if len(pairs) < 2 or sum_early == 0 or sum_late == 0:
        return False
    statistic = 0.0
    for early, late in pairs:
        share = (early + late) / (sum_early + sum_late)
        statistic += (early - share * sum_early) ** 2 / (share * sum_early) + (late - share * sum_late) ** 2 / (
            share * sum_late
        )
    degrees = len(pairs) - 1
    spread = 2.0 / (9.0 * degrees)
    return statistic > degrees * (1.0 - spread + _DEPENDS_SIGMA * math.sqrt(spread)) ** 3  # Wilson and Hilferty 1931


def _horizon(within: list[float], shares: list[float]) -> int:
    """The longest horizon that still covers everything: beyond it, the rate found is smaller than closer by."""
    found = [(n, share) for n, share in zip(within, shares, strict=True) if share > 0]
    reference = max((n - math.sqrt(n)) / share for n, share in found)
    covering = [place for place, (n, share) in enumerate(found) if (n + math.sqrt(n)) / share >= _COVERED * reference]
    return covering[-1] + len(shares) - len(found) if covering else len(shares) - 1

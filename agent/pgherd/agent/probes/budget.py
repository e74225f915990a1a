"""What sampling may cost the server, and what is left out when it costs more. Pure: time and costs are arguments.

The price of a tier is the median cost of its last ticks (of the last three seconds, for the latency sampler's 0.1 s) per
interval: one hiccup sheds nothing, two expensive ticks in a row do. While the prices of all running tiers add up to
more than the budget, tiers are shed in `SHED_ORDER`, from what is dearest and changes least to what a DBA needs in an
outage. The live tier goes last and not wholly: it falls back to the cycle's pace.

Never broken:
- what is shed is a prefix of `SHED_ORDER`;
- after two ticks of a tier (of the latency sampler: a second of them) at a price over the budget, it or everything before it
  is shed;
- a shed tier comes back no earlier than `HOLD_S` later, one at a time, while the rest is below `RESTORE_SHARE` of the
  budget; if that was too early the next wait is twice as long, up to `HOLD_MAX_S`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

# The walk over all databases, pg_stat_statements, what hardly changes, the 10 Hz activity sampler, counters, positions.
SHED_ORDER: Final = ("tables", "statements", "slow", "latency", "cycle", "live")
HOLD_S: Final = 60.0
HOLD_MAX_S: Final = 900.0
RESTORE_SHARE: Final = 0.8
_MEDIAN_OF_S: Final = 3.0
_SOON_S: Final = 1.0


@dataclass(slots=True)
class _Account:
    interval_s: float
    costs_s: deque[float]
    spent_s: float = 0.0
    shed_until_mono_s: float = 0.0
    hold_s: float = HOLD_S
    restored_mono_s: float = field(default=float("-inf"))

    def price(self) -> float:
        """Share of a core; the lower one of two, so that one dear tick alone isn't a price unless it is all we know.

        A tier that ticks every second or faster has none in its first second: a new session fills its caches then, and
        enough ticks are near. Taken for a price, the first one shed everything at the start.
        """
        if self.interval_s <= _SOON_S and len(self.costs_s) < max(2.0, _SOON_S / self.interval_s):
            return 0.0
        ordered = sorted(self.costs_s)
        return ordered[(len(ordered) - 1) // 2] / self.interval_s if ordered else 0.0


class Budget:
    """One node's account. Samplers ask `allows` before they ask the server and tell what it cost with `spent`."""

    def __init__(self, share_max: float, intervals_s: Mapping[str, float]) -> None:
        """`share_max`: of one core of the server's; `intervals_s`: of every tier in SHED_ORDER."""
        self._share_max = share_max
        self._accounts = {
            tier: _Account(intervals_s[tier], deque(maxlen=max(3, round(_MEDIAN_OF_S / intervals_s[tier]))))
            for tier in SHED_ORDER
        }
        self._shed = 0  # so many of SHED_ORDER

    def allows(self, tier: str) -> bool:
        """Whether the tier may ask at its own pace now."""
        return SHED_ORDER.index(tier) >= self._shed

    @property
    def shed(self) -> tuple[str, ...]:
        """The tiers that are left out."""
        return SHED_ORDER[: self._shed]

    @property
    def ratio(self) -> float:
        """The price of what runs, as a part of the budget; above 1 something is shed at the next `judge`."""
        return self._price() / self._share_max

    def spent_s(self, tier: str) -> float:
        """Server seconds that the tier has caused since the start."""
        return self._accounts[tier].spent_s

    def spent(self, tier: str, cost_s: float, now_mono_s: float, *, is_first: bool = False) -> None:
        """One tick of the tier (of "tables": one walk) cost the server so much; sheds at once if that is too much.

        `is_first` of a session that goes on: it plans the statements and fills its caches. Booked, but no price.
        """
        account = self._accounts[tier]
        account.spent_s += cost_s
        if not is_first:
            account.costs_s.append(cost_s)
        self.judge(now_mono_s)

    def judge(self, now_mono_s: float) -> None:
        """Shed what is too much; let one tier back when its time has come. Call it once a tick."""
        while self._shed < len(SHED_ORDER) and self._price() > self._share_max:
            account = self._accounts[SHED_ORDER[self._shed]]
            too_early = now_mono_s - account.restored_mono_s < 2 * account.hold_s
            account.hold_s = min(HOLD_MAX_S, 2 * account.hold_s) if too_early else HOLD_S
            account.shed_until_mono_s = now_mono_s + account.hold_s
            self._shed += 1
        if not self._shed:
            return
        tier = SHED_ORDER[self._shed - 1]
        account = self._accounts[tier]
        known = account.price() if tier == "live" else 0.0  # which goes on being asked, and so measured
        if now_mono_s >= account.shed_until_mono_s and self._price() + known <= RESTORE_SHARE * self._share_max:
            self._shed -= 1
            account.restored_mono_s = now_mono_s
            if tier != "live":
                account.costs_s.clear()  # what it costs now, its first tick tells

    def _price(self) -> float:
        return sum(self._accounts[tier].price() for tier in SHED_ORDER[self._shed :])

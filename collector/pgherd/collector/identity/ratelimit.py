"""Token buckets per caller, bounded in number. Pure: the caller brings the monotonic time."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field


@dataclass(slots=True)
class Buckets:
    """`rate_per_s` requests a second per key after a burst of `burst`.

    At most `keys_max` keys are remembered; the one unseen for longest is forgotten first, which can only
    be in a caller's favour.
    """

    rate_per_s: float
    burst: float
    keys_max: int = 4096
    _levels: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict)

    def wait_s(self, key: str, now_mono_s: float) -> float:
        """0.0 and one request is taken, or how long this caller should wait before it asks again."""
        level, since_s = self._levels.pop(key, (self.burst, now_mono_s))
        level = min(self.burst, level + (now_mono_s - since_s) * self.rate_per_s)
        allowed = level >= 1.0
        self._levels[key] = (level - 1.0 if allowed else level, now_mono_s)
        while len(self._levels) > self.keys_max:
            self._levels.popitem(last=False)
        return 0.0 if allowed else (1.0 - level) / self.rate_per_s

"""The machine's clocks behind the `Clock` port."""

from __future__ import annotations

import time


class SystemClock:
    """The real clocks. The only place that reads them."""

    def wall_unix_ns(self) -> int:
        return time.time_ns()

    def mono_s(self) -> float:
        return time.monotonic()

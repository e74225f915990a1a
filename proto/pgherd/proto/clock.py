"""The clock as a port: code that decides takes one of these, so that tests and simulation own time.

The implementation lives in pgherd.runtime.clock. Wall time is for stamping and showing; monotonic
time is for every timeout and for every safety decision.
"""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    """Both clocks of a machine."""

    def wall_unix_ns(self) -> int:
        """Nanoseconds since the Unix epoch, UTC; may step in either direction."""
        ...

    def mono_s(self) -> float:
        """Seconds of a clock that never steps; comparable only within this process."""
        ...

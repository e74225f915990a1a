"""The distance between two clocks from one round trip. Pure. Source: RFC 5905, section 8."""

from __future__ import annotations


def clock_offset_ns(sent: int, received: int, answered: int, back: int) -> tuple[int, int]:
    """(their clock minus ours, time on the wire), all in nanoseconds.

    `sent` and `back` are our clock, `received` and `answered` theirs. Take `back` as `sent` plus an elapsed
    monotonic time: a step of our own clock in between would otherwise look like skew.
    """
    return ((received - sent) + (answered - back)) // 2, (back - sent) - (answered - received)

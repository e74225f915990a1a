"""Waiting for a condition with a deadline, instead of sleeping and hoping."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T], timeout_s: float = 10.0, what: str = "the condition", every_s: float = 0.01) -> T:
    """Call `condition` until its answer is truthy and return that; AssertionError after `timeout_s`."""
    deadline_mono_s = time.monotonic() + timeout_s
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > deadline_mono_s:
            raise AssertionError(f"{what} didn't come true within {timeout_s:g} s (last answer: {answer!r})")
        time.sleep(every_s)

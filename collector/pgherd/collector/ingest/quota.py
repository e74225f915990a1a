"""What one sender may take of the collector, so that a mad one is refused and the others don't notice. Pure.

A sender has a bucket of points and one of bytes, each filled at its rate and never above `burst_s` of it. What a request
costs is known only once it is decoded, so a bucket may go into debt: a request is let in while neither is empty, and the
next waits until the debt is paid. Hence every request gets in some time, however large it is.

Never broken: over any time t a sender gets in at most rate × (t + burst) and one request more; nobody's bucket
depends on another's.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

from pgherd.proto.errors import TransientError

_SENDERS_MAX = 65_536


@dataclass(frozen=True, slots=True)
class Quota:
    """Of each agent and each client."""

    points_per_s: float = 50_000.0
    bytes_per_s: float = 8.0 * 1024 * 1024
    burst_s: float = 10.0
    in_flight_max: int = 8
    retry_after_min_s: float = 1.0


@dataclass(slots=True)
class _Account:
    """What is left to a sender; negative is debt."""

    points: float
    size_bytes: float
    at_mono_s: float
    in_flight: int = 0


class Quotas:
    """Accounts by sender, the longest idle forgotten first. One thread."""

    def __init__(self, quota: Quota) -> None:
        self._quota = quota
        self._accounts: OrderedDict[str, _Account] = OrderedDict()

    def enter(self, sender: str, size_bytes: int, mono_s: float) -> None:
        """Let a request of so many bytes in; call `leave` at its end.

        Raises TransientError ingest.quota, with `retry_after_s`.
        """
        quota, account = self._quota, self._account(sender, mono_s)
        wait_s = max(-account.points / quota.points_per_s, -account.size_bytes / quota.bytes_per_s)
        if wait_s > 0:
            raise _over(f"more than {quota.points_per_s:g} points or {quota.bytes_per_s:g} bytes a second", wait_s, quota)
        if account.in_flight >= quota.in_flight_max:
            raise _over(f"more than {quota.in_flight_max} requests at once", 0.0, quota)
        account.size_bytes -= size_bytes
        account.in_flight += 1

    def spend(self, sender: str, points: int, more_bytes: int = 0) -> None:
        """What a request that is in turned out to hold: points, or what costs as much, and bytes beyond those on the wire."""
        if (account := self._accounts.get(sender)) is not None:
            account.points -= points
            account.size_bytes -= more_bytes

    def leave(self, sender: str) -> None:
        """A request that was let in has ended."""
        if (account := self._accounts.get(sender)) is not None:
            account.in_flight -= 1

    def _account(self, sender: str, mono_s: float) -> _Account:
        quota = self._quota
        points_max, bytes_max = quota.points_per_s * quota.burst_s, quota.bytes_per_s * quota.burst_s
        account = self._accounts.get(sender)
        if account is None:
            account = self._accounts[sender] = _Account(points_max, bytes_max, mono_s)
            self._forget_one()
        elapsed_s = max(0.0, mono_s - account.at_mono_s)
        account.points = min(points_max, account.points + elapsed_s * quota.points_per_s)
        account.size_bytes = min(bytes_max, account.size_bytes + elapsed_s * quota.bytes_per_s)
        account.at_mono_s = mono_s
        self._accounts.move_to_end(sender)
        return account

    def _forget_one(self) -> None:
        if len(self._accounts) <= _SENDERS_MAX:
            return
        sender, oldest = next(iter(self._accounts.items()))
        if not oldest.in_flight:
            del self._accounts[sender]


def _over(what: str, wait_s: float, quota: Quota) -> TransientError:
    return TransientError(
        "ingest.quota", f"this sender sends {what}", retry_after_s=math.ceil(max(wait_s, quota.retry_after_min_s)),
        hint="raise ingest.points_per_second or bytes_per_second on the collector if that is meant",
    )  # fmt: skip

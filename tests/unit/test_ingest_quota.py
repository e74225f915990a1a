"""A sender's share: never more than its rate and burst, every request some time, nobody at another's cost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgherd.collector.ingest.quota import Quota, Quotas
from pgherd.proto.errors import TransientError

QUOTA = Quota(points_per_s=10.0, bytes_per_s=100.0, burst_s=2.0, in_flight_max=2)
CALLS = st.lists(st.tuples(st.floats(0, 3), st.sampled_from("ab"), st.integers(0, 300), st.integers(0, 50)), max_size=40)


@given(CALLS)
def test_a_sender_gets_its_rate_its_burst_and_one_request_more(calls: list[tuple[float, str, int, int]]) -> None:
    quotas, now_s = Quotas(QUOTA), 0.0
    got: dict[str, list[tuple[int, int]]] = {"a": [], "b": []}
    for pause_s, sender, size, points in calls:
        now_s += pause_s
        try:
            quotas.enter(sender, size, now_s)
        except TransientError as error:
            retry_s = error.context["retry_after_s"]
            assert isinstance(retry_s, int)
            Quotas.enter(quotas, sender, 0, now_s + retry_s)  # and then it is let in, if it is alone
            quotas.leave(sender)
            now_s += retry_s
            continue
        quotas.spend(sender, points)
        quotas.leave(sender)
        got[sender].append((size, points))
        for column, rate in ((0, QUOTA.bytes_per_s), (1, QUOTA.points_per_s)):
            taken = [request[column] for request in got[sender]]
            assert sum(taken) - max(taken) <= rate * (now_s + QUOTA.burst_s) + 1e-6


def test_others_are_not_touched_and_requests_at_once_are_bounded() -> None:
    quotas = Quotas(QUOTA)
    for _ in range(2):
        quotas.enter("mad", 0, 0.0)
    with pytest.raises(TransientError) as caught:
        quotas.enter("mad", 0, 0.0)
    assert (caught.value.code, caught.value.context["retry_after_s"]) == ("ingest.quota", 1)
    quotas.enter("calm", 0, 0.0)
    quotas.leave("mad")
    quotas.enter("mad", 0, 0.0)
    quotas.spend("mad", 1_000_000)
    quotas.enter("calm", 0, 0.0)


def test_a_clock_that_stands_still_or_steps_back_gives_nothing() -> None:
    quotas = Quotas(QUOTA)
    quotas.enter("a", 1000, 50.0)
    for now_s in (50.0, 20.0):
        with pytest.raises(TransientError):
            quotas.enter("a", 1, now_s)

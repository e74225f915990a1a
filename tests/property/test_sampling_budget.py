"""What sampling may cost: the account never lets a dear tier run on, and never flaps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pgherd.agent.probes.budget import HOLD_MAX_S, HOLD_S, SHED_ORDER, Budget
from pgherd.agent.probes.meter import Usage, cost_s, cost_shares, since

INTERVALS = {"live": 1.0, "cycle": 10.0, "slow": 60.0, "statements": 60.0, "tables": 300.0, "latency": 0.1}
USUAL = {"live": 0.0004, "cycle": 0.004, "slow": 0.008, "statements": 0.03, "tables": 0.2, "latency": 0.0001}
SHARE = 0.005


def run(budget: Budget, seconds: range, slowdown: float, shed_seen: list[tuple[str, ...]] | None = None) -> None:
    """Every tier at its own pace, as the samplers do it; the latency sampler once a second with ten costs."""
    for second in seconds:
        now = float(second)
        for tier, interval in INTERVALS.items():
            pace = INTERVALS["cycle"] if tier == "live" and not budget.allows("live") else max(1.0, interval)
            if second % pace or not (tier == "live" or budget.allows(tier)):
                continue
            for _ in range(10 if tier == "latency" else 1):
                budget.spent(tier, USUAL[tier] * slowdown, now)
        if shed_seen is not None:
            shed_seen.append(budget.shed)


def test_the_usual_costs_fit_and_a_hundredfold_sheds_within_three_cycles() -> None:
    budget = Budget(SHARE, INTERVALS)
    run(budget, range(1800), 1.0)
    assert not budget.shed
    assert 0 < budget.ratio < 1
    run(budget, range(1800, 1831), 100.0)
    assert list(budget.shed) == list(SHED_ORDER), "even the live tier falls back to the cycle's pace"
    run(budget, range(1831, 1831 + 3600), 1.0)
    assert not budget.shed, "back to all of it within the hour"


def test_what_is_dear_goes_and_the_rest_stays() -> None:
    budget = Budget(SHARE, INTERVALS)
    for number in range(3):
        budget.spent("live", 0.0004, float(number))
        budget.spent("cycle", 0.004, float(number))
        budget.spent("tables", 30.0, float(number))  # a walk over very many tables
    assert budget.shed == ("tables",)
    assert budget.allows("statements")


def test_what_a_new_session_costs_at_first_is_booked_and_no_price() -> None:
    budget = Budget(SHARE, INTERVALS)
    for tier in SHED_ORDER:
        budget.spent(tier, 10.0, 0.0, is_first=True)
    assert not budget.shed
    assert budget.spent_s("cycle") == 10.0
    budget.spent("cycle", 10.0, 10.0)
    assert "cycle" in budget.shed, "the next one counts"


def test_one_hiccup_sheds_nothing() -> None:
    budget = Budget(SHARE, INTERVALS)
    run(budget, range(100), 1.0)
    budget.spent("cycle", 5.0, 100.0)
    budget.spent("live", 5.0, 100.0)
    assert not budget.shed


def test_a_tier_that_stays_dear_is_tried_ever_more_rarely() -> None:
    budget, now, returns = Budget(SHARE, INTERVALS), 0.0, []
    budget.spent("tables", 100.0, now)
    for _ in range(20_000):
        now += 1.0
        budget.judge(now)
        if budget.allows("tables"):
            returns.append(now)
            budget.spent("tables", 100.0, now)
    gaps = [after - before for before, after in zip([0.0, *returns], returns, strict=False)]
    assert gaps[:4] == [HOLD_S, 2 * HOLD_S, 4 * HOLD_S, 8 * HOLD_S]
    assert gaps[-1] == HOLD_MAX_S


@given(st.lists(st.tuples(st.sampled_from(SHED_ORDER), st.floats(0, 10), st.floats(0.0, 100.0)), min_size=1, max_size=200))
def test_what_is_shed_is_a_prefix_and_nothing_returns_early(events: list[tuple[str, float, float]]) -> None:
    budget, now = Budget(SHARE, INTERVALS), 0.0
    shed_at: dict[str, float] = {}
    total = dict.fromkeys(SHED_ORDER, 0.0)
    for tier, cost, pause in events:
        now += pause
        before = budget.shed
        budget.spent(tier, cost, now)
        total[tier] += cost
        assert budget.shed == SHED_ORDER[: len(budget.shed)]
        for name in set(before) - set(budget.shed):
            assert now - shed_at[name] >= HOLD_S
        shed_at |= dict.fromkeys(set(budget.shed) - set(before), now)
        assert budget.ratio <= 1 + 1e-9
    assert {name: budget.spent_s(name) for name in SHED_ORDER} == total


_ACCOUNTS = st.builds(Usage, st.floats(0, 1), st.floats(0, 1))


@given(st.floats(0, 10), _ACCOUNTS, _ACCOUNTS)
def test_a_cost_is_at_least_the_cpu_and_never_a_wait_for_one(took: float, backend: Usage, own: Usage) -> None:
    assert cost_s(took, None, None) == took
    assert abs(cost_s(took, None, own) - max(0.0, took - own.cpu_s - own.queued_s)) < 1e-9
    cost = cost_s(took, backend, own)
    assert backend.cpu_s <= cost <= max(backend.cpu_s, took)
    assert cost <= max(backend.cpu_s, took - backend.queued_s) + 1e-9
    waiting_too = Usage(backend.cpu_s, backend.queued_s + 1.0)
    assert cost_s(took + 1.0, waiting_too, own) <= cost + 1e-9, "however long it waits for a CPU"


@given(st.lists(st.floats(0, 1), max_size=12), _ACCOUNTS, _ACCOUNTS)
def test_a_pipelines_cost_is_shared_out_whole(took: list[float], backend: Usage, own: Usage) -> None:
    shares = list(cost_shares(took, backend, own))
    assert len(shares) == len(took)
    if took:
        assert abs(sum(shares) - cost_s(sum(took), backend, own)) < 1e-6, "also when all answers came at once"


def test_an_account_over_a_while_needs_both_readings() -> None:
    assert since(None, Usage(1, 1)) is None
    assert since(Usage(1.0, 2.0), Usage(1.5, 4.0)) == Usage(0.5, 2.0)

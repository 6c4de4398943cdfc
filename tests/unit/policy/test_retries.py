"""Laws of pauses and of the budget of retries; time and chance are made up."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.config.router import RouterConfig
from ernie_cluster.policy.hedging import hedge_after_s
from ernie_cluster.policy.retries import RetryBudget, backoff_s

LIMITS = RouterConfig(retry_pause_s=0.1, retry_share=0.1, retry_floor_per_s=2.0)
BURST = 10.0

EVENTS = st.lists(st.tuples(st.floats(0, 3), st.sampled_from([0, 0, 0, 1, 2, 3])), max_size=60)
"""(seconds since the one before, losses of the request that goes on; 0 = a request has come)."""


@given(st.integers(1, 10_000), st.floats(0, 1, exclude_max=True))
def test_pauses_lie_under_a_bound_that_doubles(num_losses: int, chance: float) -> None:
    pause = backoff_s(num_losses, chance, LIMITS)
    assert 0 <= pause < 5.0 or (pause, chance) == (0, 0)
    assert backoff_s(num_losses, chance, LIMITS) <= backoff_s(num_losses + 1, chance, LIMITS)
    if num_losses == 1:
        assert pause <= LIMITS.retry_pause_s


@settings(max_examples=50)
@given(EVENTS)
def test_later_retries_stay_within_their_share(events: list[tuple[float, int]]) -> None:
    """Those whose wait is over by the end are no more than what was saved, earned and brought in by time."""
    budget, now, num_requests, due = RetryBudget(LIMITS), 0.0, 0, list[float]()
    for after_s, num_losses in events:
        now += after_s
        if not num_losses:
            budget.arrived()
            num_requests += 1
            continue
        wait = budget.wait_s(num_losses, now)
        assert wait >= 0
        if num_losses == 1:
            assert wait == 0, "one loss is always made good at once"
        else:
            due.append(now + wait)
    for end in due:
        allowed = BURST + LIMITS.retry_share * num_requests + LIMITS.retry_floor_per_s * end
        assert sum(d <= end for d in due) <= allowed + 1e-6


def test_a_storm_of_first_retries_holds_others_up_for_a_bounded_time() -> None:
    budget = RetryBudget(LIMITS)
    assert [budget.wait_s(1, 0.0) for _ in range(1000)] == [0.0] * 1000
    assert budget.wait_s(2, 0.0) == pytest.approx((BURST + 1) / 2.0)
    assert budget.wait_s(2, 60.0) == 0


@pytest.mark.parametrize(("expected_s", "after_s"), [(0.0, 1.0), (0.1, 1.0), (2.0, 8.0)])
def test_who_is_late(expected_s: float, after_s: float) -> None:
    assert hedge_after_s(expected_s, RouterConfig(hedge_encode=4)) == after_s
    assert hedge_after_s(expected_s, RouterConfig(hedge_encode=0)) is None

"""Token buckets: what they may never let through, and what they give back."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.api.ratelimit import Bucket, Budget, duration
from ernie_cluster.errors import InvalidRequest, RateLimited

LIMITS = st.integers(1, 10**9)
AMOUNTS = st.integers(0, 2 * 10**9)
PAUSES_S = st.floats(0, 600)
EVENTS = st.lists(st.tuples(PAUSES_S, st.sampled_from(["take", "charge"]), AMOUNTS), max_size=30)


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@given(LIMITS, EVENTS)
def test_never_more_than_a_full_bucket_and_what_flowed_in(limit: int, events: list[tuple[float, str, int]]) -> None:
    """Debts included: after each covered take, all uses so far fit."""
    bucket, now_s, used = Bucket.full(limit, 0.0), 0.0, 0
    for pause_s, kind, amount in events:
        now_s += pause_s
        bucket = bucket.at(now_s)
        is_covered = bucket.wait_s(amount) == 0
        if kind == "charge" or is_covered:
            bucket = bucket.less(amount)
            used += amount
        if is_covered and kind == "take":
            assert used <= limit * (1 + now_s / 60) * (1 + 1e-9)


@given(LIMITS, AMOUNTS, AMOUNTS)
def test_the_wait_that_is_told_suffices_and_half_of_it_does_not(limit: int, used: int, amount: int) -> None:
    bucket = Bucket.full(limit, 0.0).less(used)
    wait_s = bucket.wait_s(amount)
    if amount > limit:
        assert wait_s == math.inf
    else:
        assert bucket.at(wait_s * (1 + 1e-9) + 1e-6).wait_s(amount) == 0
        assert wait_s == 0 or bucket.at(wait_s / 2).wait_s(amount) > 0


@given(LIMITS, st.integers(0, 10**9), PAUSES_S)
def test_a_refund_undoes_its_use(limit: int, amount: int, pause_s: float) -> None:
    bucket = Bucket.full(limit, 0.0)
    assert bucket.less(amount).less(-amount) == bucket
    later = bucket.less(amount).at(pause_s).less(-amount)
    assert later.level <= limit
    assert later.wait_s(limit) == 0


@given(LIMITS, LIMITS, st.integers(0, 10**9))
def test_another_limit_keeps_what_was_used(old: int, new: int, used: int) -> None:
    bucket = Bucket.full(old, 0.0).less(used).resized(new)
    assert new - bucket.level == pytest.approx(used)


@given(LIMITS, PAUSES_S)
def test_waiting_saves_nothing_up(limit: int, pause_s: float) -> None:
    assert Bucket.full(limit, 0.0).at(pause_s).level == limit


def test_a_clock_that_steps_back_gains_nothing() -> None:
    bucket = Bucket(60, 0.0, 100.0)
    assert bucket.at(50.0).at(100.0).level == 0


def test_all_or_nothing() -> None:
    clock = Clock()
    budget = Budget({"tokens": 100, "pixels": 60}, clock)
    budget.charge({"pixels": 60})
    with pytest.raises(RateLimited) as caught:
        budget.take({"tokens": 50, "pixels": 30})
    assert caught.value.retry_after_s == 30
    budget.take({"tokens": 100})  # none was lost
    clock.now_s += 30
    budget.take({"tokens": 50, "pixels": 30})


def test_what_is_needed_stays() -> None:
    budget = Budget({"requests": 2, "tokens": 5}, Clock())
    budget.take({"requests": 1}, need={"tokens": 5})
    budget.take({"tokens": 5})
    with pytest.raises(RateLimited, match="5 tokens a minute"):
        budget.take({"requests": 1}, need={"tokens": 1})


def test_what_can_never_fit_is_the_requests_fault() -> None:
    with pytest.raises(InvalidRequest, match="takes 6 tokens, and this key may use 5 a minute") as caught:
        Budget({"tokens": 5}, Clock()).take({"tokens": 6})
    assert caught.value.code == "request_too_large"


def test_what_has_no_limit_is_not_counted() -> None:
    budget = Budget({}, Clock())
    budget.take({"requests": 10**9, "pixels": 10**12})
    assert budget.headers() == []


def test_headers_tell_limit_rest_and_time_until_full() -> None:
    clock = Clock()
    budget = Budget({"requests": 60, "tokens": 6000}, clock)
    budget.take({"requests": 1})
    budget.charge({"tokens": 12_000})
    clock.now_s += 0.75
    assert dict(budget.headers()) == {
        b"x-ratelimit-limit-requests": b"60",
        b"x-ratelimit-remaining-requests": b"59",
        b"x-ratelimit-reset-requests": b"250ms",
        b"x-ratelimit-limit-tokens": b"6000",
        b"x-ratelimit-remaining-tokens": b"0",
        b"x-ratelimit-reset-tokens": b"1m59.25s",
    }


def test_new_limits_count_at_once() -> None:
    budget = Budget({"requests": 1}, Clock())
    budget.take({"requests": 1})
    budget.resize({"requests": 3, "tokens": 7})
    budget.take({"requests": 2, "tokens": 7})
    with pytest.raises(RateLimited):
        budget.take({"requests": 1})


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0ms"), (0.0001, "1ms"), (0.999, "999ms"), (1, "1s"), (59.5, "59.5s"), (360, "6m0s")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text

"""Laws of breakers, on a clock that is made up."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.config.router import RouterConfig
from ernie_cluster.policy.breakers import Breakers

LIMITS = RouterConfig(breaker_failures=3, breaker_open_s=1.0)


def is_open(breakers: Breakers, now_s: float) -> bool:
    return "a" in breakers.open(now_s)


def opened() -> tuple[Breakers, float]:
    """One that has just opened for the first time, and when."""
    breakers = Breakers(LIMITS)
    assert [breakers.failed("a", float(t)) for t in range(3)] == [False, False, True]
    return breakers, 2.0


def test_some_failures_in_a_row_open_it_for_a_while() -> None:
    breakers, now = opened()
    assert is_open(breakers, now + 0.99)
    assert not is_open(breakers, now + 1.0)
    assert breakers.open(now) == {"a"}, "nobody else's"


def test_what_fails_all_its_requests_at_once_has_failed_once() -> None:
    breakers = Breakers(LIMITS)
    assert not any(breakers.failed("a", 0.001 * t) for t in range(100))
    assert not is_open(breakers, 0.1)


def test_a_success_between_closes_it_and_all_is_forgotten() -> None:
    breakers = Breakers(LIMITS)
    for t in range(20):
        breakers.failed("a", float(t))
        if t % 2:
            breakers.succeeded("a")
        assert not is_open(breakers, t + 0.5)


def test_one_request_tries_and_its_end_decides() -> None:
    breakers, now = opened()
    breakers.chosen(["a", "b"], now + 1.0)
    assert is_open(breakers, now + 1.1), "nobody else tries"
    breakers.succeeded("a")
    assert not is_open(breakers, now + 1.2)
    breakers, now = opened()
    breakers.chosen(["a"], now + 1.0)
    assert breakers.failed("a", now + 1.2)
    assert is_open(breakers, now + 3.1), "for twice as long"
    assert not is_open(breakers, now + 3.2)


def test_a_try_of_which_nobody_tells_ends() -> None:
    breakers, now = opened()
    breakers.chosen(["a"], now + 1.0)
    assert not is_open(breakers, now + 1000.0)


STEPS = st.lists(
    st.tuples(st.floats(0.0, 5.0), st.sampled_from(["fail", "fail", "fail", "succeed", "choose"])), max_size=40
)


@settings(max_examples=50)
@given(STEPS)
def test_it_is_never_open_without_end_and_never_without_reason(steps: list[tuple[float, str]]) -> None:
    breakers, now, row, last_failure = Breakers(LIMITS), 0.0, 0, 0.0
    for after_s, step in steps:
        now += after_s
        if step == "fail":
            row, last_failure = row + 1, now
            breakers.failed("a", now)
        elif step == "succeed":
            row = 0
            breakers.succeeded("a")
        elif not is_open(breakers, now):
            breakers.chosen(["a"], now)
        if is_open(breakers, now):
            assert row >= LIMITS.breaker_failures
        assert not is_open(breakers, max(now, last_failure) + 31.0)

"""Courses of a load: bounds, ends, and what each is for."""

from __future__ import annotations

from itertools import pairwise

import pytest

from ernie_cluster.bench.shapes import Curve, Shape, Spikes, Steps
from ernie_cluster.bench.traces import Arrival, rates, read


def course(shape: Shape, tick_s: float = 1.0) -> list[int]:
    """Users at each tick, to the end."""
    found, at_s = [], 0.0
    while (users := shape.users(at_s)) is not None:
        found.append(users)
        at_s += tick_s
    return found


@pytest.mark.parametrize("peak", [1, 3, 7, 100])
@pytest.mark.parametrize("kind", [Steps, Spikes, lambda peak: Curve(peak, rates(read("azure-chat"), 5.0))])
def test_a_course_reaches_its_peak_never_passes_it_and_ends(kind: type[Steps], peak: int) -> None:
    found = course(kind(peak))
    assert max(found) == peak
    assert min(found) >= 0


def test_steps_only_rise_and_are_as_long_as_said() -> None:
    found = course(Steps(10, num_steps=5, step_s=3))
    assert found == [2, 2, 2, 4, 4, 4, 6, 6, 6, 8, 8, 8, 10, 10, 10]


def test_spikes_come_at_the_end_of_each_period() -> None:
    found = course(Spikes(10, base_share=0.2, period_s=4, spike_s=1, num_periods=2))
    assert found == [2, 2, 2, 10, 2, 2, 2, 10]


def test_a_curve_follows_the_rates_of_its_trace() -> None:
    found = course(Curve(10, [1.0, 4.0, 2.0], window_s=2))
    assert found == [2, 2, 10, 10, 5, 5]


def test_rates_of_a_trace_count_all_its_requests() -> None:
    arrivals = [Arrival(at_s, 1, 1) for at_s in (0.0, 0.5, 4.9, 5.0, 11.0)]
    assert rates(arrivals, 5.0) == [0.6, 0.2, 0.2]
    all_of_them = read("azure-code")
    assert sum(rate * 2 for rate in rates(all_of_them, 2.0)) == pytest.approx(len(all_of_them))
    assert any(a == 0 != b for a, b in pairwise(rates(all_of_them, 2.0))), "code comes in bursts"

"""What a pace says of work that took known times."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.engine.pace import Line, Pace


def pace_of(pieces: list[tuple[int, float]]) -> Line:
    pace = Pace()
    for size, seconds in pieces:
        pace.note(size, seconds)
    assert pace.line is not None
    return pace.line


@settings(max_examples=50)
@given(st.floats(0, 1), st.floats(0, 0.1), st.lists(st.integers(1, 2000), min_size=3, max_size=60, unique=True))
def test_a_line_is_found(fixed_s: float, each_s: float, sizes: list[int]) -> None:
    line = pace_of([(size, fixed_s + each_s * size) for size in sizes])
    for size in sizes:
        assert line.fixed_s + line.each_s * size == pytest.approx(fixed_s + each_s * size, rel=1e-3, abs=1e-6)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 2000), st.floats(0, 10)), min_size=1, max_size=60))
def test_nothing_takes_less_than_no_time(pieces: list[tuple[int, float]]) -> None:
    assert min(pace_of(pieces)) >= 0


def test_pieces_of_one_size_tell_what_each_takes() -> None:
    assert pace_of([(10, 1.0)] * 5) == pytest.approx((0.0, 0.1))


def test_what_was_long_ago_is_forgotten() -> None:
    line = pace_of([(n, 1.0) for n in range(1, 50)] + [(n % 50 + 1, 2.0) for n in range(500)])
    assert line.fixed_s == pytest.approx(2.0, rel=0.01)


def test_nothing_measured_is_nothing_said() -> None:
    assert Pace().line is None

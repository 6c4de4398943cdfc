"""Laws of re-placement: nothing is lost, nothing gets worse, nothing moves for nothing."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.config.experts import EMPTY, Table, dealt
from ernie_cluster.config.parallel import ParallelDims
from ernie_cluster.policy.experts import rank_loads, rebalance

MIN_GAIN = 0.05


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, Table, list[list[float]]]:
    """(modalities, first table, the loads of several times, one after the other)."""
    world, each, num_pools = draw(st.integers(2, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 2))
    num = world * each
    dims = ParallelDims(world, 1, draw(st.integers(0, min(3, num - each))))
    one = st.lists(st.sampled_from([0.0, 1.0, 3.0, 10.0, 300.0]), min_size=num * num_pools, max_size=num * num_pools)
    return num_pools, dealt(num, num_pools, dims), draw(st.lists(one, min_size=1, max_size=3))


@given(histories())
@settings(max_examples=50, deadline=None)
def test_after_any_history_every_expert_stands_and_no_rank_has_more_to_do(
    history: tuple[int, Table, list[list[float]]],
) -> None:
    num_pools, table, times = history
    for load in times:
        [after] = rebalance([load], [table], num_pools, MIN_GAIN)
        assert [after] == rebalance([load], [table], num_pools, MIN_GAIN), "the same question, another answer"
        before, now = max(rank_loads(load, table)), max(rank_loads(load, after))
        assert after == table or now < before * (1 - MIN_GAIN)
        assert [len(row) for row in after] == [len(row) for row in table]
        size, per_pool = len(table[0]) // num_pools, len(load) // num_pools
        for row in after:
            held = [e for e in row if e != EMPTY]
            assert len(held) == len(set(held)), "two copies on one rank"
            assert all(e // per_pool == slot // size for slot, e in enumerate(row) if e != EMPTY), "a foreign slot"
        assert {e for row in after for e in row} - {EMPTY} == set(range(len(load)))
        table = after


@given(histories())
@settings(max_examples=50, deadline=None)
def test_what_has_just_been_balanced_stays(history: tuple[int, Table, list[list[float]]]) -> None:
    num_pools, table, [load, *_] = history
    once = rebalance([load], [table], num_pools, MIN_GAIN)
    twice = rebalance([load], once, num_pools, MIN_GAIN)
    assert max(rank_loads(load, twice[0])) <= max(rank_loads(load, once[0]))
    assert rebalance([load], twice, num_pools, MIN_GAIN) == twice


@pytest.mark.parametrize("spare", [0, 2])
def test_even_use_moves_nothing(spare: int) -> None:
    tables = [dealt(8, 2, ParallelDims(4, 1, spare))] * 2
    assert rebalance([[7.0] * 16, [0.0] * 16], tables, 2, 0.0) == tables


def test_a_hot_expert_is_copied_until_no_rank_bears_more_than_others() -> None:
    load = [90.0, *[10.0] * 7]
    table = dealt(8, 1, ParallelDims(4, 1, 1))
    [after] = rebalance([load], [table], 1, MIN_GAIN)
    assert max(rank_loads(load, table)) == 100.0
    assert max(rank_loads(load, after)) <= 45.0
    assert Counter(e for row in after for e in row)[0] >= 3


def test_without_spare_slots_the_heavy_ones_part() -> None:
    load = [10.0, 10.0, 1.0, 1.0]
    [after] = rebalance([load], [dealt(4, 1, ParallelDims(2, 1))], 1, MIN_GAIN)
    assert rank_loads(load, after) == [11.0, 11.0]


def test_little_is_moved_when_little_is_wrong() -> None:
    load = [10.0] * 32
    load[0] = load[1] = 20.0
    table = dealt(32, 1, ParallelDims(4, 1))
    [after] = rebalance([load], [table], 1, MIN_GAIN)
    moved = sum(was != now for old, new in zip(table, after, strict=True) for was, now in zip(old, new, strict=True))
    assert 2 <= moved <= 4

"""Laws of what a rank holds: nothing is lost between the ranks, nothing is held twice that is split."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.config.experts import EMPTY, dealt
from ernie_cluster.config.parallel import WHOLE, ParallelDims, Shard, ep_rank_of

SIZES = st.integers(1, 12)


def shards(tp: int, dp: int) -> list[Shard]:
    dims = ParallelDims(tp, dp)
    return [Shard(dims, rank) for rank in range(dims.world)]


@settings(max_examples=50)
@given(SIZES, SIZES, st.integers(0, 40))
def test_slices_of_a_tensor_parallel_group_are_the_whole_in_order(tp: int, dp: int, each: int) -> None:
    whole = list(range(tp * each))
    ranks = shards(tp, dp)
    for group in range(dp):
        parts = [whole[s.slice_of(len(whole))] for s in ranks[group * tp : (group + 1) * tp]]
        assert [x for part in parts for x in part] == whole
        assert {len(part) for part in parts} == {ranks[0].share_of(len(whole))}


@settings(max_examples=50)
@given(SIZES, st.integers(1, 12), st.booleans())
def test_kv_heads_serve_the_query_heads_beside_them(tp: int, factor: int, is_shared: bool) -> None:
    """Query head q reads KV head q * kv / heads; both must be on the same rank."""
    num_kv = tp // factor if is_shared and tp % factor == 0 else tp * factor
    num_heads = num_kv * tp * 2
    for shard in shards(tp, 1):
        queries = range(num_heads)[shard.slice_of(num_heads)]
        assert {q * num_kv // num_heads for q in queries} == set(shard.kv_heads(num_kv))


@settings(max_examples=50)
@given(SIZES, SIZES, st.integers(1, 128))
def test_every_expert_is_on_exactly_one_rank(tp: int, dp: int, num_experts: int) -> None:
    ranks = shards(tp, dp)
    held = [(rank, e) for rank, shard in enumerate(ranks) for e in shard.experts(num_experts)]
    assert sorted(e for _, e in held) == list(range(num_experts))
    assert held == [(ep_rank_of(e, num_experts, len(ranks)), e) for e in range(num_experts)]


@settings(max_examples=50)
@given(SIZES, SIZES, st.integers(1, 6), st.integers(1, 2), st.integers(0, 3))
def test_experts_are_dealt_where_the_ranks_hold_them(tp: int, dp: int, each: int, num_pools: int, spare: int) -> None:
    dims = ParallelDims(tp, dp, spare)
    num_experts = each * dims.world
    table = dealt(num_experts, num_pools, dims)
    for rank in range(dims.world):
        shard = Shard(dims, rank)
        held = list(shard.experts(num_experts)) + [None] * spare
        assert len(held) == shard.slots(num_experts)
        wanted = [EMPTY if e is None else p * num_experts + e for p in range(num_pools) for e in held]
        assert list(table[rank]) == wanted


@settings(max_examples=50)
@given(SIZES, st.integers(1, 128))
def test_both_modalities_are_spread_evenly(ep: int, num_experts: int) -> None:
    for first in (0, num_experts):
        loads = Counter(ep_rank_of(first + e, num_experts, ep) for e in range(num_experts))
        assert max(loads.values()) - min(loads[rank] for rank in range(ep)) <= 1


def test_the_example_of_the_28b() -> None:
    assert [e for e in range(128) if ep_rank_of(e, 64, 8) == 1] == [*range(8, 16), *range(72, 80)]
    assert Shard(ParallelDims(tp=4), 1).slice_of(20) == slice(5, 10)


def test_by_default_one_rank_holds_all() -> None:
    assert WHOLE.slice_of(20) == slice(0, 20)
    assert WHOLE.kv_heads(4) == range(4)
    assert WHOLE.experts(64) == range(64)


def test_what_does_not_divide_or_is_not_there_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="not split evenly"):
        Shard(ParallelDims(tp=3)).slice_of(20)
    with pytest.raises(AssertionError, match="outside"):
        Shard(ParallelDims(tp=2), 2)

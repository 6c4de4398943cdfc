from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.config.kv_layout import KVLayout, kv_heads_of_rank
from ernie_cluster.config.model import ModelConfig
from ernie_cluster.engine.slices import gather_blocks, scatter_blocks
from ernie_cluster.errors import ConfigError
from ernie_cluster.transport.plan import PiecePlan, copy_plan, layer_groups, plan_pieces, plan_rank_pieces

LAYOUT = KVLayout(num_layers=28, num_kv_heads=4, head_dim=128, block_size=16, dtype_bytes=2)
TEXT_MODEL = {
    "model_type": "ernie4_5",
    "vocab_size": 100,
    "hidden_size": 2560,
    "intermediate_size": 100,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "head_dim": 128,
}


@given(
    first_layer=st.integers(0, 12),
    num_layers=st.integers(0, 12),
    first_block=st.integers(0, 1000),
    num_blocks=st.integers(0, 40),
    max_bytes=st.integers(1, 2**22),
)
def test_pieces_cover_everything_once_and_keep_the_bound(
    first_layer: int, num_layers: int, first_block: int, num_blocks: int, max_bytes: int
) -> None:
    pieces = plan_pieces(LAYOUT, first_layer, num_layers, (first_block, num_blocks), max_bytes)
    covered = [
        (layer, block)
        for piece in pieces
        for layer in range(piece.first_layer, piece.first_layer + piece.num_layers)
        for block in range(piece.first_block, piece.first_block + piece.num_blocks)
    ]
    assert sorted(covered) == [
        (layer, block)
        for layer in range(first_layer, first_layer + num_layers)
        for block in range(first_block, first_block + num_blocks)
    ]
    unit = LAYOUT.block_bytes_per_layer
    for piece in pieces:
        assert piece.nbytes == piece.num_layers * piece.num_blocks * unit
        assert piece.nbytes <= max_bytes or piece.num_layers * piece.num_blocks == 1
        assert piece.num_layers == 1 or piece.num_blocks == num_blocks


def test_pieces_are_not_much_more_than_needed() -> None:
    unit = LAYOUT.block_bytes_per_layer
    assert plan_pieces(LAYOUT, 2, 2, (10, 5), 3 * unit) == [
        PiecePlan(2, 1, 10, 3, 3 * unit),
        PiecePlan(2, 1, 13, 2, 2 * unit),
        PiecePlan(3, 1, 10, 3, 3 * unit),
        PiecePlan(3, 1, 13, 2, 2 * unit),
    ]
    assert [piece.detail for piece in plan_pieces(LAYOUT, 0, 28, (0, 4), 40 * unit)] == [
        (0, 10, 0, 4),
        (10, 9, 0, 4),
        (19, 9, 0, 4),
    ]


@given(num_layers=st.integers(1, 100), bytes_per_layer=st.integers(1, 10_000), target_bytes=st.integers(0, 100_000))
def test_layer_groups_reach_the_target_and_no_more(num_layers: int, bytes_per_layer: int, target_bytes: int) -> None:
    groups = layer_groups(num_layers, bytes_per_layer, target_bytes)
    assert [layer for first, count in groups for layer in range(first, first + count)] == list(range(num_layers))
    if len(groups) > 1:
        assert all(count * bytes_per_layer >= target_bytes for _, count in groups)
    least = max(1, -(-target_bytes // bytes_per_layer))
    assert all(count < 2 * least for _, count in groups)


def test_layer_groups_by_example() -> None:
    assert layer_groups(7, 10, 25) == [(0, 4), (4, 3)]


@st.composite
def head_splits(draw: st.DrawFn) -> tuple[list[range], list[range]]:
    """Two ways to spread the same heads over ranks, with fewer, as many, or more ranks than heads."""
    num_heads = draw(st.sampled_from([1, 2, 4, 8, 12]))
    sizes = [tp for tp in range(1, 33) if num_heads % tp == 0 or tp % num_heads == 0]
    src, dst = draw(st.sampled_from(sizes)), draw(st.sampled_from(sizes))
    return [kv_heads_of_rank(num_heads, src, r) for r in range(src)], [
        kv_heads_of_rank(num_heads, dst, r) for r in range(dst)
    ]


@given(split=head_splits())
def test_every_head_of_every_rank_arrives_once_from_a_rank_that_has_it(split: tuple[list[range], list[range]]) -> None:
    src, dst = split
    arrived: list[list[int]] = [[] for _ in dst]
    for copy in copy_plan(src, dst):
        heads = range(copy.first_head, copy.first_head + copy.num_heads)
        assert list(src[copy.src_rank])[copy.src_head : copy.src_head + copy.num_heads] == list(heads)
        assert list(dst[copy.dst_rank])[copy.dst_head : copy.dst_head + copy.num_heads] == list(heads)
        arrived[copy.dst_rank] += heads
    assert arrived == [list(heads) for heads in dst]


@given(split=head_splits())
def test_copies_of_a_head_share_the_work(split: tuple[list[range], list[range]]) -> None:
    src, dst = split
    sent = [sum(copy.num_heads for copy in copy_plan(src, dst) if copy.src_rank == rank) for rank in range(len(src))]
    if len(dst) % len(src) == 0:
        assert max(sent) == min(sent)


def test_equal_ranks_send_to_their_like() -> None:
    for tp in (1, 2, 4, 8):
        heads = [kv_heads_of_rank(4, tp, rank) for rank in range(tp)]
        assert [(copy.src_rank, copy.dst_rank) for copy in copy_plan(heads, heads)] == [(r, r) for r in range(tp)]


@settings(max_examples=50)
@given(
    split=head_splits(),
    first_layer=st.integers(0, 2),
    num_layers=st.integers(1, 3),
    num_blocks=st.integers(1, 4),
    max_bytes=st.integers(1, 5000),
    seed=st.integers(0, 2**32),
)
def test_every_layer_head_and_token_arrives_once_at_its_place(
    split: tuple[list[range], list[range]],
    first_layer: int,
    num_layers: int,
    num_blocks: int,
    max_bytes: int,
    seed: int,
) -> None:
    """Between gangs of any two sizes, through caches whose blocks lie elsewhere on each side."""
    src_heads, dst_heads = split
    num_heads = max(heads.stop for heads in src_heads)
    block_size, head_dim, cache_blocks = 2, 3, 6
    chance = torch.Generator().manual_seed(seed)
    # the model's KV: every number another one, [layers, 2, blocks, block_size, heads, head_dim]
    shape = (first_layer + num_layers, 2, num_blocks, block_size, num_heads, head_dim)
    whole = torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float32).view(shape)

    def cache(heads: range) -> torch.Tensor:
        return torch.zeros(shape[0], 2, cache_blocks, block_size, len(heads), head_dim)

    def table() -> torch.Tensor:
        return torch.randperm(cache_blocks, generator=chance)[:num_blocks]

    sources, destinations = [cache(heads) for heads in src_heads], [cache(heads) for heads in dst_heads]
    arrivals = [torch.zeros_like(destination) for destination in destinations]
    src_tables, dst_tables = [table() for _ in src_heads], [table() for _ in dst_heads]
    for source, blocks, heads in zip(sources, src_tables, src_heads, strict=True):
        source[:, :, blocks] = whole[..., heads.start : heads.stop, :]
    plan = copy_plan(src_heads, dst_heads)
    for rank, source in enumerate(sources):
        layout = KVLayout(shape[0], len(src_heads[rank]), head_dim, block_size, 4)
        mine = [copy for copy in plan if copy.src_rank == rank]
        for copy, piece in plan_rank_pieces(layout, mine, first_layer, num_layers, (0, num_blocks), max_bytes):
            layers = slice(piece.first_layer, piece.first_layer + piece.num_layers)
            run = slice(piece.first_block, piece.first_block + piece.num_blocks)
            part = source[layers, ..., copy.src_head : copy.src_head + copy.num_heads, :]
            wire = torch.empty(piece.num_layers, 2, piece.num_blocks, block_size, copy.num_heads, head_dim)
            assert wire.nbytes == piece.nbytes
            gather_blocks(part, src_tables[rank][run], wire)
            heads = slice(copy.dst_head, copy.dst_head + copy.num_heads)
            blocks = dst_tables[copy.dst_rank][run]
            scatter_blocks(wire, blocks, destinations[copy.dst_rank][layers, ..., heads, :])
            arrivals[copy.dst_rank][layers, ..., heads, :].index_add_(2, blocks, torch.ones_like(wire))
    for destination, arrival, blocks, heads in zip(destinations, arrivals, dst_tables, dst_heads, strict=True):
        expected = torch.zeros_like(destination)
        expected[first_layer:, :, blocks] = whole[first_layer:, ..., heads.start : heads.stop, :]
        assert torch.equal(destination, expected)
        assert torch.equal(arrival, (expected > 0).float())


def test_a_head_that_nobody_holds_is_named() -> None:
    with pytest.raises(ConfigError, match=r"KV head 4 .* decode rank 1"):
        copy_plan([range(0, 4)], [range(0, 4), range(4, 8)])


def test_layout_of_the_28b_model() -> None:
    model = ModelConfig.from_dict(TEXT_MODEL)
    assert KVLayout.from_model(model, 16, "bfloat16") == LAYOUT
    assert LAYOUT.bytes_per_token == 57_344
    assert LAYOUT.block_bytes == 28 * LAYOUT.block_bytes_per_layer == 16 * 57_344
    for tp, heads in ((2, 2), (4, 1), (8, 1)):
        assert KVLayout.from_model(model, 16, "bfloat16", tp) == replace(LAYOUT, num_kv_heads=heads)


@given(num_heads=st.integers(1, 16), tp=st.integers(1, 16))
def test_ranks_hold_all_heads_equally_or_the_split_is_refused(num_heads: int, tp: int) -> None:
    if num_heads % tp and tp % num_heads:
        with pytest.raises(ConfigError, match=f"tp = {tp} with {num_heads} KV heads"):
            kv_heads_of_rank(num_heads, tp, 0)
        return
    held = [head for rank in range(tp) for head in kv_heads_of_rank(num_heads, tp, rank)]
    assert held == sorted(held)
    assert {held.count(head) for head in range(num_heads)} == {max(1, tp // num_heads)}


def test_impossible_layouts_are_refused() -> None:
    with pytest.raises(ConfigError, match="block_size = 0"):
        replace(LAYOUT, block_size=0)
    with pytest.raises(ConfigError, match=r"'int3'.*bfloat16"):
        KVLayout.from_model(ModelConfig.from_dict(TEXT_MODEL), 16, "int3")

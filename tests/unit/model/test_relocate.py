"""After a move each slot has the weights of the expert that the table names, whatever they are made of."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ernie_cluster.config.experts import EMPTY, Table
from ernie_cluster.config.parallel import ParallelDims
from ernie_cluster.model.dispatch import ExpertMap
from ernie_cluster.model.group import Place
from ernie_cluster.model.relocate import moves, relocate
from tests.groups import together

POOLS = 2
PER_POOL = 3


@st.composite
def tables(draw: st.DrawFn, world: int, sizes: tuple[int, int]) -> Table:
    """Each expert stands somewhere, none twice on a rank."""
    rows: list[list[int]] = [[] for _ in range(world)]
    for pool, size in enumerate(sizes):
        experts = list(range(pool * PER_POOL, (pool + 1) * PER_POOL))
        slots = [[EMPTY] * size for _ in range(world)]
        places = draw(st.permutations([(rank, slot) for rank in range(world) for slot in range(size)]))
        for e, (rank, slot) in zip(experts, places, strict=False):
            slots[rank][slot] = e
        for row in slots:
            for slot, e in enumerate(row):
                if e == EMPTY and (rest := [e for e in experts if e not in row]):
                    row[slot] = draw(st.sampled_from([EMPTY, *rest]))
        for row, some in zip(rows, slots, strict=True):
            row.extend(some)
    return tuple(map(tuple, rows))


@st.composite
def changes(draw: st.DrawFn) -> tuple[ParallelDims, tuple[int, int], list[Table]]:
    dims = draw(st.sampled_from([ParallelDims(2, 1), ParallelDims(1, 3), ParallelDims(2, 2)]))
    least = -(-PER_POOL // dims.world)
    sizes = draw(st.integers(least, PER_POOL)), draw(st.integers(least, PER_POOL))
    return dims, sizes, [draw(tables(dims.world, sizes)) for _ in range(3)]


class Pool(nn.Module):
    """Codes, a matrix and a scale for each of some experts, all told apart by the expert's number."""

    def __init__(self, held: list[int]) -> None:
        super().__init__()
        number = torch.tensor(held)
        self.codes = nn.Parameter(number.to(torch.int8)[:, None, None].repeat(1, 2, 3), requires_grad=False)
        self.matrix = nn.Parameter(number.to(torch.bfloat16)[:, None].repeat(1, 5), requires_grad=False)
        self.register_buffer("scale", number.float())

    def numbers(self) -> list[list[set[float]]]:
        """What stands in each slot of each tensor."""
        tensors = [*self.parameters(), *self.buffers()]
        return [[set(row.reshape(-1).tolist()) for row in tensor] for tensor in tensors]


@given(changes())
@settings(max_examples=40, deadline=None)
def test_weights_follow_their_experts(change: tuple[ParallelDims, tuple[int, int], list[Table]]) -> None:
    dims, sizes, (first, *later) = change

    def work(place: Place) -> list[list[list[list[set[float]]]]]:
        row = list(first[place.shard.rank])
        pools = [Pool(row[: sizes[0]]), Pool(row[sizes[0] :])]
        out, old = [], first
        for new in later:
            relocate(pools, old, new, place.ep)
            out.append([pool.numbers() for pool in pools])
            old = new
        return out

    for rank, got in enumerate(together(work, dims)):
        for new, pools in zip(later, got, strict=True):
            rows = new[rank][: sizes[0]], new[rank][sizes[0] :]
            for row, tensors in zip(rows, pools, strict=True):
                assert len(tensors) == 3
                for tensor in tensors:
                    assert all(expert in (EMPTY, *there) for expert, there in zip(row, tensor, strict=True))
                    assert all(len(there) == 1 for there in tensor)


@given(changes())
@settings(max_examples=30, deadline=None)
def test_only_what_changes_moves_and_a_map_follows(change: tuple[ParallelDims, tuple[int, int], list[Table]]) -> None:
    _, _, (first, second, _) = change
    assert moves(first, first) == []
    for move in moves(first, second):
        expert = second[move.target][move.to_slot]
        assert first[move.source][move.from_slot] == expert != first[move.target][move.to_slot]
    where = ExpertMap.of(first, POOLS * PER_POOL)
    memory = where.rank_EC.data_ptr(), where.local_EC.data_ptr()
    where.follow(second)
    assert memory == (where.rank_EC.data_ptr(), where.local_EC.data_ptr())
    ids = torch.arange(POOLS * PER_POOL)[None].expand(12, -1)
    rank, local = where.locate(ids)
    for e in range(POOLS * PER_POOL):
        standing = [(r, s) for r, row in enumerate(second) for s, held in enumerate(row) if held == e]
        used = list(zip(rank[:, e].tolist(), local[:, e].tolist(), strict=True))
        assert {used.count(place) for place in standing} == {12 // len(standing)}

"""Wherever the experts stand, and however the tokens are spread, a layer's experts give the same."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ernie_cluster.config.experts import EMPTY
from ernie_cluster.config.parallel import ParallelDims
from ernie_cluster.model.cuda_ops import CudaOps
from ernie_cluster.model.dispatch import ExpertMap, LocalDispatcher, choose_dispatcher
from ernie_cluster.model.group import Place
from ernie_cluster.model.ops import ExpertWeights, TorchOps
from tests.groups import together

HIDDEN, WIDTHS = 8, (8, 4)

layouts = st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([1, 2])).filter(lambda d: d[0] * d[1] > 1)


def weights(generator: torch.Generator, num: int, width: int) -> ExpertWeights:
    gate_up = torch.randn(num, 2 * width, HIDDEN, generator=generator)
    return ExpertWeights(gate_up, torch.randn(num, HIDDEN, width, generator=generator))


def part(pool: ExpertWeights, which: list[int], size: int) -> ExpertWeights:
    """These, and in the slots behind them what must never come into an answer."""
    empty = torch.full((size - len(which), 1, 1), torch.nan)
    gate_up, down = (
        torch.cat([t[which], empty.expand(-1, *t.shape[1:])]) for t in (pool.gate_up_EWD, pool.down_EDW)
    )  # fmt: skip
    return ExpertWeights(gate_up, down)


@given(layouts, st.integers(1, 4), st.integers(1, 3), st.integers(0, 9), st.booleans(), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_any_placement_gives_what_one_rank_gives(
    layout: tuple[int, int], num_experts: int, top_k: int, most_tokens: int, is_doubled: bool, seed: int
) -> None:
    dims = ParallelDims(*layout)
    generator = torch.Generator().manual_seed(seed)

    def randint(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    pools = [weights(generator, num_experts, width) for width in WIDTHS]
    owner = randint(dims.world, 2, num_experts).tolist()
    second = [[(rank + is_doubled) % dims.world for rank in row] for row in owner]
    held = [[[e for e in range(num_experts) if r in (owner[p][e], second[p][e])] for p in (0, 1)] for r in range(dims.world)]  # fmt: skip
    sizes = [max(len(row[p]) for row in held) for p in (0, 1)]
    table = tuple(
        tuple(slot for p in (0, 1) for slot in ([p * num_experts + e for e in row[p]] + [EMPTY] * sizes[p])[: sizes[p]])
        for row in held
    )
    groups = []
    for _ in range(dims.dp):
        num = int(randint(most_tokens + 1, 1))
        x = torch.randn(num, HIDDEN, generator=generator)
        groups.append((x, randint(2 * num_experts, num, top_k), torch.rand(num, top_k, generator=generator)))

    def work(place: Place) -> Tensor:
        mine = [part(pool, held[place.shard.rank][p], sizes[p]) for p, pool in enumerate(pools)]
        dispatch = choose_dispatcher(place, ExpertMap.of(table, 2 * num_experts))
        x, ids, shares = groups[dims.coordinates(place.shard.rank).dp_rank]
        return place.tp.add(dispatch(TorchOps(), x, mine, ids, shares))

    for rank, got in enumerate(together(work, dims)):
        x, ids, shares = groups[dims.coordinates(rank).dp_rank]
        torch.testing.assert_close(got, LocalDispatcher()(TorchOps(), x, pools, ids, shares), rtol=1e-4, atol=1e-5)


@given(st.integers(1, 6), st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_the_expert_behind_the_last_adds_nothing(num_tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pools = [weights(generator, 3, width) for width in WIDTHS]
    x, shares = torch.randn(num_tokens, HIDDEN, generator=generator), torch.rand(num_tokens, 2, generator=generator)
    ids = torch.randint(7, (num_tokens, 2), generator=generator)
    kept = shares.masked_fill(ids == 6, 0.0)
    wanted = TorchOps().experts(x, pools, ids.clamp(max=5), kept)
    for ops in (TorchOps(), CudaOps(TorchOps().attention)):  # type: ignore[arg-type]
        torch.testing.assert_close(ops.experts(x, pools, ids, shares), wanted, rtol=1e-4, atol=1e-5)

"""Where the experts of one layer stand on the ranks of a gang, and what is told of their use; plain numbers.

Experts of both modalities are in one table: text experts have the indices 0 .. E - 1, vision experts follow. A rank has as
many slots for each modality as every other rank; its text slots come first, then its vision slots.
"""

from __future__ import annotations

from dataclasses import dataclass

from ernie_cluster.config.parallel import ParallelDims, Shard

EMPTY = -1
"""In a slot where no expert stands."""

Table = tuple[tuple[int, ...], ...]
"""[ranks][slots]: the expert in each slot, or EMPTY. One expert may stand on several ranks."""


@dataclass(frozen=True, slots=True)
class ExpertUse:
    """How evenly the tokens of one engine fell on experts and ranks in the last minute or two."""

    imbalance: float
    """Load of the fullest rank over the mean, both added up over all layers; 1 = even, or nothing was routed."""
    hottest_share: float
    """The largest part of one layer's tokens that chose one expert, 0 to 1."""
    routed_tokens: tuple[int, ...]
    """Tokens of each modality since the start: text, vision."""
    num_moves: int
    """How often experts changed places since the start."""


@dataclass(frozen=True, slots=True)
class LayerExperts:
    """One layer's experts, as one engine sees them."""

    layer: int
    """Its index among all layers."""
    tokens: tuple[int, ...]
    """That this engine sent to each expert since its start."""
    table: Table


def dealt(num_experts: int, num_pools: int, dims: ParallelDims) -> Table:
    """One copy each, where `Shard.experts` has it; redundant slots come last and are empty.

    Args:
        num_experts: of one modality, a multiple of the ranks.
        num_pools: modalities, 1 or 2.
        dims: 4 experts, 2 pools, 2 ranks, a redundant slot each: ((0, 1, -1, 4, 5, -1), (2, 3, -1, 6, 7, -1)).
    """
    spare = (EMPTY,) * dims.redundant_experts
    table = []
    for rank in range(dims.world):
        held = Shard(dims, rank).experts(num_experts)
        table.append(tuple(e for p in range(num_pools) for e in (*(p * num_experts + h for h in held), *spare)))
    return tuple(table)

"""Experts of both modalities in one layer: route, run, combine, with no question about the mix of tokens.

Text experts have the indices 0..E-1, vision experts follow. The router looks at the logits of the pool that a token
belongs to; which pool that is, is data, never a branch. Shapes: T tokens, D hidden, E experts of one pool, K chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ernie_cluster.config.experts import Table, dealt
from ernie_cluster.config.model import ExpertPool, TextConfig
from ernie_cluster.config.parallel import WHOLE, Shard
from ernie_cluster.model.dispatch import Dispatcher, ExpertMap, LocalDispatcher, choose_dispatcher
from ernie_cluster.model.group import Group, Place
from ernie_cluster.model.ops import ExpertWeights, TorchOps, choose_experts
from ernie_cluster.model.relocate import relocate
from ernie_cluster.model.storage import Storage, empty_weight


class Router(nn.Module):
    """Chooses K experts of a token's own pool.

    The bias decides only who is chosen; the weights are the unbiased probabilities of the chosen, renormalised.
    Weight and bias are float32, whatever the model's dtype.
    """

    def __init__(self, hidden_size: int, pools: Sequence[ExpertPool], norm_min: float, ops: TorchOps) -> None:
        super().__init__()
        self.ops = ops
        self.num_experts, self.top_k, self.norm_min = pools[0].num_experts, pools[0].top_k, norm_min
        self.num_pools = len(pools)
        self.weight = empty_weight(self.num_pools * self.num_experts, hidden_size, dtype=torch.float32)
        self.bias = empty_weight(self.num_pools, self.num_experts, dtype=torch.float32)

    def forward(self, x_TD: Tensor, is_vision_T: Tensor) -> tuple[Tensor, Tensor]:
        """(ids int64 [T, K] over all pools, weights float32 [T, K] summing to 1)."""
        if self.num_pools == 1:
            return self.ops.route(x_TD, self.weight, self.bias[0], self.top_k, self.norm_min)
        pool_T = is_vision_T.long()
        logits = nn.functional.linear(x_TD.float(), self.weight).view(-1, self.num_pools, self.num_experts)
        logits = logits.gather(1, pool_T[:, None, None].expand(-1, 1, self.num_experts))[:, 0]
        ids, weights = choose_experts(logits, self.bias[pool_T], self.top_k, self.norm_min)
        return ids + (pool_T * self.num_experts)[:, None], weights


class Experts(nn.Module):
    """Fused weights of one rank's experts of one pool: `gate_up` [E, 2W, D], `down` [E, D, W] for experts of width W.

    E is `shard.slots(pool.num_experts)`. Which experts stand in them, the layer's `SparseMLP.table` says; the first dimension
    of every tensor here is that of the experts, so that any can be exchanged with another rank's.
    """

    def __init__(self, hidden_size: int, pool: ExpertPool, storage: Storage, shard: Shard = WHOLE) -> None:
        super().__init__()
        width, num_experts = pool.intermediate_size, shard.slots(pool.num_experts)
        self.gate_up = storage.expert(num_experts, 2 * width, hidden_size)
        self.down = storage.expert(num_experts, hidden_size, width)

    @property
    def weights(self) -> ExpertWeights:
        """The same parameters, as the kernels take them."""
        return ExpertWeights(self.gate_up, self.down)


class SparseMLP(nn.Module):
    """Router, experts of one or two pools, and the always-on shared experts where the model has them.

    On a rank: the whole router, `shard.experts` of each pool, and `shard.slice_of` the shared experts' columns.
    """

    def __init__(
        self, config: TextConfig, *, has_vision_experts: bool, storage: Storage, ops: TorchOps, shard: Shard = WHOLE
    ) -> None:
        super().__init__()
        assert config.text_experts is not None
        pools = [config.text_experts]
        if has_vision_experts and config.vision_experts is not None:
            pools.append(config.vision_experts)
        self.ops = ops
        self.router = Router(config.hidden_size, pools, config.norm_min, ops)
        experts = [Experts(config.hidden_size, pool, storage, shard) for pool in pools]
        self.pools = nn.ModuleList(experts)
        self._weights = [e.weights for e in experts]
        width = shard.share_of(config.shared_intermediate_size)
        self.shared = GatedMLP(config.hidden_size, width, storage, ops) if width else None
        self.costs = tuple(pool.intermediate_size for pool in pools)
        """What a token costs an expert of each modality, in any unit."""
        self.table = dealt(self.router.num_experts, len(pools), shard.dims)
        """Where the experts stand, the same on all ranks."""
        self._dispatch: Dispatcher = LocalDispatcher()

    def connect(self, place: Place) -> None:
        """Send tokens to the experts of the gang's other ranks, too."""
        with torch.device(self.router.weight.device):
            self._map = ExpertMap.of(self.table, self.router.num_experts * self.router.num_pools)
        self._dispatch = choose_dispatcher(place, self._map)

    def move(self, table: Table, ep: Group) -> None:
        """Experts stand by `table` from now on. All ranks of `ep` call this between the same two steps; see `relocate`."""
        relocate(self.pools, self.table, table, ep)
        self._map.follow(table)
        self.table = table

    def forward(self, x_TD: Tensor, is_vision_T: Tensor, chosen: list[Tensor]) -> Tensor:
        """This rank's addend of [T, D]; the sum over tp is the layer's output.

        `chosen` gets the experts of the tokens, int64 [T, K] over all pools.
        """
        ids_TK, weights_TK = self.router(x_TD, is_vision_T)
        chosen.append(ids_TK)
        out = self._dispatch(self.ops, x_TD, self._weights, ids_TK, weights_TK)
        return out if self.shared is None else out + self.shared(x_TD)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)): dense layers and shared experts; `width` of their columns are here."""

    def __init__(self, hidden_size: int, width: int, storage: Storage, ops: TorchOps) -> None:
        super().__init__()
        self.ops = ops
        self.gate_up = storage.linear(2 * width, hidden_size)
        self.down = storage.linear(hidden_size, width)

    def forward(self, x_TD: Tensor, is_vision_T: Tensor | None = None, chosen: Sequence[Tensor] = ()) -> Tensor:
        """This rank's addend of [T, D]; the other arguments are those of `SparseMLP`, and mean nothing here."""
        return self.ops.gated_mlp(x_TD, self.gate_up, self.down)

"""From a layer's tokens to the ranks that hold their experts, and back.

Each dispatcher returns this rank's addend: added up over the tensor-parallel ranks it is the layer's output. So one
sum serves experts and shared experts alike. Shapes: T tokens, K experts per token, D hidden, E experts of both
modalities, C copies of the expert with most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ernie_cluster.config.experts import EMPTY, Table
from ernie_cluster.model.group import Place
from ernie_cluster.model.ops import ExpertWeights, TorchOps


@dataclass(frozen=True, slots=True, eq=False)
class ExpertMap:
    """Where each expert stands; hot ones may stand on several ranks. Its memory stays, whatever moves."""

    rank_EC: Tensor
    """int64 [E, C]: the rank of each copy; columns beyond an expert's last copy mean nothing."""
    local_EC: Tensor
    """int64 [E, C]: its slot on that rank: text slots first, then vision slots."""
    copies_E: Tensor
    """int64 [E]: how many there are, at least 1."""

    @classmethod
    def of(cls, table: Table, num_experts: int) -> ExpertMap:
        """By a table of `num_experts`; where slots are empty, there is room for as many copies as there are ranks."""
        most = 1 if len(table) * len(table[0]) == num_experts else len(table)
        rank_EC = torch.zeros(num_experts, most, dtype=torch.int64)
        out = cls(rank_EC, torch.zeros_like(rank_EC), torch.ones(num_experts, dtype=torch.int64))
        out.follow(table)
        return out

    def follow(self, table: Table) -> None:
        """Experts stand by `table` from now on."""
        copies: list[list[tuple[int, int]]] = [[] for _ in range(len(self.copies_E))]
        for rank, row in enumerate(table):
            for slot, expert in enumerate(row):
                if expert != EMPTY:
                    copies[expert].append((rank, slot))
        most = self.rank_EC.shape[1]
        padded = torch.tensor([(some * most)[:most] for some in copies], device="cpu")
        self.rank_EC.copy_(padded[..., 0])
        self.local_EC.copy_(padded[..., 1])
        self.copies_E.copy_(torch.tensor([len(some) for some in copies], device="cpu"))

    def locate(self, ids_TK: Tensor, first_row: int = 0) -> tuple[Tensor, Tensor]:
        """(rank, slot), int64 [T, K] each; neighbouring tokens use different copies."""
        if self.rank_EC.shape[1] == 1:
            return self.rank_EC[:, 0][ids_TK], self.local_EC[:, 0][ids_TK]
        row_T = torch.arange(first_row, first_row + len(ids_TK), device=ids_TK.device)
        copy_TK = row_T[:, None] % self.copies_E[ids_TK]
        return self.rank_EC[ids_TK, copy_TK], self.local_EC[ids_TK, copy_TK]


class LocalDispatcher:
    """All experts are here."""

    def __call__(
        self, ops: TorchOps, x_TD: Tensor, pools: Sequence[ExpertWeights], ids_TK: Tensor, weights_TK: Tensor
    ) -> Tensor:
        return ops.experts(x_TD, pools, ids_TK, weights_TK)


class ReplicatedDispatcher:
    """All ranks have the same tokens (dp = 1): each runs the experts that it holds.

    Args:
        place: this rank's.
        experts: where they stand.
    """

    def __init__(self, place: Place, experts: ExpertMap) -> None:
        self._place, self.experts = place, experts

    def __call__(
        self, ops: TorchOps, x_TD: Tensor, pools: Sequence[ExpertWeights], ids_TK: Tensor, weights_TK: Tensor
    ) -> Tensor:
        rank_TK, local_TK = self.experts.locate(ids_TK)
        nowhere = sum(pool.num_experts for pool in pools)
        return ops.experts(x_TD, pools, local_TK.masked_fill(rank_TK != self._place.shard.rank, nowhere), weights_TK)


class AllToAllDispatcher:
    """Ranks have different tokens (dp > 1): rows travel to their experts and back, as many as there happen to be.

    Tensor-parallel ranks have the same tokens: each sends its share of them.
    """

    def __init__(self, place: Place, experts: ExpertMap) -> None:
        self._place, self.experts = place, experts

    def __call__(
        self, ops: TorchOps, x_TD: Tensor, pools: Sequence[ExpertWeights], ids_TK: Tensor, weights_TK: Tensor
    ) -> Tensor:
        out = torch.zeros_like(x_TD)
        first, last = self._share(len(x_TD))
        mine, top_k = x_TD[first:last], ids_TK.shape[1]
        rank_P, local_P = (
            part.reshape(-1) for part in self.experts.locate(ids_TK[first:last], first + self._place.ep.rank)
        )
        order = rank_P.argsort(stable=True)
        to = torch.bincount(rank_P, minlength=self._place.ep.size)
        one_each = [1] * self._place.ep.size
        of = self._place.ep.exchange(to, one_each, one_each).tolist()
        sent = to.tolist()
        rows = self._place.ep.exchange(mine.index_select(0, order // top_k), sent, of)
        local = self._place.ep.exchange(local_P.index_select(0, order), sent, of)
        ones = torch.ones(len(rows), 1, device=rows.device)
        done = ops.experts(rows, pools, local[:, None], ones) if len(rows) else rows
        back = self._place.ep.exchange(done, of, sent)
        by_token = torch.empty_like(back).index_copy_(0, order, back).view(len(mine), top_k, x_TD.shape[1])
        out[first:last] = torch.bmm(weights_TK[first:last].to(x_TD.dtype)[:, None], by_token)[:, 0]
        return out

    def _share(self, num_tokens: int) -> tuple[int, int]:
        """First and last + 1 of the rows that this rank sends."""
        tp, i = self._place.shard.dims.tp, self._place.shard.tp_rank
        return num_tokens * i // tp, num_tokens * (i + 1) // tp


Dispatcher = LocalDispatcher | ReplicatedDispatcher | AllToAllDispatcher


def choose_dispatcher(place: Place, experts: ExpertMap) -> Dispatcher:
    """By the shape of the gang."""
    dims = place.shard.dims
    if dims.world == 1:
        return LocalDispatcher()
    return ReplicatedDispatcher(place, experts) if dims.dp == 1 else AllToAllDispatcher(place, experts)

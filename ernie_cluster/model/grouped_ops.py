"""`TorchOps` without a question to the device: what GPUs run. Shapes as in `ops`; P = tokens x experts per token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ernie_cluster.model.ops import ExpertWeights, TorchOps


class GroupedOps(TorchOps):
    """Experts as grouped matrix products whose group sizes stay on the device.

    All shapes depend on the number of tokens alone, so the host never waits and a step can be captured as a graph.
    """

    def experts(self, x_TD: Tensor, pools: Sequence[ExpertWeights], ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """See `TorchOps`. Rows are sorted by expert; each pool's products start at its own first row.

        A grouped product begins at row 0 and leaves the rows behind its last group undefined. So for each pool the
        rows are rolled until its own come first, and of the results only its own are taken.
        """
        num_tokens, top_k = ids_TK.shape
        flat, num_experts = ids_TK.view(-1), sum(p.num_experts for p in pools)
        order = flat.argsort(stable=True)
        counts = torch.zeros(num_experts + 1, dtype=torch.long, device=flat.device)
        ends = counts.scatter_add_(0, flat, torch.ones_like(flat)).cumsum(0)
        place = torch.arange(len(flat), device=flat.device)
        rows = x_TD.index_select(0, order // top_k)
        out, start, first = torch.zeros_like(rows), ends.new_zeros(()), 0
        for pool in pools:
            last = first + pool.num_experts
            offsets = (ends[first:last] - start).int()
            mine = rows.index_select(0, (place + start) % len(flat))
            gate, up = functional.grouped_mm(mine, pool.gate_up_EWD[...].transpose(1, 2), offs=offsets).chunk(2, -1)
            done = functional.grouped_mm(functional.silu(gate) * up, pool.down_EDW[...].transpose(1, 2), offs=offsets)
            is_mine = (place >= start) & (place < ends[last - 1])
            out = torch.where(is_mine[:, None], done.index_select(0, (place - start) % len(flat)), out)
            start, first = ends[last - 1], last
        by_token = torch.empty_like(out).index_copy_(0, order, out).view(num_tokens, top_k, x_TD.shape[1])
        return torch.bmm(weights_TK.to(x_TD.dtype)[:, None], by_token)[:, 0]

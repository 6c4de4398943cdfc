"""The heavy operations of the decoder, behind one object so that a faster variant is another object.

`TorchOps` is plain torch and right everywhere; `cpu_ops.NumbaOps` answers the same calls faster for small bfloat16
batches on CPU. Shapes: T tokens, D hidden, O outputs, H query heads, G kv heads, F = head_dim / 2, K experts per
token, W width of an expert, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ernie_cluster.model.kv_pages import PLAIN_PAGES, PlainPages
from ernie_cluster.model.rope import rotate_interleaved
from ernie_cluster.model.step import StepInput
from ernie_cluster.model.storage import Weight


@dataclass(frozen=True, slots=True, eq=False)
class ExpertWeights:
    """The experts of one modality, fused."""

    gate_up_EWD: Weight
    """[E, 2W, D], gate rows first."""
    down_EDW: Weight
    """[E, D, W]."""

    @property
    def num_experts(self) -> int:
        return self.gate_up_EWD.shape[0]

    @property
    def is_packed(self) -> bool:
        """Whether they are unpacked when they are asked for."""
        return not isinstance(self.gate_up_EWD, Tensor)


def choose_experts(logits_TE: Tensor, bias_TE: Tensor, top_k: int, norm_min: float) -> tuple[Tensor, Tensor]:
    """(ids int64 [T, K], weights float32 [T, K]): chosen by biased, weighted by unbiased, renormalised probabilities."""
    scores = logits_TE.softmax(-1)
    ids = (scores + bias_TE).topk(top_k, -1, sorted=False).indices
    weights = scores.gather(-1, ids)
    return ids, weights / weights.sum(-1, keepdim=True).clamp_min(norm_min)


class TorchOps:
    """Plain torch; no state.

    Args:
        pages: how K and V lie in the cache.
    """

    def __init__(self, pages: PlainPages = PLAIN_PAGES) -> None:
        self.pages = pages

    def check_block_size(self, block_size: int) -> None:
        """ConfigError when `attention` cannot take KV blocks of so many tokens; here it takes any."""

    def linear(self, x_TD: Tensor, weight_OD: Weight) -> Tensor:
        """x @ weight.T -> [T, O]."""
        return functional.linear(x_TD, weight_OD[...])

    def expert_linear(self, x_TD: Tensor, weight_EOD: Weight, expert: int) -> Tensor:
        """The same with one expert's matrix."""
        return functional.linear(x_TD, weight_EOD[expert])

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """Normalised in float32, cast to x's dtype, then scaled."""
        x = x_TD.float()
        return weight_D * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(x_TD.dtype)

    def add_rms_norm(self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(rms_norm(x + residual), x + residual)."""
        residual_TD = residual_TD + x_TD
        return self.rms_norm(residual_TD, weight_D, eps), residual_TD

    def gated_mlp(self, x_TD: Tensor, gate_up_WD: Weight, down_DW: Weight) -> Tensor:
        """down(silu(gate(x)) * up(x)); gate and up in one matrix, gate rows first."""
        return self.linear(self.gate(self.linear(x_TD, gate_up_WD)), down_DW)

    def gate(self, gate_up_TN: Tensor) -> Tensor:
        """silu(gate) * up -> [T, N / 2]; gate columns first."""
        gate, up = gate_up_TN.chunk(2, -1)
        return functional.silu(gate) * up

    def turn(self, heads_THD: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
        """See `rotate_interleaved`."""
        return rotate_interleaved(heads_THD, cos_TF, sin_TF)

    def rotate_and_store(
        self,
        qkv_TX: Tensor,
        cos_TF: Tensor,
        sin_TF: Tensor,
        slots_T: Tensor,
        pages: tuple[Tensor, Tensor],
        num_heads: int,
    ) -> Tensor:
        """Turn q and k, write k and v to their slots, and return q [T, H, head_dim].

        Args:
            qkv_TX: [T, (H + 2G) * head_dim].
            pages: K and V of one layer, each [blocks, block_size, G, row]; changed in place.
        """
        k_pages, v_pages = pages
        num_tokens, num_kv_heads = qkv_TX.shape[0], k_pages.shape[2]
        num_all = num_heads + 2 * num_kv_heads
        heads = qkv_TX.view(num_tokens, num_all, qkv_TX.shape[1] // num_all)
        turned = self.turn(heads[:, : num_heads + num_kv_heads], cos_TF, sin_TF)
        self.pages.write(k_pages, slots_T, turned[:, num_heads:])
        self.pages.write(v_pages, slots_T, heads[:, num_heads + num_kv_heads :])
        return turned[:, :num_heads]

    def attention(self, q_THD: Tensor, pages: tuple[Tensor, Tensor], step: StepInput) -> Tensor:
        """Causal attention of every query over its sequence's paged K and V -> [T, H * head_dim]."""
        parts = []
        if step.num_decode:
            parts.append(self.decode_attention(q_THD[: step.num_decode], pages, step))
        row = step.num_decode
        for i in range(step.num_decode, len(step.query_lens)):
            length = step.query_lens[i]
            parts.append(self._chunk_attention(q_THD[row : row + length], pages, step, i))
            row += length
        if not parts:  # a rank without tokens, whose peers have some
            return q_THD.flatten(1)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def decode_attention(self, q_BHD: Tensor, pages: tuple[Tensor, Tensor], step: StepInput) -> Tensor:
        """One query per sequence; contexts are gathered and padded to the longest. -> [B, H * head_dim]."""
        num, longest = step.num_decode, max(step.context_lens[: step.num_decode])
        block_size = pages[0].shape[1]
        tables = step.block_tables_BM[:num, : -(-longest // block_size)].long()
        blocks = (self.pages.read(p, tables, q_BHD.dtype) for p in pages)
        k, v = (b.flatten(1, 2)[:, :longest].transpose(1, 2) for b in blocks)
        is_valid = torch.arange(longest, device=q_BHD.device)[None] < step.seq_lens_B[:num, None]
        out = functional.scaled_dot_product_attention(
            q_BHD[:, :, None], k, v, attn_mask=is_valid[:, None, None], enable_gqa=True
        )
        return out.reshape(num, -1)

    def _chunk_attention(self, q_QHD: Tensor, pages: tuple[Tensor, Tensor], step: StepInput, i: int) -> Tensor:
        """A chunk of one sequence: queries are the last tokens of the context. -> [Q, H * head_dim]."""
        query, context = step.query_lens[i], step.context_lens[i]
        block_size = pages[0].shape[1]
        table = step.block_tables_BM[i, : -(-context // block_size)].long()
        blocks = (self.pages.read(p, table, q_QHD.dtype) for p in pages)
        k, v = (b.flatten(0, 1)[:context].transpose(0, 1)[None] for b in blocks)
        mask = None
        if query != context:
            positions = torch.arange(context, device=q_QHD.device)
            mask = positions[None] <= positions[context - query :, None]
        out = functional.scaled_dot_product_attention(
            q_QHD.transpose(0, 1)[None], k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return out[0].transpose(0, 1).reshape(query, -1)

    def route(
        self, x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor, top_k: int, norm_min: float
    ) -> tuple[Tensor, Tensor]:
        """Experts of one pool for each token: (ids int64 [T, K], weights float32 [T, K]); all in float32."""
        return choose_experts(functional.linear(x_TD.float(), weight_ED), bias_E, top_k, norm_min)

    def experts(self, x_TD: Tensor, pools: Sequence[ExpertWeights], ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Weighted sum of each token's experts -> [T, D].

        Rows are sorted by expert, and each expert that is hit runs two matrix products over its rows. On CPU reading
        the counts costs nothing, there is no device to wait for.

        Args:
            pools: experts in index order: text first, then vision if this replica has them.
            ids_TK: int64 [T, K], indices over all pools; the number behind the last one is an expert that adds nothing.
            weights_TK: float32 [T, K].
        """
        num_tokens, top_k = ids_TK.shape
        order = ids_TK.view(-1).argsort(stable=True)
        counts = torch.bincount(ids_TK.view(-1), minlength=sum(p.num_experts for p in pools) + 1).tolist()
        rows = x_TD.index_select(0, order // top_k)
        out = torch.zeros_like(rows) if counts[-1] else torch.empty_like(rows)
        start = expert = 0
        for pool in pools:
            for e in range(pool.num_experts):
                end = start + counts[expert]
                if end > start:
                    gate, up = self.expert_linear(rows[start:end], pool.gate_up_EWD, e).chunk(2, -1)
                    out[start:end] = self.expert_linear(functional.silu(gate).mul_(up), pool.down_EDW, e)
                start, expert = end, expert + 1
        by_token = torch.empty_like(out).index_copy_(0, order, out).view(num_tokens, top_k, x_TD.shape[1])
        return self.weighted_sum(weights_TK.to(x_TD.dtype), by_token)

    def weighted_sum(self, weights_TK: Tensor, x_TKD: Tensor) -> Tensor:
        """[T, D]."""
        return torch.bmm(weights_TK[:, None], x_TKD)[:, 0]

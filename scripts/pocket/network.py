"""The model as it is trained: the parameters are those of the serving modules, the forward pass is made for batches.

`ernie_cluster.model` holds the parameters under the names that its loader fills, so exporting is loading backwards.
Here they are float32; products run in bfloat16, as in serving (but for attention). No key-value cache, no paging: attention works on
segments (see `batch.py`). Linear heads beside the model, `scaffold`, are taught what stands at each patch, and
where; they help it to see early, and are left behind at the export.

Shapes: N tokens, P patches, C ViT width, D decoder width, H heads, K chosen experts, E experts of one pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from batch import Batch, Pointers, Rectangles
from torch import Tensor, nn
from torch.nn import functional

from ernie_cluster.config.model import ModelConfig
from ernie_cluster.model.build import build_decoder, build_vision
from ernie_cluster.model.moe import GatedMLP, SparseMLP
from ernie_cluster.model.vision import IMAGE_MEAN, IMAGE_STD, MergeMLP, VisionBlock

HALF = torch.bfloat16

_MIDDLE = 3
"""Before this layer the scaffold reads where things are: neither ViT nor decoder is told absolute positions.

The layer's first head is taught to look, while a box is written, at what the box frames.
"""


@dataclass(frozen=True, slots=True)
class Thoughts:
    """What the network makes of a batch."""

    logits: Tensor
    """[targets, vocabulary]."""
    patches: Tensor
    """[P, C]: the ViT's outputs."""
    embeds: Tensor
    """[n, D]: the resampler's."""
    deep: Tensor
    """[n, D]: what the first layers make of these."""
    aims: Tensor
    """[pointers]: log of the share of its attention that a head gives to what is sought."""
    found: Tensor
    """[pointers, D]: what the rows that write boxes know then."""


class Network(nn.Module):
    """Decoder, vision encoder and scaffold.

    Args:
        config: shape of the model.
        num_labels: what the scaffold tells apart: names, colours, and numbers of centres.
    """

    def __init__(self, config: ModelConfig, num_labels: tuple[int, int, int], seed: int = 0) -> None:
        super().__init__()
        assert config.vision is not None
        self.config = config
        cpu = torch.device("cpu")
        self.decoder = build_decoder(config, "mixed", dtype=torch.float32, device=cpu)
        self.vision = build_vision(config, dtype=torch.float32, device=cpu)
        names, colours, counts = num_labels
        self.scaffold = nn.ModuleDict(
            {
                "names": nn.Linear(config.vision.hidden_size, names),
                "colours": nn.Linear(config.vision.hidden_size, colours),
                "boxes": nn.Linear(config.vision.hidden_size, 4),
                "counts": nn.Linear(config.text.hidden_size, counts),
                "token_names": nn.Linear(config.text.hidden_size, 4 * names),
                "token_colours": nn.Linear(config.text.hidden_size, 4 * colours),
                "token_boxes": nn.Linear(config.text.hidden_size, 4 * 4),
                "token_places": nn.Linear(config.text.hidden_size, 4 * 4),
                "deep_places": nn.Linear(config.text.hidden_size, 4 * 4),
                "deep_boxes": nn.Linear(config.text.hidden_size, 4),
            }
        )
        self.loads: dict[int, Tensor] = {}
        """Layer -> how many tokens each expert got in the last forward pass, int64 [2, E]."""
        _initialise(self, seed)

    def forward(self, batch: Batch, *, are_eyes_taught: bool = True) -> Thoughts:
        x = functional.embedding(batch.ids, self.decoder.embed.to(HALF))
        with torch.set_grad_enabled(are_eyes_taught and torch.is_grad_enabled()):
            patches, embeds = self.see(batch)
        x = x.index_copy(0, batch.media_rows, embeds[: len(batch.media_rows)])
        turn = _text_angles(batch.positions, self.config)
        deep, aims, found = embeds, x, x
        for i, layer in enumerate(self.decoder.layers):
            if i == _MIDDLE:
                deep = x.index_select(0, batch.media_rows)
            attended, turned = self._attention(layer, _rms(x, layer.input_norm, layer.eps), turn, batch)
            if i == _MIDDLE:
                aims = _aims(turned[:, 0], turned[:, self.config.text.num_heads], batch.pointers)
            x = x + attended
            if i == _MIDDLE:
                found = x.index_select(0, batch.pointers.rows)
            x = x + self._mlp(i, layer.mlp, _rms(x, layer.post_attention_norm, layer.eps), batch)
        rows = _rms(x.index_select(0, batch.target_rows), self.decoder.norm, self.config.text.rms_norm_eps)
        return Thoughts(linear(rows, self.decoder.embed).float(), patches, embeds, deep, aims, found)

    def _attention(
        self, layer: nn.Module, x: Tensor, turn: tuple[Tensor, Tensor], batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Its output, and queries followed by keys."""
        text = self.config.text
        qkv = linear(x, layer.attention.qkv).view(len(x), -1, text.head_dim)
        num_turned = text.num_heads + text.num_kv_heads
        turned = _turn_pairs(qkv[:, :num_turned], *turn)
        q, kv = turned[:, : text.num_heads], torch.cat([turned[:, text.num_heads :], qkv[:, num_turned:].float()], 1)
        attended = _attend(q, kv, batch.segments, text.num_heads // text.num_kv_heads)
        return linear(attended, layer.attention.out), turned

    def _mlp(self, index: int, mlp: nn.Module, x: Tensor, batch: Batch) -> Tensor:
        if isinstance(mlp, GatedMLP):
            return _gated(x, mlp.gate_up, mlp.down)
        assert isinstance(mlp, SparseMLP)
        assert mlp.shared is not None
        router, outs = mlp.router, []
        loads = torch.zeros(2, router.num_experts, dtype=torch.int64)
        for number, rows in enumerate((batch.text_rows, batch.vision_rows)):
            first = number * router.num_experts
            weight = router.weight[first : first + router.num_experts]
            pool = mlp.pools[number]
            mine = x.index_select(0, rows)
            scores = functional.linear(mine.float(), weight).softmax(-1)
            ids = (scores.detach() + router.bias[number]).topk(router.top_k, -1, sorted=False).indices
            chosen = scores.gather(-1, ids)
            chosen = chosen / chosen.sum(-1, keepdim=True).clamp_min(router.norm_min)
            loads[number] = torch.bincount(ids.view(-1), minlength=router.num_experts)
            outs.append(_experts(mine, pool.gate_up, pool.down, ids, chosen, loads[number]))
        self.loads[index] = loads
        back = torch.cat(outs).index_select(0, batch.pool_order)
        return back + _gated(x, mlp.shared.gate_up, mlp.shared.down)

    def see(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """ViT outputs [P, C] and embeddings [n, D] of all pictures."""
        vision = self.config.vision
        assert vision is not None
        tower, resampler = self.vision.tower, self.vision.resampler
        per_channel = vision.patch_size**2
        mean, std = (torch.tensor(v).repeat_interleave(per_channel) for v in (IMAGE_MEAN, IMAGE_STD))
        x = linear(((batch.patches.float() / 255.0 - mean) / std).to(HALF), tower.patch_embed)
        cos, sin = _patch_angles(batch.patch_places, vision.head_dim)
        for block in tower.blocks:
            x = _vision_block(block, x, cos, sin, batch)
        x = _layer_norm(x, tower.ln)
        merged = _merge(resampler.spatial, x.view(-1, vision.merged_size))
        pairs = torch.cat([merged.index_select(0, batch.first_frame), merged.index_select(0, batch.second_frame)], -1)
        out = linear(_merge(resampler.temporal, pairs), resampler.mlp.weight, resampler.mlp.bias)
        return x, _rms(out, resampler.after_norm, resampler.rms_norm_eps)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """In bfloat16, whatever the weights are kept in."""
    return functional.linear(x, weight.to(HALF), None if bias is None else bias.to(HALF))


def _gated(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return linear(_swiglu(linear(x, gate_up)), down)


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return functional.silu(gate) * up


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_ROUND = 128
"""Runs of rows are padded to multiples of this: products of few different shapes are much faster."""


def _experts(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, loads: Tensor) -> Tensor:
    """Each expert's rows side by side, padded; each token's results are then weighted and added."""
    num_tokens, top_k = ids.shape
    padded = (loads + _ROUND - 1) // _ROUND * _ROUND
    order = ids.view(-1).argsort(stable=True)
    shift = (padded.cumsum(0) - padded) - (loads.cumsum(0) - loads)
    place = torch.arange(len(order)) + shift.index_select(0, ids.view(-1).index_select(0, order))
    slots = torch.zeros(int(padded.sum()), dtype=torch.int64).index_copy_(0, place, order // top_k)
    rows = x.index_select(0, slots).split(padded.tolist())
    outs = []
    for part, up_weight, down_weight in zip(rows, gate_up.to(HALF).unbind(), down.to(HALF).unbind(), strict=True):
        outs.append(functional.linear(_swiglu(functional.linear(part, up_weight)), down_weight))
    back = torch.empty_like(order).index_copy_(0, order, place)
    by_token = torch.cat(outs).index_select(0, back).view(num_tokens, top_k, down.shape[1])
    return (by_token * weights.to(HALF)[:, :, None]).sum(1)


def _attend(q: Tensor, kv: Tensor, where: Rectangles, group: int) -> Tensor:
    """What each row reads, bfloat16 [N, H * head_dim], from float32 queries [N, H, head_dim] and keys and values.

    In float32: the products are small, and their many shapes would each be compiled anew in bfloat16.
    """
    num_kv, head_dim = kv.shape[1] // 2, q.shape[-1]
    if not where.sizes:
        return q.new_zeros(len(q), q.shape[1] * head_dim, dtype=HALF)
    all_q = (q * head_dim**-0.5).index_select(0, where.q_rows).split([b * n for b, n, _ in where.sizes])
    all_kv = kv.index_select(0, where.k_rows).split([b * n for b, _, n in where.sizes])
    outs = []
    for (num, q_len, k_len), mask, own_q, own_kv in zip(where.sizes, where.masks, all_q, all_kv, strict=True):
        # heads that share keys stand below each other, so that one product serves the group
        heads = own_q.view(num, q_len, num_kv, group, head_dim).permute(0, 2, 3, 1, 4)
        heads = heads.reshape(num * num_kv, group * q_len, head_dim)
        k, v = own_kv.view(num, k_len, 2, num_kv, head_dim).permute(2, 0, 3, 1, 4).flatten(1, 2)
        out = _Read.apply(heads, k, v, mask).view(num, num_kv * group, q_len, head_dim)
        outs.append(out.transpose(1, 2).reshape(num * q_len, -1))
    return torch.cat(outs).to(HALF).index_select(0, where.places)


def _aims(q: Tensor, k: Tensor, pointers: Pointers) -> Tensor:
    """Log shares, float32 [pointers], of one head's queries and keys [N, head_dim]."""
    scores = q.index_select(0, pointers.rows) @ k.T * q.shape[-1] ** -0.5
    sought, seen = (
        scores.masked_fill(~mask, -torch.inf).logsumexp(-1) for mask in (pointers.is_sought, pointers.is_seen)
    )
    return sought - seen


class _Read(torch.autograd.Function):
    """softmax(q k^T + mask) v; keeps only the shares for the way back, and works in place."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        num, group_q, k_len = len(q), q.shape[1], k.shape[1]
        scores = torch.bmm(q, k.transpose(1, 2))
        scores.view(len(mask), -1, mask.shape[2] if mask.shape[2] > 1 else group_q, k_len).add_(mask)
        shares = scores.softmax(-1).view(num, group_q, k_len)
        ctx.save_for_backward(q, k, v, shares)
        return torch.bmm(shares, v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, shares = ctx.saved_tensors
        wrong = torch.bmm(grad, v.transpose(1, 2)).mul_(shares)
        wrong.addcmul_(shares, wrong.sum(-1, keepdim=True), value=-1)
        return torch.bmm(wrong, k), torch.bmm(wrong.transpose(1, 2), q), torch.bmm(shares.transpose(1, 2), grad), None


def _vision_block(block: VisionBlock, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch) -> Tensor:
    normed = _layer_norm(x, block.norm1)
    qkv = linear(normed, block.qkv.weight, block.qkv.bias).view(len(x), 3 * block.num_heads, -1)
    turned = _turn_halves(qkv[:, : 2 * block.num_heads], cos, sin)
    values = qkv[:, 2 * block.num_heads :].float()
    q, kv = turned[:, : block.num_heads], torch.cat([turned[:, block.num_heads :], values], 1)
    x = x + linear(_attend(q, kv, batch.frames, 1), block.proj.weight, block.proj.bias)
    hidden = linear(_layer_norm(x, block.norm2), block.fc1.weight, block.fc1.bias)
    return x + linear(_quick_gelu(hidden), block.fc2.weight, block.fc2.bias)


def _merge(mlp: MergeMLP, x: Tensor) -> Tensor:
    hidden = functional.gelu(linear(x, mlp.fc1.weight, mlp.fc1.bias))
    return _layer_norm(linear(hidden, mlp.fc2.weight, mlp.fc2.bias), mlp.ln)


def _layer_norm(x: Tensor, norm: nn.Module) -> Tensor:
    return functional.layer_norm(x, norm.weight.shape, norm.weight.to(HALF), norm.bias.to(HALF), norm.eps)


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(HALF) * weight.to(HALF)


def _text_angles(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [N, 1, head_dim / 2]; frequencies as in `ernie_cluster.model.rope`."""
    text = config.text
    num_spatial = text.mrope_section[0] + text.mrope_section[1]
    inverse = text.rope_theta ** -(torch.arange(0, text.head_dim, 2) / text.head_dim)
    axis = torch.tensor([(1 + i % 2) if i < num_spatial else 0 for i in range(text.head_dim // 2)])
    angle = (positions.float().index_select(0, axis).T * inverse)[:, None]
    return angle.cos(), angle.sin()


def _turn_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)


def _patch_angles(places: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [P, 1, head_dim], of patches in rows and columns [P, 2]."""
    half = head_dim // 2
    inverse = 10000.0 ** -(torch.arange(0, half, 2) / half)
    angle = (places.float()[:, :, None] * inverse).flatten(1)
    angle = torch.cat([angle, angle], -1)[:, None]
    return angle.cos(), angle.sin()


def _turn_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.float()
    first, second = wide.chunk(2, -1)
    return wide * cos + torch.cat([-second, first], -1) * sin


@torch.no_grad()
def _initialise(network: Network, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, p in network.named_parameters():
        p.requires_grad_(not name.endswith("router.bias"))
        if name.endswith("bias"):
            p.zero_()
        elif p.ndim == 1:
            p.fill_(1.0)
        elif name.endswith(("attention.out", "down", "proj.weight", "fc2.weight")) and "resampler" not in name:
            p.zero_()  # each layer begins by passing on what it gets
        else:
            p.normal_(0, _EMBED if name.endswith("embed") else 0.7 * p.shape[-1] ** -0.5, generator=generator)
    network.decoder.norm.fill_(0.06)  # the embedding is the head, too: logits begin near 1
    network.vision.resampler.after_norm.fill_(_EMBED)
    for block, steps in zip(network.vision.tower.blocks, _NEIGHBOURS, strict=False):
        _look_around(block, steps)


_EMBED = 0.5
"""Size of the numbers in words' and pictures' embeddings: large enough to be seen beside what the layers add."""

_NEIGHBOURS = (
    ((0, 1), (0, -1), (1, 0), (-1, 0)),
    ((1, 1), (1, -1), (-1, 1), (-1, -1)),
    ((0, 2), (0, -2), (2, 0), (-2, 0)),
)
"""Per block and head: which neighbour (rows down, columns right) it looks at to begin with; later blocks look freely."""

_ATTENTION_PULL = 5.0


def _look_around(block: VisionBlock, steps: tuple[tuple[int, int], ...]) -> None:
    """Let each head begin by looking at one neighbour: a ViT that must find out what is near needs far more pictures.

    The biases of query and key are turned like all queries and keys. A key's bias that lies behind the query's by the
    angle of a step makes the product greatest where the key is that step away.
    """
    width = block.qkv.weight.shape[1]
    head_dim = width // block.num_heads
    half = head_dim // 2
    inverse = 10000.0 ** -(torch.arange(0, half, 2) / half)
    is_high = (inverse > 0.05).repeat(2) * _ATTENTION_PULL
    block.qkv.weight[: 2 * width] *= 0.3
    for head, (down, right) in enumerate(steps[: block.num_heads]):
        angle = -torch.cat([inverse * down, inverse * right])
        query, key = (block.qkv.bias[i * width + head * head_dim :][:head_dim] for i in (0, 1))
        query[:half] = is_high
        key[:half], key[half:] = is_high * angle.cos(), is_high * angle.sin()

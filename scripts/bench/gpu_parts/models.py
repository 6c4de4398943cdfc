"""Random models, steps for them, and what a step costs at least."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ernie_cluster.config.model import ExpertPool, ModelConfig, TextConfig
from ernie_cluster.engine.sampler import SamplerRow
from ernie_cluster.model.build import Role, build_decoder
from ernie_cluster.model.decoder import Decoder
from ernie_cluster.model.moe import SparseMLP
from ernie_cluster.model.packing import make_step
from ernie_cluster.model.step import StepInput
from ernie_cluster.request import SamplingParams

GREEDY = SamplerRow(SamplingParams(temperature=0), 0, (), (), ())


def small_config(vocab_size: int = 512) -> ModelConfig:
    """Of the family's shape: one dense layer, one with experts, groups of two heads."""
    text = TextConfig(
        vocab_size=vocab_size, hidden_size=256, intermediate_size=512, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=128, rms_norm_eps=1e-5, rope_theta=500000.0, mrope_section=(22, 22, 20), max_position_embeddings=8192,
        tie_word_embeddings=True, use_bias=False, sparse_layers=frozenset({1}), text_experts=ExpertPool(8, 128, 2),
        vision_experts=None, shared_intermediate_size=256, norm_min=1e-12, router_is_transposed=False,
    )  # fmt: skip
    return ModelConfig(text, None, None, "bfloat16")


def random_decoder(config: ModelConfig, role: Role, dtype: torch.dtype, device: torch.device) -> Decoder:
    """Weights of sensible size, drawn on the device: 59 GB from a host's generator would take minutes."""
    if device.type == "cuda":
        torch.compiler.reset()  # the compiler makes a size that differs between models one that it does not know
    decoder = build_decoder(config, role, dtype=dtype, device=device)
    with torch.inference_mode():
        for name, p in decoder.named_parameters():
            if name.endswith("norm"):
                p.fill_(1.0)
            elif name.endswith("bias"):
                p.zero_()
            else:
                scale = 1.0 if name == "embed" else p.shape[-1] ** -0.5
                p.uniform_(-scale * 3**0.5, scale * 3**0.5)
    return decoder


def step_of(
    parts: Sequence[tuple[int, int]],
    block_size: int,
    device: torch.device,
    *,
    vocab_size: int,
    width: int | None = None,
    seed: int = 0,
) -> StepInput:
    """A step of sequences: (tokens in the step, tokens afterwards) of each, those that decode first.

    Each owns `width` blocks, as many as the longest needs unless it is given; the same ones in every step of that width.
    """
    width = width or max(-(-context // block_size) for _, context in parts)
    tables = np.arange(1, len(parts) * width + 1, dtype=np.int32).reshape(len(parts), width)
    positions = np.concatenate([np.arange(context - query, context) for query, context in parts])
    rows = np.repeat(np.arange(len(parts)), [query for query, _ in parts])
    ends = np.cumsum([query for query, _ in parts])
    return make_step(
        token_ids=np.random.default_rng(seed).integers(0, vocab_size, len(positions)),
        positions=np.broadcast_to(positions, (3, len(positions))),
        slots=tables[rows, positions // block_size].astype(np.int64) * block_size + positions % block_size,
        block_tables=tables,
        query_lens=[query for query, _ in parts],
        context_lens=[context for _, context in parts],
        num_decode=sum(query == 1 for query, _ in parts),
        logits_rows=(ends - 1).tolist(),
        device=device,
    )


def experts_hit(decoder: Decoder, work: object) -> int:
    """Experts of all layers that `work()` reads, counted by standing in for the kernel once."""
    ops, hits = decoder.ops, 0
    original = ops.experts

    def counting(x, pools, ids, weights):  # type: ignore[no-untyped-def]
        nonlocal hits
        hits += len(ids.unique())
        return original(x, pools, ids, weights)

    ops.experts = counting  # type: ignore[method-assign]
    try:
        work()  # type: ignore[operator]
    finally:
        del ops.experts
    return hits


def expert_bytes(text: TextConfig, itemsize: int) -> int:
    """Of one text expert."""
    assert text.text_experts is not None
    return 3 * text.hidden_size * text.text_experts.intermediate_size * itemsize


def fixed_bytes(decoder: Decoder) -> int:
    """Weights that every step reads: all but the experts, and but the embedding where it is not the head, too."""
    experts = sum(p.nbytes for m in decoder.modules() if isinstance(m, SparseMLP) for p in m.pools.parameters())
    table = 0 if decoder.config.tie_word_embeddings else decoder.embed.nbytes
    return sum(p.nbytes for p in decoder.parameters()) - experts - table


def kv_bytes(text: TextConfig, tokens: int, itemsize: int) -> int:
    return 2 * text.num_layers * text.num_kv_heads * text.head_dim * itemsize * tokens


def prefill_flops(decoder: Decoder, tokens: int) -> float:
    """Of a text prompt: two per weight that a token meets, scores and values of the causal half, one row of the head."""
    text = decoder.config
    per_token = 0.0
    for name, p in decoder.named_parameters():
        if ".pools.0." in name:
            assert text.text_experts is not None
            per_token += p.numel() * text.text_experts.top_k / text.text_experts.num_experts
        elif p.dim() == 2 and ".pools." not in name and name not in ("embed", "head"):
            per_token += p.numel()
    scores = 2.0 * tokens**2 * text.num_heads * text.head_dim * text.num_layers
    return 2.0 * per_token * tokens + scores + 2.0 * text.vocab_size * text.hidden_size

"""Checkpoint tensors -> parameters: the plan, under the hub's names, for a role and a rank.

A `Copy` says which part of which tensor goes where, so the whole plan can be checked before a byte is read. Only the
tensors of a replica's role are opened, and only a rank's part of them is read. With D = hidden size, H and G = query and KV
heads of a rank, F = head_dim, W = a rank's columns of a gated MLP, E = a rank's experts of one modality, V = vocabulary, a
decoder's parameters are

    embed, head [V, D]              norms [D]                    whole on every rank
    attention.qkv [(H + 2G)F, D]    attention.out [D, HF]        split over tp, by heads
    mlp.gate_up [2W, D]             mlp.down [D, W]              dense layers and shared experts: split over tp
    pools.N.gate_up [E, 2W, D]      pools.N.down [E, D, W]       whole experts, spread over ep
    router.weight [experts, D]      router.bias [pools, experts / pools]     whole on every rank

Where matrices are quantised, attention, MLPs and experts have `codes` and `scales` instead. Codes are those of the whole
matrix, whatever part of it a rank holds, so every layout of ranks computes with the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ernie_cluster.config.model import ExpertPool, ModelConfig, TextConfig, VisionConfig
from ernie_cluster.config.parallel import WHOLE, Shard
from ernie_cluster.errors import CheckpointError
from ernie_cluster.model.checkpoint import Checkpoint
from ernie_cluster.model.decoder import Decoder
from ernie_cluster.model.fill import (
    Copy,
    check,
    fill,
    no_progress,
    quantised_weights,
    scales_name,
    stored_copies,
)
from ernie_cluster.model.vision import VisionEncoder

_UNUSED = ("lm_head.weight", "mtp_", ".mtp", "rotary_emb.inv_freq", "moe_statics.expert_usage")
"""In names of tensors that published checkpoints may hold and no replica needs: a head that is tied to the embedding,
layers for speculative decoding, what can be computed, and how often training chose an expert."""


def decoder_copies(config: ModelConfig, *, has_vision_experts: bool, shard: Shard = WHOLE) -> Iterator[Copy]:
    """Where every tensor of the decoder goes, or the part of it that `shard` holds."""
    text = config.text
    hidden, table = (text.hidden_size,), (text.vocab_size, text.hidden_size)
    yield Copy("model.embed_tokens.weight", "embed", table)
    yield Copy("model.norm.weight", "norm", hidden)
    if not text.tie_word_embeddings:
        yield Copy("lm_head.weight", "head", table)
    for i in range(text.num_layers):
        source, target = f"model.layers.{i}", f"layers.{i}"
        yield Copy(f"{source}.input_layernorm.weight", f"{target}.input_norm", hidden)
        yield Copy(f"{source}.post_attention_layernorm.weight", f"{target}.post_attention_norm", hidden)
        yield from _attention(text, f"{source}.self_attn", f"{target}.attention", shard)
        if i in text.sparse_layers:
            yield from _sparse(text, f"{source}.mlp", f"{target}.mlp", has_vision_experts, shard)
        else:
            yield from _split_gated(text, f"{source}.mlp", f"{target}.mlp", text.intermediate_size, shard)


def _attention(text: TextConfig, source: str, target: str, shard: Shard) -> Iterator[Copy]:
    kv = shard.kv_heads(text.num_kv_heads)
    queries = _times(shard.slice_of(text.num_heads), text.head_dim)
    keys = _times(slice(kv.start, kv.stop), text.head_dim)
    start = 0
    for name, heads, rows in (
        ("q", text.num_heads, queries),
        ("k", text.num_kv_heads, keys),
        ("v", text.num_kv_heads, keys),
    ):
        end = start + rows.stop - rows.start
        shape = (heads * text.head_dim, text.hidden_size)
        yield Copy(f"{source}.{name}_proj.weight", f"{target}.qkv", shape, (slice(start, end),), (rows,))
        start = end
    shape = (text.hidden_size, text.num_heads * text.head_dim)
    yield Copy(f"{source}.o_proj.weight", f"{target}.out", shape, part=(slice(None), queries))


def _times(part: slice, size: int) -> slice:
    """Heads -> their rows."""
    return slice(part.start * size, part.stop * size)


def _split_gated(text: TextConfig, source: str, target: str, width: int, shard: Shard) -> Iterator[Copy]:
    """A gated MLP whose columns are split over tp."""
    return _gated(text, source, target, width, shard.slice_of(width))


def _gated(
    text: TextConfig, source: str, target: str, width: int, columns: slice, index: tuple[int, ...] = ()
) -> Iterator[Copy]:
    """`columns` of a gated MLP, whose gate and up have a row for each, and down a column."""
    share, up, down = columns.stop - columns.start, (width, text.hidden_size), (text.hidden_size, width)
    yield Copy(f"{source}.gate_proj.weight", f"{target}.gate_up", up, (*index, slice(0, share)), (columns,))
    yield Copy(f"{source}.up_proj.weight", f"{target}.gate_up", up, (*index, slice(share, 2 * share)), (columns,))
    yield Copy(f"{source}.down_proj.weight", f"{target}.down", down, index, (slice(None), columns))


def _sparse(text: TextConfig, source: str, target: str, has_vision_experts: bool, shard: Shard) -> Iterator[Copy]:
    pools: list[ExpertPool] = [p for p in (text.text_experts, text.vision_experts) if p is not None]
    held = pools[: 2 if has_vision_experts else 1]
    for number, pool in enumerate(held):
        first = number * pools[0].num_experts
        rows = slice(first, first + pool.num_experts)
        gate = f"{source}.gate.weight" + ("" if number == 0 else f"_{number}")
        shape = (pool.num_experts, text.hidden_size)
        stored = shape[::-1] if text.router_is_transposed else shape
        yield Copy(gate, f"{target}.router.weight", stored, (rows,), is_transposed=text.router_is_transposed)
        columns = slice(0, pool.intermediate_size)
        for place, e in enumerate(shard.experts(pool.num_experts)):
            expert = f"{source}.experts.{first + e}"
            yield from _gated(text, expert, f"{target}.pools.{number}", pool.intermediate_size, columns, (place,))
    # the checkpoint's bias has a row per modality that the model knows, whatever this replica holds
    bias = f"{source}.moe_statics.e_score_correction_bias"
    yield Copy(bias, f"{target}.router.bias", (len(pools), pools[0].num_experts), part=(slice(0, len(held)),))
    if text.shared_intermediate_size:
        width = text.shared_intermediate_size
        yield from _split_gated(text, f"{source}.shared_experts", f"{target}.shared", width, shard)


def vision_copies(config: ModelConfig) -> Iterator[Copy]:
    """Where every tensor of ViT and resampler goes; they are never split."""
    vision = config.vision
    assert vision is not None
    size, merged = vision.hidden_size, vision.merged_size
    yield Copy("vision_model.patch_embed.proj.weight", "tower.patch_embed", (size, vision.patch_dim))
    for i in range(vision.depth):
        yield from _vision_block(vision, f"vision_model.blocks.{i}", f"tower.blocks.{i}")
    yield from _biased("vision_model.ln", "tower.ln", size)
    for part, width in (("spatial", merged), ("temporal", merged * vision.temporal_merge_size)):
        source, target = f"model.resampler_model.{part}_linear", f"resampler.{part}"
        yield from _biased(f"{source}.0", f"{target}.fc1", merged, width)
        yield from _biased(f"{source}.2", f"{target}.fc2", merged, merged)
        yield from _biased(f"{source}.3", f"{target}.ln", merged)
    yield from _biased("model.resampler_model.mlp", "resampler.mlp", config.text.hidden_size, merged)
    yield Copy("model.resampler_model.after_norm.weight", "resampler.after_norm", (config.text.hidden_size,))


def _vision_block(vision: VisionConfig, source: str, target: str) -> Iterator[Copy]:
    size, inner = vision.hidden_size, vision.intermediate_size
    yield from _biased(f"{source}.norm1", f"{target}.norm1", size)
    yield from _biased(f"{source}.norm2", f"{target}.norm2", size)
    yield from _biased(f"{source}.attn.qkv", f"{target}.qkv", 3 * size, size)
    yield from _biased(f"{source}.attn.proj", f"{target}.proj", size, size)
    yield from _biased(f"{source}.mlp.fc1", f"{target}.fc1", inner, size)
    yield from _biased(f"{source}.mlp.fc2", f"{target}.fc2", size, inner)


def _biased(source: str, target: str, *shape: int) -> Iterator[Copy]:
    yield Copy(f"{source}.weight", f"{target}.weight", shape)
    yield Copy(f"{source}.bias", f"{target}.bias", shape[:1])


def check_names(config: ModelConfig, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError when the checkpoint has a tensor that the model of its config.json does not know."""
    known = {copy.source for copy in decoder_copies(config, has_vision_experts=config.is_multimodal)}
    if config.quantization != "none":
        known |= {scales_name(name) for name in known if name.endswith("_proj.weight")}
    if config.vision is not None:
        known |= {copy.source for copy in vision_copies(config)}
        known |= {f"model.{name}" for name in known if name.startswith("vision_model.")}
    strange = sorted(n for n in checkpoint.names - known if not any(part in n for part in _UNUSED))
    if strange:
        raise CheckpointError(
            f"{checkpoint.file_of(strange[0])}: tensor {strange[0]!r} has no place in the model of config.json"
            f"{f', nor have {len(strange) - 1} others' if strange[1:] else ''}; do they belong together?"
        )


def load_decoder(
    decoder: Decoder,
    config: ModelConfig,
    checkpoint: Checkpoint,
    *,
    has_vision_experts: bool,
    progress: Callable[[int, int], None] = no_progress,
) -> None:
    """Fill a decoder with its shard; arguments and errors as of `fill`, and CheckpointError for a tensor too many.

    Quantised weights are made on the way, or read as they are stored.
    """
    copies = list(decoder_copies(config, has_vision_experts=has_vision_experts, shard=decoder.shard))
    if config.quantization != "none":
        copies = list(stored_copies(copies, quantised_weights(decoder)))
    _load(decoder, copies, config, checkpoint, progress)


def load_vision(
    encoder: VisionEncoder,
    config: ModelConfig,
    checkpoint: Checkpoint,
    *,
    progress: Callable[[int, int], None] = no_progress,
) -> None:
    """Fill ViT and resampler; arguments and errors as of `load_decoder`."""
    _load(encoder, list(vision_copies(config)), config, checkpoint, progress)


def _load(
    module: nn.Module,
    copies: Sequence[Copy],
    config: ModelConfig,
    checkpoint: Checkpoint,
    progress: Callable[[int, int], None],
) -> None:
    check(copies, checkpoint)  # what is missing or has another shape tells more than what is too much
    check_names(config, checkpoint)
    fill(module, copies, checkpoint, progress=progress)


@torch.no_grad()
def randomize(module: nn.Module, seed: int = 0) -> None:
    """Random weights of a sensible size, for benchmarks and tests without a checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    weights = quantised_weights(module)
    for name, p in module.named_parameters():
        owner, _, kind = name.rpartition(".")
        if owner in weights:
            if kind == "codes":
                weights[owner].fill(lambda *shape: _uniform(torch.empty(shape), generator))
        elif name.endswith(("norm", "after_norm", "ln.weight", "norm1.weight", "norm2.weight")):
            p.fill_(1.0)
        elif name.endswith("bias"):
            p.zero_()
        elif name == "embed":
            _uniform(p, generator, 1.0)
        else:
            _uniform(p, generator)


def _uniform(p: Tensor, generator: torch.Generator, scale: float | None = None) -> Tensor:
    """Numbers of this standard deviation; by default, such that products have that of their input."""
    bound = 3**0.5 * (p.shape[-1] ** -0.5 if scale is None else scale)
    return p.uniform_(-bound, bound, generator=generator)

"""How fast at best: rooflines of time to first token and of one decode step.

A step takes as long as its bytes from memory or its FLOPs, whichever is more, and then its collectives. Nothing waits: no
queue, no network, no router, no sampler. The fractions of the makers' figures are assumptions, not measured here.
"""

from __future__ import annotations

from dataclasses import dataclass

from ernie_cluster.config.kv_layout import SCALE_BYTES
from ernie_cluster.config.parallel import ParallelDims
from ernie_cluster.config.pool import Role
from ernie_cluster.policy.sizing import memory
from ernie_cluster.policy.sizing.gpus import Gpu
from ernie_cluster.policy.sizing.pools import Setting
from ernie_cluster.policy.sizing.weights import Matrix, Part, rank_matrices

COMPUTE_FRACTION = 0.45
"""Of peak FLOPs; Baidu reports 47 % for training its largest language model."""
BANDWIDTH_FRACTION = 0.7
"""Of memory bandwidth in a decode step."""
LINK_FRACTION = 0.7
"""Of a link's bandwidth in a collective."""
COLLECTIVE_S = 15e-6
"""Start of one collective."""
UNPACKED_PASSES = 4
"""How often what is held in fewer bits goes over memory as plain numbers, beside its codes: written, scaled where it is (read
and written), and read by the product. GPUs unpack in each step what is multiplied, of experts all, if it meets many; see `CudaOps`."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens of one prompt; those of a picture go to other experts."""

    text_tokens: int
    image_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.text_tokens + self.image_tokens


def prefill_s(setting: Setting, dims: ParallelDims, role: Role, prompt: Prompt) -> float:
    """Seconds of a prompt alone on a replica, in chunks of `max_batch_tokens`. One `dp` group takes it; experts are shared."""
    gpu, held = _gpu(setting), rank_matrices(setting.model, role, dims, 0)
    text = setting.model.text
    dense = sum(m.numbers for m in held if m.part in _ALWAYS)
    flops = 2.0 * dense * prompt.tokens
    for part, tokens in (("text_experts", prompt.text_tokens), ("vision_experts", prompt.image_tokens)):
        flops += 2.0 * _active(setting, held, part) * tokens
    chunks = -(-prompt.tokens // setting.engine.max_batch_tokens)
    num_bytes = chunks * sum(_bytes(setting, m) for m in held if m.part != "embedding")
    scores = 2.0 * prompt.tokens**2 * text.num_heads * text.head_dim * text.num_layers / dims.tp  # causal: half of 4
    seconds = max((flops + scores) / _bf16_rate(gpu), num_bytes / _bandwidth(gpu))
    return seconds + _collectives_s(setting, dims, prompt.tokens, chunks)


def encode_s(setting: Setting, image_tokens: int) -> float:
    """Seconds of one picture of so many tokens in ViT and resampler, on one GPU that has nothing else to do."""
    vision, gpu = setting.model.vision, _gpu(setting)
    assert vision is not None
    patches = image_tokens * vision.spatial_merge_size**2
    held = rank_matrices(setting.model, "vision", ParallelDims(), 0)
    rows = {"vit": patches, "resampler": image_tokens}
    flops = sum(2.0 * m.numbers * rows[m.part] for m in held)
    flops += 4.0 * patches**2 * vision.hidden_size * vision.depth
    num_bytes = sum(_bytes(setting, m) for m in held)
    return max(flops / _bf16_rate(gpu), num_bytes / _bandwidth(gpu))


def decode_step_s(setting: Setting, dims: ParallelDims, role: Role, batch: int, context: int) -> float:
    """Seconds of one step of `batch` sequences with `context` tokens of KV each: what one token of each takes."""
    gpu, held, text = _gpu(setting), rank_matrices(setting.model, role, dims, 0), setting.model.text
    per_group = -(-batch // dims.dp)
    head: Part = "embedding" if text.tie_word_embeddings else "head"
    always = [m for m in held if m.part in _ALWAYS or m.part == head]
    layout = memory.kv_layout(setting.model, setting.engine.block_size, setting.kv, dims.tp)
    kv_bytes = layout.bytes_per_token
    if setting.kv in SCALE_BYTES:
        plain = memory.kv_layout(setting.model, setting.engine.block_size, setting.model.dtype, dims.tp)
        kv_bytes += UNPACKED_PASSES * plain.bytes_per_token
    num_bytes = float(sum(_bytes(setting, m) for m in always) + per_group * context * kv_bytes)
    flops = 2.0 * sum(m.numbers for m in always) * per_group
    if text.text_experts is not None:
        pool = text.text_experts
        hit = 1 - (1 - pool.top_k / pool.num_experts) ** batch  # of the experts, when each token chooses by chance
        if setting.weights.is_quantised:
            hit = min(1.0, batch * pool.top_k / pool.num_experts)  # each for itself, or all once
        num_bytes += hit * sum(_bytes(setting, m) for m in held if m.part == "text_experts")
        flops += 2.0 * _active(setting, held, "text_experts") * batch
    scores = 4.0 * per_group * context * text.num_heads * text.head_dim * text.num_layers / dims.tp
    seconds = max((flops + scores) / _bf16_rate(gpu), num_bytes / _bandwidth(gpu))
    return seconds + _collectives_s(setting, dims, per_group, 1)


_ALWAYS = frozenset({"attention", "dense_mlp", "shared_experts", "routers", "norms"})
"""Parts that every token goes through."""


def _collectives_s(setting: Setting, dims: ParallelDims, tokens: int, steps: int) -> float:
    """All-reduce after attention and MLP of each layer; with dp > 1 sparse layers send rows to their experts and back."""
    if dims.world == 1:
        return 0.0
    text, gpu, seconds = setting.model.text, _gpu(setting), 0.0
    row = text.hidden_size * setting.weights.plain_bytes
    if dims.tp > 1:
        moved = 2 * (dims.tp - 1) / dims.tp * tokens * row
        wire_s = moved / (gpu.link_of(dims.tp) * LINK_FRACTION)
        seconds += 2 * text.num_layers * (wire_s + steps * COLLECTIVE_S)
    if dims.dp > 1 and text.text_experts is not None:
        moved = (dims.ep - 1) / dims.ep * tokens / dims.tp * text.text_experts.top_k * row
        wire_s = moved / (gpu.link_of(dims.world) * LINK_FRACTION)
        seconds += 2 * len(text.sparse_layers) * (wire_s + steps * COLLECTIVE_S)
    return seconds


def _active(setting: Setting, held: list[Matrix], part: str) -> float:
    """Numbers of a rank's experts that one token meets, on average."""
    text = setting.model.text
    pool = text.text_experts if part == "text_experts" else text.vision_experts
    if pool is None:
        return 0.0
    return sum(m.numbers for m in held if m.part == part) * pool.top_k / pool.num_experts


def _bytes(setting: Setting, matrix: Matrix) -> int:
    """Over memory, to multiply by it."""
    form = setting.weights
    held = matrix.num_bytes(form) + matrix.scale_bytes(form)
    if form.is_quantised and matrix.kind in ("linear", "expert"):
        held += UNPACKED_PASSES * matrix.numbers * form.plain_bytes
    return held


def _bf16_rate(gpu: Gpu) -> float:
    return gpu.bf16_flops * COMPUTE_FRACTION


def _bandwidth(gpu: Gpu) -> float:
    return gpu.bandwidth * BANDWIDTH_FRACTION


def _gpu(setting: Setting) -> Gpu:
    assert setting.gpu is not None, "there is no roofline without a GPU"
    return setting.gpu

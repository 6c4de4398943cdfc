"""What a rank needs beside its weights: KV, activations at their peak, what CUDA takes, and host memory while loading.

Activations are those of the fullest layer, by the tensors that `model/` keeps alive at once; attention is taken to read KV
where it lies. The reserves are assumptions, on the large side: no GPU was at hand to measure them.
"""

from __future__ import annotations

from ernie_cluster.config.engine import EngineConfig
from ernie_cluster.config.kv_layout import KVLayout
from ernie_cluster.config.model import ModelConfig, VisionConfig
from ernie_cluster.config.parallel import ParallelDims
from ernie_cluster.config.pool import Role
from ernie_cluster.config.units import GIB, MIB
from ernie_cluster.policy.sizing.weights import matrices

IMAGE_MAX_PIXELS = 6177 * 28 * 28
"""Of a picture after resizing, where the checkpoint does not say; 6,177 tokens."""
VIDEO_FRAME_PIXELS = 1196 * 28 * 28
"""Likewise of one frame of a video."""
EMBEDDING_CACHE_BYTES = 256 * MIB
"""Host memory in which a vision rank keeps the embeddings of pictures."""

KV_TYPES = ("float32", "bfloat16", "fp8", "int8")
"""Of K and V."""

_CONTEXT_BYTES = GIB
"""CUDA context, cuBLAS and attention workspaces."""
_GRAPHS_BYTES = GIB
"""CUDA graphs of a decoder's batch sizes."""
_COLLECTIVES_BYTES = GIB
"""NCCL's buffers in a gang of more than one rank."""
_FRAGMENTED = 0.04
"""Share of memory that the allocator cannot hand out."""
_PROCESS_BYTES = {True: 3 * GIB, False: GIB}
"""Interpreter, torch and its libraries; whether the rank has a GPU."""


def kv_layout(model: ModelConfig, block_size: int, kv: str, tp: int) -> KVLayout:
    """Layout on each rank of a tensor-parallel group; `kv` is one of `KV_TYPES`."""
    return KVLayout.from_model(model, block_size, kv, tp)


def decoder_activation_bytes(
    model: ModelConfig, engine: EngineConfig, dims: ParallelDims, number_bytes: int, *, has_vision_experts: bool
) -> int:
    """Peak of a step of `max_batch_tokens` tokens on one rank.

    28B in bfloat16, 4,096 tokens, 64 sequences, one rank: 1.07 GB, most of it the rows of each token's six experts.
    """
    text, tokens = model.text, engine.max_batch_tokens
    hidden, width, kv_width = text.hidden_size, text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    always = 3 * hidden  # x, the residual, and one normed copy; pictures' embeddings are freed before the layers
    attention = (2 * width + 2 * kv_width + width) // dims.tp  # q k v, q turned, and what comes out
    dense = 3 * text.intermediate_size // dims.tp
    pools = [p for p in (text.text_experts, text.vision_experts if has_vision_experts else None) if p is not None]
    # rows of all chosen experts, sorted and back: sizes that do not depend on the router, so a rank may get them all
    experts = max((p.top_k * (5 * hidden + 3 * p.intermediate_size) for p in pools), default=0)
    sparse = experts + 3 * text.shared_intermediate_size // dims.tp
    is_dense = len(text.sparse_layers) < text.num_layers
    layer = max(attention, dense if is_dense else 0, sparse)
    logits = 3 * engine.max_num_seqs * text.vocab_size * 4  # float32, as the sampler copies them
    return tokens * (always + layer) * number_bytes + logits


def unpacked_bytes(model: ModelConfig, dims: ParallelDims, number_bytes: int, *, has_vision_experts: bool) -> int:
    """Of the largest quantised weight on one rank, which GPUs unpack before they multiply it.

    28B in bfloat16, one rank: gate and up of 64 experts, 1.01 GB.
    """
    text = model.text
    pools = [p for p in (text.text_experts, text.vision_experts if has_vision_experts else None) if p is not None]
    rows = [2 * p.intermediate_size * -(-p.num_experts // dims.ep) for p in pools]
    rows.append(2 * max(text.intermediate_size, text.shared_intermediate_size) // dims.tp)
    return max(rows) * text.hidden_size * number_bytes


def vision_activation_bytes(vision: VisionConfig, num_patches: int, number_bytes: int) -> int:
    """Peak of encoding one picture or video, which goes through the ViT whole.

    24,708 patches, the default's largest picture, in bfloat16: 0.89 GB.
    """
    pixels = 4 * vision.patch_dim * 2  # float32, before and after normalising
    attention = (2 + 3 + 1) * vision.hidden_size * number_bytes + 3 * vision.hidden_size * 4  # turned in float32
    mlp = (2 * vision.hidden_size + 3 * vision.intermediate_size) * number_bytes
    return num_patches * max(pixels, attention, mlp)


def num_patches(vision: VisionConfig, image_max_pixels: int, video_frames: int) -> int:
    """Patches of the largest picture, or of a video of so many frames if that is more."""
    pixels = max(image_max_pixels, video_frames * VIDEO_FRAME_PIXELS)
    return -(-pixels // vision.patch_size**2)


def reserve_bytes(role: Role, world: int, memory_bytes: int) -> int:
    """What a rank cannot use of its share of a GPU."""
    graphs = 0 if role == "vision" else _GRAPHS_BYTES
    collectives = _COLLECTIVES_BYTES if world > 1 else 0
    return _CONTEXT_BYTES + graphs + collectives + int(_FRAGMENTED * memory_bytes)


def host_bytes(model: ModelConfig, role: Role, plain_bytes: int, *, has_gpu: bool) -> int:
    """Of one rank while it loads, without what it computes with: its process, a tensor as read and as stored, its caches.

    Tensors are read one by one, so a checkpoint of 847 GB does not need 847 GB of memory.
    """
    largest = max((m.rows * m.columns for m in matrices(model, role)), default=0)
    cache = EMBEDDING_CACHE_BYTES if role == "vision" else 0
    return _PROCESS_BYTES[has_gpu] + 2 * largest * plain_bytes + cache

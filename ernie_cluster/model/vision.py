"""The ViT and the resampler: patches of pictures and frames -> embeddings in the decoder's width.

Shapes: N patches of all pictures laid side by side, P = numbers per patch, C = ViT width, D = decoder width.
A video's frames attend only within themselves; the resampler joins them in pairs. Images are their own pair.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ernie_cluster.config.model import VisionConfig
from ernie_cluster.model.ops import TorchOps
from ernie_cluster.model.rope import rotate_half_split, vision_rope
from ernie_cluster.model.storage import empty_weight

# CLIP's statistics, as in every preprocessor_config of the family
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


class Linear(nn.Module):
    """A linear map with bias."""

    def __init__(self, in_size: int, out_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = empty_weight(out_size, in_size, dtype=dtype)
        self.bias = empty_weight(out_size, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class LayerNorm(nn.Module):
    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = empty_weight(size, dtype=dtype)
        self.bias = empty_weight(size, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class VisionBlock(nn.Module):
    """Full attention within a frame, then an MLP with quick GELU."""

    def __init__(self, config: VisionConfig, dtype: torch.dtype) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_heads
        self.norm1 = LayerNorm(size, config.layer_norm_eps, dtype)
        self.qkv = Linear(size, 3 * size, dtype)
        self.proj = Linear(size, size, dtype)
        self.norm2 = LayerNorm(size, config.layer_norm_eps, dtype)
        self.fc1 = Linear(size, config.intermediate_size, dtype)
        self.fc2 = Linear(config.intermediate_size, size, dtype)

    def forward(self, x_NC: Tensor, cos: Tensor, sin: Tensor, frame_lens: Sequence[int]) -> Tensor:
        qkv = self.qkv(self.norm1(x_NC)).view(x_NC.shape[0], 3, self.num_heads, -1)
        q, k = (rotate_half_split(qkv[:, i], cos, sin) for i in (0, 1))
        attended = [
            functional.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in frame))[0].transpose(0, 1)
            for frame in zip(*(t.split(list(frame_lens)) for t in (q, k, qkv[:, 2])), strict=True)
        ]
        x_NC = x_NC + self.proj(torch.cat(attended).flatten(1))
        hidden = self.fc1(self.norm2(x_NC))
        out: Tensor = x_NC + self.fc2(hidden * torch.sigmoid(1.702 * hidden))
        return out


class VisionTower(nn.Module):
    """Patches -> one vector of width C per patch."""

    def __init__(self, config: VisionConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = empty_weight(config.hidden_size, config.patch_dim, dtype=dtype)
        self.blocks = nn.ModuleList(VisionBlock(config, dtype) for _ in range(config.depth))
        self.ln = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype)

    def forward(self, pixels_NP: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        """[N, C] from normalised patches [N, P]; `grids` are (frames, height, width) in patches, N in all."""
        merge, head_dim = self.config.spatial_merge_size, self.config.head_dim
        angles = [vision_rope(h, w, merge, head_dim, pixels_NP.device) for t, h, w in grids for _ in range(t)]
        cos, sin = (torch.cat(part) for part in zip(*angles, strict=True))
        frame_lens = [h * w for t, h, w in grids for _ in range(t)]
        x = functional.linear(pixels_NP, self.patch_embed)
        for block in self.blocks:
            x = block(x, cos, sin, frame_lens)
        return self.ln(x)  # type: ignore[no-any-return]


class MergeMLP(nn.Module):
    """Linear, exact GELU, Linear, LayerNorm."""

    def __init__(self, in_size: int, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc1 = Linear(in_size, size, dtype)
        self.fc2 = Linear(size, size, dtype)
        self.ln = LayerNorm(size, eps, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln(self.fc2(functional.gelu(self.fc1(x))))  # type: ignore[no-any-return]


class Resampler(nn.Module):
    """Joins 2x2 patches, then pairs of frames, and maps to the decoder's width."""

    def __init__(self, config: VisionConfig, hidden_size: int, rms_norm_eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        size = config.merged_size
        self.config, self.rms_norm_eps, self.ops = config, rms_norm_eps, TorchOps()
        self.spatial = MergeMLP(size, size, config.layer_norm_eps, dtype)
        self.temporal = MergeMLP(size * config.temporal_merge_size, size, config.layer_norm_eps, dtype)
        self.mlp = Linear(size, hidden_size, dtype)
        self.after_norm = empty_weight(hidden_size, dtype=dtype)

    def forward(self, x_NC: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        """Embeddings [tokens, D] of all pictures in order; t of a video is even."""
        x = self.spatial(x_NC.reshape(-1, self.config.merged_size))
        lens = [t * h * w // self.config.spatial_merge_size**2 for t, h, w in grids]
        pairs = []
        for (t, _, _), part in zip(grids, x.split(lens), strict=True):
            frames = part.view(t, -1, part.shape[-1])
            first, second = (frames, frames) if t == 1 else (frames[0::2], frames[1::2])
            pairs.append(torch.cat([first, second], -1).flatten(0, 1))
        x = self.mlp(self.temporal(torch.cat(pairs)))
        return self.ops.rms_norm(x, self.after_norm, self.rms_norm_eps)


class VisionEncoder(nn.Module):
    """All that a vision replica runs: normalise, ViT, resampler."""

    def __init__(self, config: VisionConfig, hidden_size: int, rms_norm_eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.tower = VisionTower(config, dtype)
        self.resampler = Resampler(config, hidden_size, rms_norm_eps, dtype)

    def forward(self, patches_NP: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        """Embeddings [tokens, D] in the model's dtype from uint8 patches [N, P] of pixels, channel by channel."""
        per_channel = self.config.patch_size**2
        mean, std = (
            torch.tensor(v, device=patches_NP.device).repeat_interleave(per_channel) for v in (IMAGE_MEAN, IMAGE_STD)
        )
        pixels = ((patches_NP.float() / 255.0 - mean) / std).to(self.dtype)
        return self.resampler(self.tower(pixels, grids), grids)  # type: ignore[no-any-return]

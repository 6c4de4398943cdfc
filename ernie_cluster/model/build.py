"""Which parts of a model a replica holds, by its role, and how they come to be.

vision    ViT and resampler
prefill   decoder with the experts of both modalities
decode    decoder with text experts only: generated tokens are text
mixed     as prefill
"""

from __future__ import annotations

import os
from typing import Literal

import torch
from torch import nn

from ernie_cluster.config.model import ModelConfig
from ernie_cluster.config.parallel import WHOLE, Shard
from ernie_cluster.config.quantization import FIRST_WITH_FP8, Method, Quantization, choose_method
from ernie_cluster.errors import ConfigError
from ernie_cluster.model.cuda_ops import CudaOps, choose_fuse
from ernie_cluster.model.decoder import Decoder
from ernie_cluster.model.flash import UnpackedAttention, choose_flash
from ernie_cluster.model.kv_pages import PAGES, PLAIN_PAGES, PlainPages
from ernie_cluster.model.ops import TorchOps
from ernie_cluster.model.padding import PaddedOps
from ernie_cluster.model.storage import Storage
from ernie_cluster.model.vision import VisionEncoder

Role = Literal["vision", "prefill", "decode", "mixed"]

# Below this width a decode step is all call overhead, and compiling kernels at start-up would not pay.
_SMALLEST_COMPILED_WIDTH = 512


def torch_dtype(name: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def choose_ops(config: ModelConfig, storage: Storage, pages: PlainPages, device: torch.device) -> TorchOps:
    """`CudaOps` for bfloat16 on GPUs, `PaddedOps` with or without compiled kernels for it on CPU, else plain torch.

    `ERNIE_CPU_KERNELS=torch` turns the compiled ones off, `=numba` forces them for small models too.
    """
    wish = os.environ.get("ERNIE_CPU_KERNELS", "auto")
    if wish not in ("auto", "torch", "numba"):
        raise ConfigError(f"ERNIE_CPU_KERNELS={wish!r}: use auto, torch or numba")
    if device.type == "cuda" and storage.dtype == torch.bfloat16:  # its attention and grouped products know no float32
        flash = choose_flash(device)
        return CudaOps(flash if pages is PLAIN_PAGES else UnpackedAttention(flash, pages), choose_fuse(), pages)
    method = storage.method
    if device.type != "cpu" or storage.dtype != torch.bfloat16:
        return TorchOps(pages)
    is_large = config.text.hidden_size >= _SMALLEST_COMPILED_WIDTH
    if (method and method.is_fp8) or wish == "torch" or (wish == "auto" and not is_large):
        return PaddedOps(pages)
    from ernie_cluster.model.cpu_ops import NumbaCodeOps, NumbaOps  # numba takes a second to import

    ops: TorchOps = NumbaOps(pages) if method is None else NumbaCodeOps(pages)
    return ops


def has_vision_experts(config: ModelConfig, role: Role) -> bool:
    """Whether a replica of this role meets tokens of pictures."""
    return role != "decode" and config.is_multimodal


def build_decoder(
    config: ModelConfig,
    role: Role,
    *,
    dtype: torch.dtype,
    device: torch.device,
    shard: Shard = WHOLE,
    quantization: Quantization | Literal["auto"] = "auto",
    kv_dtype: str = "auto",
) -> Decoder:
    """An unfilled decoder with the parts of `role` that the rank of `shard` holds.

    Args:
        dtype: of numbers that are not quantised, and of KV where `kv_dtype` does not name another.
        kv_dtype: see `EngineConfig`.

    Raises:
        ConfigError: a size of the model is not divided by the ranks that share it, or by the blocks of a quantisation; or
            the checkpoint is quantised in another way.
    """
    shard.dims.check(config)
    method = choose_method(quantization, config.quantization)
    if method is not None:
        shard.dims.check_blocks(config, method)
        check_device(method, device)
    storage, pages = Storage(dtype, method), PAGES.get(kv_dtype, PLAIN_PAGES)
    with torch.device(device):
        ops, sees = choose_ops(config, storage, pages, device), has_vision_experts(config, role)
        return Decoder(config.text, has_vision_experts=sees, storage=storage, ops=ops, shard=shard)


def check_device(method: Method, device: torch.device) -> None:
    """Raise ConfigError where a GPU is too old for a method."""
    if method.is_fp8 and device.type == "cuda" and torch.cuda.get_device_capability(device) < FIRST_WITH_FP8:
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"quantization fp8 needs a Hopper GPU or a newer one, and this is {name}; use wint8")


def build_vision(config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> VisionEncoder:
    """An unfilled ViT and resampler, whole on every rank; ConfigError for a text-only model."""
    if config.vision is None:
        raise ConfigError("a text-only model has no vision encoder; remove the vision pool from its configuration")
    with torch.device(device):
        return VisionEncoder(config.vision, config.text.hidden_size, config.text.rms_norm_eps, dtype)


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())

"""Checkpoints of any size with the hub's names, whose every number follows from its tensor's name and its place."""

from __future__ import annotations

import functools
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ernie_cluster.config.model import ModelConfig
from ernie_cluster.model.checkpoint import INDEX, bytes_of
from ernie_cluster.model.weights import decoder_copies, vision_copies

_STEP = 1 << 22

Shapes = dict[str, tuple[int, ...]]


def shapes_of(config: ModelConfig) -> Shapes:
    """Name and shape of every tensor that a published checkpoint of this model has."""
    copies = list(decoder_copies(config, has_vision_experts=config.is_multimodal))
    if config.vision is not None:
        copies += vision_copies(config)
    return {copy.source: copy.shape for copy in copies}


def numbers(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Content of a tensor, bfloat16: between 0 and 2, all exponents, another run in each stretch of each tensor."""
    count = math.prod(shape)
    out = torch.empty(count, dtype=torch.int16)
    for i, first in enumerate(range(0, count, _STEP)):
        part = out[first : first + _STEP]
        salt = zlib.crc32(f"{name} {i}".encode()) & 0x3FFF
        torch.bitwise_xor(_stretch()[: len(part)], salt, out=part)
    return out.view(torch.bfloat16).view(shape)


@functools.cache
def _stretch() -> torch.Tensor:
    return (torch.arange(_STEP) * 2654435761 >> 13 & 0x3FFF).short()


def write_checkpoint(folder: Path, raw: Mapping[str, Any], *, max_file_bytes: int, is_hollow: bool = False) -> int:
    """Write config.json, weights in files of at most `max_file_bytes`, or of one tensor, and their index.

    Args:
        raw: content of config.json; weights are bfloat16, routers float32.
        is_hollow: leave all weights zero, as holes in the files, which takes no time.

    Returns:
        Bytes of all tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    weight_map: dict[str, str] = {}
    groups = list(_groups(shapes_of(ModelConfig.from_dict(raw)), max_file_bytes))
    for i, group in enumerate(groups, start=1):
        file = f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        _write(folder / file, group, is_hollow)
        weight_map |= dict.fromkeys(group, file)
    total = sum(map(num_bytes, weight_map, (s for group in groups for s in group.values())))
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return total


def _is_float32(name: str) -> bool:
    return ".gate.weight" in name or "moe_statics" in name


def num_bytes(name: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * (4 if _is_float32(name) else 2)


def _groups(shapes: Shapes, max_bytes: int) -> Iterator[Shapes]:
    group: Shapes = {}
    used = 0
    for name, shape in shapes.items():
        size = num_bytes(name, shape)
        if group and used + size > max_bytes:
            yield group
            group, used = {}, 0
        group[name] = shape
        used += size
    yield group


def _write(path: Path, group: Shapes, is_hollow: bool) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in group.items():
        start, end = end, end + num_bytes(name, shape)
        dtype = "F32" if _is_float32(name) else "BF16"
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if is_hollow:
            file.flush()
            os.truncate(path, 8 + len(text) + end)
            return
        for name, shape in group.items():
            content = numbers(name, shape)
            file.write(bytes_of(content.float() if _is_float32(name) else content))

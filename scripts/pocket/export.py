"""From the trained network to a checkpoint folder: the loader's plan, run backwards."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from network import Network
from safetensors.torch import save_file
from torch import Tensor, nn

from ernie_cluster.model.fill import Copy
from ernie_cluster.model.weights import decoder_copies, vision_copies

FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json",
)  # fmt: skip


def export(network: Network, work: Path, out: Path) -> None:
    """Write `out`: weights in bfloat16 (routers in float32) under the hub's names, and the other files of `work`."""
    out.mkdir(parents=True, exist_ok=True)
    decoder = list(decoder_copies(network.config, has_vision_experts=True))
    tensors = dict(_taken(network.decoder, decoder)) | dict(_taken(network.vision, list(vision_copies(network.config))))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for name in FILES:
        shutil.copyfile(work / name, out / name)


def _taken(module: nn.Module, copies: list[Copy]) -> list[tuple[str, Tensor]]:
    parameters = dict(module.named_parameters())
    out = []
    for copy in copies:
        tensor = parameters[copy.parameter].detach()[copy.index or ...]
        dtype = torch.float32 if "router" in copy.parameter else torch.bfloat16
        out.append((copy.source, (tensor.T if copy.is_transposed else tensor).to(dtype).contiguous()))
    return out

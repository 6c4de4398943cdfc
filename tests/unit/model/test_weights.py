"""Which checkpoint tensor fills which part of which parameter."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from ernie_cluster.config.model import ModelConfig
from ernie_cluster.errors import CheckpointError, ConfigError
from ernie_cluster.model.build import build_decoder, build_vision, num_parameters
from ernie_cluster.model.checkpoint import Checkpoint
from ernie_cluster.model.fill import Copy
from ernie_cluster.model.weights import decoder_copies, load_decoder, load_vision, vision_copies
from tests import tiny
from tests.shapes import VL_28B, VL_424B

META = torch.device("meta")


@pytest.mark.parametrize(("raw", "total"), [(VL_28B, 29_399_294_336), (VL_424B, 423_526_285_184)])
def test_full_size_models_have_the_published_number_of_parameters(raw: dict[str, object], total: int) -> None:
    config = ModelConfig.from_dict(raw)
    decoder = build_decoder(config, "prefill", dtype=torch.bfloat16, device=META)
    vision = build_vision(config, dtype=torch.bfloat16, device=META)
    assert num_parameters(decoder) + num_parameters(vision) == total


def test_decode_role_holds_no_vision_parts() -> None:
    config = ModelConfig.from_dict(VL_28B)
    decode = num_parameters(build_decoder(config, "decode", dtype=torch.bfloat16, device=META))
    vision_experts, their_routers = 27 * 64 * 3 * 2560 * 512, 27 * (64 * 2560 + 64)
    assert decode == 29_399_294_336 - vision_experts - their_routers - 774_658_560


@pytest.mark.parametrize("raw", [VL_28B, VL_424B])
@pytest.mark.parametrize("role", ["prefill", "decode", "vision"])
def test_every_number_of_every_parameter_is_filled_once(raw: dict[str, object], role: str) -> None:
    config = ModelConfig.from_dict(raw)
    if role == "vision":
        module: torch.nn.Module = build_vision(config, dtype=torch.bfloat16, device=META)
        copies = list(vision_copies(config))
    else:
        module = build_decoder(config, role, dtype=torch.bfloat16, device=META)  # type: ignore[arg-type]
        copies = list(decoder_copies(config, has_vision_experts=role == "prefill"))
    parameters = dict(module.named_parameters())
    filled = dict.fromkeys(parameters, 0)
    for copy in copies:
        filled[copy.parameter] += parameters[copy.parameter][copy.index or ...].numel()
    assert filled == {name: p.numel() for name, p in parameters.items()}
    assert len({c.source for c in copies}) == len(copies)


def test_a_copy_names_the_hubs_tensors() -> None:
    copies = list(decoder_copies(tiny.tiny_config(), has_vision_experts=True))
    assert (
        Copy(
            "model.layers.1.mlp.gate.weight_1",
            "layers.1.mlp.router.weight",
            (128, 8),
            (slice(8, 16),),
            is_transposed=True,
        )
        in copies
    )
    whole = (slice(None), slice(0, 32))
    assert (
        Copy("model.layers.2.mlp.experts.9.down_proj.weight", "layers.2.mlp.pools.1.down", (128, 32), (1,), whole)
        in copies
    )


def test_decode_reads_only_its_own_bytes() -> None:
    both = {}
    for role in ("prefill", "decode"):
        decoder = build_decoder(tiny.tiny_config(), role, dtype=torch.float32, device=tiny.CPU)  # type: ignore[arg-type]
        checkpoint = Checkpoint(tiny.tiny_folder())
        load_decoder(decoder, tiny.tiny_config(), checkpoint, has_vision_experts=role == "prefill")
        assert checkpoint.bytes_read == sum(p.nbytes for p in decoder.parameters())
        both[role] = checkpoint.bytes_read
    assert both["decode"] < both["prefill"]


def test_prefix_of_the_vision_tower_may_be_transformers_own(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors: dict[str, torch.Tensor] = {}
    for file in Path(tiny.tiny_folder()).glob("*.safetensors"):
        tensors |= load_file(file)
    save_file(
        {("model." + k if k.startswith("vision_model.") else k): v for k, v in tensors.items()},
        tmp_path / "model.safetensors",
    )
    encoder = build_vision(tiny.tiny_config(), dtype=torch.float32, device=tiny.CPU)
    load_vision(encoder, tiny.tiny_config(), Checkpoint(tmp_path))
    assert torch.equal(encoder.tower.patch_embed, tiny.tiny_vision().tower.patch_embed)


@pytest.fixture
def copy_of_tiny(tmp_path: Path) -> Path:
    shutil.copytree(tiny.tiny_folder(), tmp_path / "m")
    return tmp_path / "m"


def fill(folder: Path) -> None:
    decoder = build_decoder(tiny.tiny_config(), "mixed", dtype=torch.float32, device=tiny.CPU)
    load_decoder(decoder, tiny.tiny_config(), Checkpoint(folder), has_vision_experts=True)


def test_missing_file_is_named(copy_of_tiny: Path) -> None:
    shard = sorted(copy_of_tiny.glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        fill(copy_of_tiny)


def test_truncated_file_is_named(copy_of_tiny: Path) -> None:
    shard = sorted(copy_of_tiny.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"{shard.name}.*truncated"):
        fill(copy_of_tiny)


def test_missing_tensor_is_named(copy_of_tiny: Path) -> None:
    index = copy_of_tiny / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model.norm.weight"', '"model.other.weight"'))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        fill(copy_of_tiny)


def test_wrong_shape_is_named(copy_of_tiny: Path) -> None:
    config = ModelConfig.from_dict(VL_28B)
    decoder = build_decoder(config, "mixed", dtype=torch.bfloat16, device=META)
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight has shape \[2048, 128\]"):
        load_decoder(decoder, config, Checkpoint(copy_of_tiny), has_vision_experts=True)


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        Checkpoint(tmp_path)


def test_text_only_model_has_no_vision_encoder() -> None:
    config = ModelConfig.from_dict(
        {k: v for k, v in VL_28B.items() if k != "vision_config"} | {"model_type": "ernie4_5_moe"}
    )
    assert not config.is_multimodal
    with pytest.raises(ConfigError, match="vision pool"):
        build_vision(config, dtype=torch.float32, device=META)

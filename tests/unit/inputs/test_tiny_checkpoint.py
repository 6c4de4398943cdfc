from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

from ernie_cluster.cli.tiny_checkpoint import write_tiny_checkpoint
from ernie_cluster.config.model import ModelConfig
from ernie_cluster.inputs.images import PixelConfig


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for name, file in index.items():
        with safe_open(folder / file, "pt") as shard:
            found[name] = shard.get_tensor(name)
    return found


def test_same_arguments_same_bytes(folders: dict[str, Path], tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, form="nested", seed=7)  # what stood there before leaves no trace
    assert content(write_tiny_checkpoint(tmp_path)) == content(folders["flat"])


def test_both_forms_are_one_model(folders: dict[str, Path]) -> None:
    flat, nested = (ModelConfig.from_folder(folder) for folder in folders.values())
    assert flat.token_ids
    assert nested.token_ids
    video_patch = nested.token_ids.video_patch  # its own token in the nested form
    assert video_patch != flat.token_ids.video_patch == flat.token_ids.image_patch
    assert dataclasses.replace(flat, token_ids=dataclasses.replace(flat.token_ids, video_patch=video_patch)) == nested
    assert PixelConfig.from_folder(folders["flat"]) == PixelConfig.from_folder(folders["nested"])
    ours, theirs = tensors(folders["flat"]), tensors(folders["nested"])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_shards_are_bounded(folders: dict[str, Path]) -> None:
    shards = list(folders["flat"].glob("*.safetensors"))
    assert len(shards) > 4
    header_bytes = 16_384
    assert all(
        os.path.getsize(shard) < 2048 * 128 * 4 + header_bytes for shard in shards
    )  # the embedding is the largest


def test_dtype_and_head_follow_the_arguments(tmp_path: Path) -> None:
    found = tensors(write_tiny_checkpoint(tmp_path, dtype="bfloat16", tie=False))
    kept = {name.rpartition("mlp.")[2] for name, tensor in found.items() if tensor.dtype == torch.float32}
    assert kept == {"gate.weight", "gate.weight_1", "moe_statics.e_score_correction_bias"}
    assert found["lm_head.weight"].shape == (2048, 128)
    assert ModelConfig.from_folder(tmp_path).dtype == "bfloat16"
    assert not ModelConfig.from_folder(tmp_path).text.tie_word_embeddings


@pytest.mark.filterwarnings("ignore")
def test_transformers_finds_every_weight_and_no_other(folders: dict[str, Path]) -> None:
    _, info = AutoModelForImageTextToText.from_pretrained(folders["nested"], output_loading_info=True)
    assert {key: list(names) for key, names in info.items() if names} == {}

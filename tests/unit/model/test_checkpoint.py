"""A damaged checkpoint gives one error that names the file and the tensor, before a byte of a tensor is read."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ernie_cluster.config.model import ModelConfig
from ernie_cluster.errors import CheckpointError
from ernie_cluster.model.build import build_decoder, build_vision
from ernie_cluster.model.checkpoint import INDEX, Checkpoint
from ernie_cluster.model.weights import load_decoder, load_vision
from tests import synthetic
from tests.shapes import SMALL

CPU = torch.device("cpu")
NORM, GATE = "model.norm.weight", "model.layers.1.mlp.gate.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole small checkpoint in several files."""
    synthetic.write_checkpoint(tmp_path / "m", SMALL, max_file_bytes=20_000)
    return tmp_path / "m"


def load(folder: Path) -> int:
    """Load the decoder of a prefill replica; bytes that were read."""
    config = ModelConfig.from_folder(folder)
    decoder = build_decoder(config, "prefill", dtype=torch.bfloat16, device=CPU)
    with Checkpoint(folder) as checkpoint:
        try:
            load_decoder(decoder, config, checkpoint, has_vision_experts=True)
        except CheckpointError:
            assert checkpoint.bytes_read == 0
            raise
        return checkpoint.bytes_read


def file_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def change(folder: Path, name: str, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite the file that holds a tensor."""
    path = file_of(folder, name)
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def change_header(folder: Path, name: str, edit: Callable[[dict[str, Any]], None]) -> None:
    path = file_of(folder, name)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    edit(header[name])
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def change_index(folder: Path, edit: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    return str(caught.value)


def test_what_is_read_is_what_the_library_reads(folder: Path) -> None:
    assert load(folder) > 0
    with Checkpoint(folder) as checkpoint:
        for path in folder.glob("*.safetensors"):
            for name, expected in load_file(path).items():
                assert torch.equal(checkpoint.get(name), expected), name
                assert name in checkpoint
        assert checkpoint.bytes_read == json.loads((folder / INDEX).read_text())["metadata"]["total_size"]


def test_without_an_index_all_files_are_looked_at(folder: Path) -> None:
    (folder / INDEX).unlink()
    assert load(folder) > 0


def test_a_tensor_in_two_files_without_an_index(folder: Path) -> None:
    (folder / INDEX).unlink()
    save_file({NORM: torch.zeros(16)}, folder / "zz.safetensors")
    said = refusal(folder)
    assert "zz.safetensors" in said
    assert NORM in said


def test_a_missing_tensor(folder: Path) -> None:
    change_index(folder, lambda m: m.pop(NORM))
    assert f"{folder}: tensor '{NORM}' is missing" in refusal(folder)


def test_a_tensor_that_the_index_promises_and_the_file_lacks(folder: Path) -> None:
    change(folder, NORM, lambda t: t.pop(NORM))
    said = refusal(folder)
    assert f"{file_of(folder, NORM)}: tensor '{NORM}' is not in it" in said


def test_a_tensor_too_many(folder: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.3.input_layernorm.weight"] = torch.zeros(16)

    change(folder, NORM, add)
    change_index(folder, lambda m: m.update({"model.layers.3.input_layernorm.weight": m[NORM]}))
    said = refusal(folder)
    assert f"{file_of(folder, NORM)}: tensor 'model.layers.3.input_layernorm.weight' has no place" in said


@pytest.mark.parametrize(
    "name", ["model.mtp_block.0.input_layernorm.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]
)
def test_tensors_that_nobody_needs_are_left_alone(folder: Path, name: str) -> None:
    change(folder, NORM, lambda t: t.update({name: torch.zeros(3)}))
    change_index(folder, lambda m: m.update({name: m[NORM]}))
    assert load(folder) > 0


@pytest.mark.parametrize("name", [NORM, GATE, "model.layers.0.mlp.down_proj.weight"])
def test_a_wrong_shape(folder: Path, name: str) -> None:
    change(folder, name, lambda t: t.update({name: torch.zeros(7, 5)}))
    said = refusal(folder)
    assert f"{file_of(folder, name)}: {name} has shape [7, 5], config.json says [" in said


def test_a_transposed_router_of_a_text_model_is_a_wrong_shape_here(folder: Path) -> None:
    change(folder, GATE, lambda t: t.update({GATE: t[GATE].T.contiguous()}))
    assert f"{GATE} has shape [8, 16], config.json says [16, 8]" in refusal(folder)


def test_a_dtype_that_is_not_read(folder: Path) -> None:
    change(folder, NORM, lambda t: t.update({NORM: t[NORM].to(torch.float8_e4m3fn)}))
    said = refusal(folder)
    assert f"{file_of(folder, NORM)}: {NORM} is stored as F8_E4M3; only BF16 and F32" in said


def test_other_widths_of_a_float_are_converted(folder: Path) -> None:
    change(folder, NORM, lambda t: t.update({NORM: t[NORM].float()}))
    change(folder, GATE, lambda t: t.update({GATE: t[GATE].bfloat16()}))
    config = ModelConfig.from_folder(folder)
    decoder = build_decoder(config, "prefill", dtype=torch.bfloat16, device=CPU)
    with Checkpoint(folder) as checkpoint:
        load_decoder(decoder, config, checkpoint, has_vision_experts=True)
        assert torch.equal(decoder.norm, checkpoint.get(NORM).bfloat16())
    assert decoder.layers[1].mlp.router.weight.dtype == torch.float32  # type: ignore[union-attr]


@pytest.mark.parametrize("keep", [0, 4, 50, -1, -1000])
def test_a_truncated_file(folder: Path, keep: int) -> None:
    path = file_of(folder, NORM)
    path.write_bytes(path.read_bytes()[:keep])
    said = refusal(folder)
    assert f"{path}: truncated" in said
    assert "download it again" in said


def test_a_file_that_shrinks_while_it_is_read(folder: Path) -> None:
    with Checkpoint(folder) as checkpoint:
        entry = checkpoint.entry(NORM)
        entry.path.write_bytes(entry.path.read_bytes()[: entry.start + 3])
        with pytest.raises(CheckpointError, match=f"truncated while it was read, in tensor '{NORM}'"):
            checkpoint.get(NORM)


@pytest.mark.parametrize(
    "start", [b"\xff" * 8, struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 6) + b"{'a':1", b"PK\x03\x04" * 2]
)
def test_a_file_that_is_something_else(folder: Path, start: bytes) -> None:
    path = file_of(folder, NORM)
    path.write_bytes(start + bytes(1000))
    said = refusal(folder)
    assert str(path) in said
    assert "damaged" in said or "not a safetensors file" in said


@pytest.mark.parametrize(
    "edit",
    [
        {"data_offsets": [0, 31]},
        {"data_offsets": [32, 0]},
        {"data_offsets": [-32, 0]},
        {"data_offsets": [0]},
        {"data_offsets": "x"},
        {"shape": [16, "1"]},
        {"shape": [-16]},
        {"shape": None},
        {"dtype": "F32"},
    ],
)
def test_a_damaged_line_of_a_header(folder: Path, edit: dict[str, Any]) -> None:
    change_header(folder, NORM, lambda fields: fields.update(edit))
    assert f"{file_of(folder, NORM)}: its header is damaged at tensor '{NORM}'" in refusal(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": "x"}', "\x00"])
def test_a_broken_index(folder: Path, content: str) -> None:
    (folder / INDEX).write_text(content)
    assert f"{folder / INDEX}: not a safetensors index" in refusal(folder)


@pytest.mark.parametrize("file", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", ""])
def test_an_index_that_leads_out_of_its_folder(folder: Path, file: str) -> None:
    change_index(folder, lambda m: m.update({NORM: file}))
    said = refusal(folder)
    assert NORM in said
    assert "no file of this folder" in said


def test_a_file_that_cannot_be_read(folder: Path) -> None:
    path = file_of(folder, NORM)
    path.unlink()
    path.mkdir()
    assert str(path) in refusal(folder)


def test_a_vision_encoder_is_held_to_its_shapes_too(folder: Path) -> None:
    name = "vision_model.blocks.0.attn.qkv.bias"
    change(folder, name, lambda t: t.update({name: torch.zeros(5)}))
    config = ModelConfig.from_folder(folder)
    encoder = build_vision(config, dtype=torch.bfloat16, device=CPU)
    with Checkpoint(folder) as checkpoint, pytest.raises(CheckpointError, match=r"has shape \[5\].* says \[24\]"):
        load_vision(encoder, config, checkpoint)


@pytest.mark.parametrize("key", ["hidden_size", "moe_num_experts", "vision_config"])
def test_a_configuration_of_wrong_kinds_names_its_file(folder: Path, key: str) -> None:
    (folder / "config.json").write_text(json.dumps(SMALL | {key: "many"}))
    with pytest.raises(CheckpointError, match=r"config\.json: a value is of the wrong kind"):
        ModelConfig.from_folder(folder)

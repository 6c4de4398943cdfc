"""A vision encoder is known by its weights, and by nothing else."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from ernie_cluster.errors import CheckpointError
from ernie_cluster.inputs.encoder_id import encoder_id

EYE, MOUTH = "vision_model.blocks.0.weight", "model.layers.0.weight"
MIXER = "model.resampler_model.mlp.weight"
LARGE = bytes(range(256)) * 400
TENSORS = {EYE: LARGE, MIXER: b"12345678", MOUTH: b"abcd"}


def write(path: Path, tensors: dict[str, bytes], dtype: str = "BF16") -> Path:
    """A safetensors file; the folder that it is in."""
    header, at = {}, 0
    for name, content in tensors.items():
        header[name] = {"dtype": dtype, "shape": [len(content) // 2], "data_offsets": [at, at + len(content)]}
        at += len(content)
    encoded = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + b"".join(tensors.values()))
    return path.parent


def test_place_split_and_language_make_no_difference(tmp_path: Path) -> None:
    whole = encoder_id(write(tmp_path / "a" / "model.safetensors", TENSORS))
    write(tmp_path / "b" / "1.safetensors", {MOUTH: b"efgh", f"model.{EYE}": LARGE})
    split = encoder_id(write(tmp_path / "b" / "2.safetensors", {MIXER: b"12345678"}))
    assert whole == split
    assert len(whole) == 64


def test_any_training_makes_another(tmp_path: Path) -> None:
    trained = bytes(b ^ 1 for b in LARGE)
    variants = [
        write(tmp_path / "a" / "x.safetensors", TENSORS),
        write(tmp_path / "b" / "x.safetensors", {**TENSORS, EYE: trained}),
        write(tmp_path / "c" / "x.safetensors", {**TENSORS, EYE: LARGE[:-256]}),
        write(tmp_path / "d" / "x.safetensors", {**TENSORS, MIXER: b"12345679"}),
        write(tmp_path / "e" / "x.safetensors", {EYE: LARGE, MOUTH: b"abcd"}),
        write(tmp_path / "f" / "x.safetensors", TENSORS, dtype="F16"),
        write(tmp_path / "g" / "x.safetensors", {**TENSORS, EYE: LARGE[:-1] + b"?"}),
        write(tmp_path / "h" / "x.safetensors", {**TENSORS, EYE: b"?" + LARGE[1:]}),
    ]
    assert len({encoder_id(folder) for folder in variants}) == len(variants)


def test_a_model_without_eyes_has_none(tmp_path: Path) -> None:
    for folder in (tmp_path, write(tmp_path / "a" / "x.safetensors", {MOUTH: b"abcd"})):
        with pytest.raises(CheckpointError, match="vision encoder"):
            encoder_id(folder)


@pytest.mark.parametrize("keep", [0, 7, 60, -9])
def test_a_truncated_file_is_refused(keep: int, tmp_path: Path) -> None:
    folder = write(tmp_path / "a" / "x.safetensors", {MOUTH: b"abcd", EYE: LARGE})
    whole = (folder / "x.safetensors").read_bytes()
    (folder / "x.safetensors").write_bytes(whole[:keep])
    with pytest.raises(CheckpointError, match="broken or truncated"):
        encoder_id(folder)

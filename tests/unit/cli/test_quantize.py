"""`ernie-cluster quantize`: what it writes, and what it refuses before it writes anything."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ernie_cluster.cli.main import main
from ernie_cluster.cli.quantize_run import quantise
from ernie_cluster.config.quantization import METHODS
from ernie_cluster.model.checkpoint import INDEX
from tests import tiny


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    index = json.loads((folder / INDEX).read_text())
    found = {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
    assert found.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    return found


@pytest.mark.parametrize("name", ["wint8", "wint4"])
def test_matrices_of_the_decoder_are_quantised_and_nothing_else(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = Path(tiny.tiny_folder()), tmp_path / "new" / "out"
    assert main(["quantize", str(source), str(out), "--method", name]) == 0
    said = capsys.readouterr()
    assert f"{out}: " in said.out
    assert f" GB as {name}, from " in said.out
    assert "tensors" in said.err
    before, after = tensors_of(source), tensors_of(out)
    for tensor_name, numbers in before.items():
        is_matrix = "_proj.weight" in tensor_name and tensor_name.startswith("model.layers.")
        if not is_matrix:
            assert torch.equal(after.pop(tensor_name), numbers), tensor_name
            continue
        codes, scales = after.pop(tensor_name), after.pop(f"{tensor_name}_scale")
        is_packed = name == "wint4" and ".experts." in tensor_name
        assert codes.dtype == (torch.uint8 if is_packed else torch.int8)
        assert codes.shape == (numbers.shape[0], numbers.shape[1] // (2 if is_packed else 1))
        assert (scales.dtype, scales.shape) == (torch.float32, (numbers.shape[0], 1))
    assert not after
    others = {p.name for p in source.iterdir()} - {p.name for p in source.glob("*.safetensors")}
    for file in others - {"config.json", INDEX}:
        assert (out / file).read_bytes() == (source / file).read_bytes()
    plain, config = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    assert config.pop("quantization_config")["format"] == name
    assert config == plain


def test_files_are_bounded_and_counted(tmp_path: Path) -> None:
    before, after = quantise(Path(tiny.tiny_folder()), tmp_path / "out", METHODS["wint8"], file_bytes=600_000)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "out").glob("*.safetensors"))]
    assert len(sizes) > 2
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == [
        f"model-{i:05}-of-{len(sizes):05}.safetensors" for i in range(1, len(sizes) + 1)
    ]
    assert sorted(sizes)[-2] < 630_000  # the embedding is larger, and has a file to itself
    assert after < before
    assert sum(sizes) > after


def refusal(source: Path, out: Path, capsys: pytest.CaptureFixture[str], method: str = "wint8") -> str:
    capsys.readouterr()
    before = sorted(out.parent.rglob("*"))
    assert main(["quantize", str(source), str(out), "--method", method]) == 2
    assert sorted(out.parent.rglob("*")) == before
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_what_is_quantised_already(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantise(Path(tiny.tiny_folder()), tmp_path / "once", METHODS["wint8"])
    said = refusal(tmp_path / "once", tmp_path / "twice", capsys)
    assert f"{tmp_path / 'once'}: its weights are wint8 already" in said


def test_a_folder_that_holds_something(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").touch()
    assert "out: is there already" in refusal(Path(tiny.tiny_folder()), tmp_path / "out", capsys)
    assert "a: is there already" in refusal(Path(tiny.tiny_folder()), tmp_path / "out" / "a", capsys)


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    quantise(Path(tiny.tiny_folder()), tmp_path / "out", METHODS["wint8"])
    assert (tmp_path / "out" / "config.json").exists()


def test_the_weights_of_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in"
    shutil.copytree(tiny.tiny_folder(), source)
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(raw | {"intermediate_size": 260}))
    said = refusal(source, tmp_path / "out", capsys)
    assert "model.layers.0.mlp.gate_proj.weight has shape [256, 128], config.json says [260, 128]" in said
    (source / "config.json").write_text(json.dumps(raw))
    save_file({"model.layers.9.strange": torch.ones(1)}, source / "z.safetensors")
    (source / INDEX).unlink()
    assert "'model.layers.9.strange' has no place in the model" in refusal(source, tmp_path / "out", capsys)


def test_sizes_that_the_blocks_do_not_divide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(Path(tiny.tiny_folder()), tmp_path / "out", capsys, "fp8")
    assert "num_kv_heads * head_dim % 128 = 64 % 128 = 64, must be 0" in said


def test_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "config.json: not found" in refusal(tmp_path / "nothing", tmp_path / "out", capsys)


def test_a_disk_that_is_full(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ernie_cluster.cli.quantize_run.save_file", full)
    assert main(["quantize", tiny.tiny_folder(), str(tmp_path / "out")]) == 2
    assert f"{tmp_path / 'out'}: cannot be written: No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

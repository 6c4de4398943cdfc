"""Decoders of quantised weights: what they hold, on every rank, and how close they stay."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ernie_cluster.cli.quantize_run import quantise
from ernie_cluster.config.model import ModelConfig
from ernie_cluster.config.parallel import ParallelDims, Shard
from ernie_cluster.config.quantization import METHODS, Quantization
from ernie_cluster.engine.batch import BatchBuilder
from ernie_cluster.engine.scheduler import Schedule
from ernie_cluster.engine.sequence import Sequence
from ernie_cluster.errors import CheckpointError, ConfigError
from ernie_cluster.model.build import build_decoder, check_device
from ernie_cluster.model.checkpoint import Checkpoint
from ernie_cluster.model.cuda_ops import CudaOps
from ernie_cluster.model.decoder import Decoder
from ernie_cluster.model.fill import quantised_weights
from ernie_cluster.model.flash import FlashAttention
from ernie_cluster.model.ops import ExpertWeights, TorchOps
from ernie_cluster.model.quant import codec_of
from ernie_cluster.model.step import KVCache
from ernie_cluster.model.weights import load_decoder, randomize
from ernie_cluster.policy.sizing.formats import FORMATS
from ernie_cluster.policy.sizing.weights import rank_matrices
from tests import synthetic, tiny
from tests.quantised import quantised
from tests.shapes import SMALL, TEXT_03B, VL_28B, VL_424B
from tests.varlen import varlen_attn

META = torch.device("meta")
BLOCKY = SMALL | {  # every part is a multiple of 128 on each of two ranks
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64,
    "freq_allocation": 20, "num_hidden_layers": 2, "moe_num_experts": [2, 2], "moe_intermediate_size": [256, 128],
    "moe_num_shared_experts": 1,
}  # fmt: skip
DIMS = [ParallelDims(1, 1), ParallelDims(2, 1), ParallelDims(2, 2), ParallelDims(1, 4)]
CASES = [
    *(("wint8", 16, dims) for dims in DIMS),
    *(("wint4", 16, dims) for dims in DIMS),
    *(("fp8", 128, dims) for dims in DIMS[:2]),
]
"""(method, hidden size of the model, layout)."""


@functools.cache
def folder_of(hidden: int) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="ernie-quant-")) / "plain"
    synthetic.write_checkpoint(folder, SMALL if hidden == 16 else BLOCKY, max_file_bytes=100_000)
    return folder


@functools.cache
def stored(hidden: int, name: Quantization) -> Path:
    """The same, quantised."""
    out = folder_of(hidden).parent / name
    quantise(folder_of(hidden), out, METHODS[name], file_bytes=50_000)
    return out


@functools.cache
def rounded(hidden: int, name: Quantization) -> Path:
    """The same in bfloat16, where each matrix as a whole was quantised and dequantised."""
    folder, out = folder_of(hidden), folder_of(hidden).parent / f"{name}-rounded"
    method = METHODS[name]
    out.mkdir()
    (out / "config.json").write_text((folder / "config.json").read_text())
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        for tensor_name, tensor in load_file(file).items():
            if tensor_name.endswith("_proj.weight"):
                codec = codec_of(method, method.expert_bits if ".experts." in tensor_name else method.linear_bits)
                tensor = codec.dequantise(*codec.quantise(tensor), tensor.shape[1], torch.bfloat16)
            tensors[tensor_name] = tensor
    save_file(tensors, out / "model.safetensors")
    return out


def loaded(folder: Path, shard: Shard, quantization: Any = "auto", role: Any = "mixed") -> Decoder:
    config = ModelConfig.from_folder(folder)
    decoder = build_decoder(config, role, dtype=torch.bfloat16, device=tiny.CPU, shard=shard, quantization=quantization)
    with Checkpoint(folder) as checkpoint:
        load_decoder(decoder, config, checkpoint, has_vision_experts=role == "mixed")
    return decoder


@pytest.mark.parametrize(("name", "hidden", "dims"), CASES, ids=str)
def test_every_rank_holds_its_part_of_the_matrix_that_was_quantised_whole(
    name: Quantization, hidden: int, dims: ParallelDims, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ernie_cluster.model.fill.PIECE_BYTES", 400)  # several pieces per matrix
    for rank in range(dims.world):
        ours = loaded(folder_of(hidden), Shard(dims, rank), name)
        expected = dict(loaded(rounded(hidden, name), Shard(dims, rank)).named_parameters())
        weights = quantised_weights(ours)
        assert len(weights) > 3 * len(ours.layers)
        for parameter, numbers in expected.items():
            got = weights[parameter][...] if parameter in weights else ours.get_parameter(parameter)
            assert torch.equal(got, numbers), parameter


@pytest.mark.parametrize(("name", "hidden", "dims"), CASES, ids=str)
@pytest.mark.parametrize("role", ["mixed", "decode"])
def test_a_stored_one_is_what_loading_makes(name: Quantization, hidden: int, dims: ParallelDims, role: str) -> None:
    rank = dims.world - 1
    made = dict(loaded(folder_of(hidden), Shard(dims, rank), name, role).named_parameters())
    read = dict(loaded(stored(hidden, name), Shard(dims, rank), "auto", role).named_parameters())
    assert made.keys() == read.keys()
    for parameter, numbers in made.items():
        assert numbers.dtype == read[parameter].dtype
        assert torch.equal(numbers.view(torch.uint8), read[parameter].view(torch.uint8)), parameter


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("raw", [VL_28B, VL_424B, TEXT_03B], ids=["28b", "424b", "0.3b"])
def test_plan_and_loader_agree_on_bytes(name: Quantization, raw: dict[str, Any]) -> None:
    model, dims = ModelConfig.from_dict(raw), ParallelDims()
    decoder = build_decoder(model, "prefill", dtype=torch.bfloat16, device=META, quantization=name)
    held = [m for m in rank_matrices(model, "prefill", dims, 0) if m.kind in ("linear", "expert")]
    ours = {False: 0, True: 0}
    for parameter, numbers in decoder.named_parameters():
        if parameter.endswith((".codes", ".scales")):
            ours[parameter.endswith(".scales")] += numbers.nbytes
    assert ours[False] == sum(m.num_bytes(FORMATS[name]) for m in held)
    assert ours[True] == sum(m.scale_bytes(FORMATS[name]) for m in held)


@torch.no_grad()
def logits(decoder: Any) -> torch.Tensor:
    """Of all tokens of one prompt with a picture."""
    request = tiny.make_request([50, 900, tiny.make_image(1, (1, 6, 8)), 70, 80, 41, 260, 1999])
    sequence, num = Sequence(request, []), request.num_prompt_tokens
    sequence.blocks = list(range(1, 2 + num // tiny.BLOCK_SIZE))
    sequence.embeds = {i: tiny.encode(m) for i, m in enumerate(request.media)}
    special = tiny.tiny_config().token_ids
    assert special is not None
    step = BatchBuilder(tiny.BLOCK_SIZE, special.vision_pool, tiny.CPU).build(Schedule(chunks=[(sequence, num)]))
    every_row = type(step)(**{f: getattr(step, f) for f in step.__slots__} | {"logits_rows": torch.arange(num)})
    kv = KVCache.allocate(4, len(sequence.blocks) + 1, tiny.BLOCK_SIZE, 2, 32, torch.float32, tiny.CPU)
    return decoder(every_row, kv)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("name", "alike"), [("wint8", 0.998), ("wint4", 0.97)])
def test_logits_stay_close(name: Quantization, alike: float) -> None:
    config = tiny.tiny_config()
    decoder = build_decoder(config, "mixed", dtype=torch.float32, device=tiny.CPU, quantization=name)
    with Checkpoint(tiny.tiny_folder()) as checkpoint:
        load_decoder(decoder, config, checkpoint, has_vision_experts=True)
    expected, got = logits(tiny.tiny_decoder()), logits(decoder)
    assert torch.nn.functional.cosine_similarity(got.flatten(), expected.flatten(), 0) > alike
    assert not torch.equal(got, expected)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("ops", [TorchOps(), CudaOps(FlashAttention(varlen_attn))], ids=["torch", "cuda"])
def test_products_are_those_of_the_numbers(name: Quantization, ops: TorchOps) -> None:
    generator, method = torch.Generator().manual_seed(1), METHODS[name]
    weights = [
        quantised(torch.randn(shape, generator=generator), codec_of(method, bits))
        for shape, bits in (
            ((3, 32, 16), method.expert_bits),
            ((3, 16, 16), method.expert_bits),
            ((32, 16), method.linear_bits),
            ((16, 16), method.linear_bits),
        )
    ]
    plain = [weight[...] for weight in weights]
    x = torch.randn(5, 16, generator=generator).bfloat16()
    ids, shares = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1], [2, 0]]), torch.full((5, 2), 0.5)
    pool = [ExpertWeights(weights[0], weights[1])]
    assert torch.equal(
        ops.experts(x, pool, ids, shares), ops.experts(x, [ExpertWeights(plain[0], plain[1])], ids, shares)
    )
    assert torch.equal(ops.gated_mlp(x, weights[2], weights[3]), ops.gated_mlp(x, plain[2], plain[3]))
    assert torch.equal(ops.linear(x, weights[2]), torch.nn.functional.linear(x, plain[2]))


def test_blocks_that_ranks_would_share_are_refused() -> None:
    model = ModelConfig.from_dict(VL_28B)
    with pytest.raises(ConfigError, match=r"intermediate_size / tp % 128 = 64 / 2 % 128 = 32, must be 0"):
        ParallelDims(2).check_blocks(ModelConfig.from_dict(BLOCKY | {"intermediate_size": 64}), METHODS["fp8"])
    for name in ("wint8", "wint4"):
        for tp in (1, 2, 4):
            ParallelDims(tp).check_blocks(model, METHODS[name])
    ParallelDims(4).check_blocks(model, METHODS["fp8"])
    with pytest.raises(ConfigError, match=r"num_kv_heads \* head_dim % 128 = 64 % 128 = 64.*choose wint8"):
        build_decoder(tiny.tiny_config(), "mixed", dtype=torch.float32, device=META, quantization="fp8")


def copy_of(folder: Path, out: Path) -> Path:
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    return out


def test_another_quantisation_than_the_checkpoints_is_refused() -> None:
    with pytest.raises(ConfigError, match="quantization = wint4, but the checkpoint is stored as wint8"):
        loaded(stored(16, "wint8"), Shard(), "wint4")
    with pytest.raises(ConfigError, match="quantization = none, but the checkpoint is stored as wint8"):
        loaded(stored(16, "wint8"), Shard(), "none")


def test_a_configuration_that_does_not_belong_to_the_weights_is_refused(tmp_path: Path) -> None:
    folder = copy_of(stored(16, "wint8"), tmp_path / "a")
    (folder / "config.json").write_text((folder_of(16) / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"q_proj\.weight is stored as I8; only BF16 and F32"):
        loaded(folder, Shard())
    folder = copy_of(folder_of(16), tmp_path / "b")
    (folder / "config.json").write_text((stored(16, "wint8") / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"q_proj\.weight is stored as BF16, quantization_config .* says I8"):
        loaded(folder, Shard())


@pytest.mark.parametrize(
    "entry", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "ernie_cluster", "format": "wint2"}, "wint4"]
)
def test_foreign_forms_are_refused(entry: Any) -> None:
    with pytest.raises(ConfigError, match=r"quantization_config .* is not read here"):
        ModelConfig.from_dict(SMALL | {"quantization_config": entry})


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_numbers_that_no_scale_can_hold_are_named(number: float, tmp_path: Path) -> None:
    folder = copy_of(folder_of(16), tmp_path / "m")
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    with Checkpoint(folder) as checkpoint:
        path = checkpoint.file_of(name)
    tensors = load_file(path)
    tensors[name][2, 1] = number
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=rf"{path}: {name} holds numbers that are not finite"):
        loaded(folder, Shard(), "wint4")
    with pytest.raises(CheckpointError, match=rf"{path}: {name} holds numbers that are not finite"):
        quantise(folder, tmp_path / "out", METHODS["wint4"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_config_json_says_how_it_is_stored() -> None:
    raw = json.loads((stored(16, "wint4") / "config.json").read_text())
    assert raw["quantization_config"] == {"quant_method": "ernie_cluster", "format": "wint4", "block": [1, 0]}
    assert ModelConfig.from_folder(stored(16, "wint4")).quantization == "wint4"


@pytest.mark.parametrize(("capability", "is_new"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True)])
def test_fp8_needs_hopper(capability: tuple[int, int], is_new: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    gpu = torch.device("cuda")
    check_device(METHODS["wint4"], gpu)
    if is_new:
        check_device(METHODS["fp8"], gpu)
    else:
        with pytest.raises(ConfigError, match="fp8 needs a Hopper GPU or a newer one, and this is Some GPU; use wint8"):
            check_device(METHODS["fp8"], gpu)


def test_random_weights_for_benchmarks_are_sensible() -> None:
    config = ModelConfig.from_dict(SMALL)
    decoder = build_decoder(config, "mixed", dtype=torch.float32, device=tiny.CPU, quantization="wint4")
    randomize(decoder)
    for name, weight in quantised_weights(decoder).items():
        assert float(weight[...].std()) == pytest.approx(weight.shape[-1] ** -0.5, rel=0.3), name

"""What the ranks of a replica load is the checkpoint: together all of it, each its own part, each byte counted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.config.model import ModelConfig
from ernie_cluster.config.parallel import ParallelDims, Shard
from ernie_cluster.errors import ConfigError
from ernie_cluster.model.build import build_decoder, num_parameters
from ernie_cluster.model.checkpoint import Checkpoint
from ernie_cluster.model.decoder import Decoder
from ernie_cluster.model.fill import fill
from ernie_cluster.model.weights import decoder_copies, load_decoder
from tests import synthetic, tiny
from tests.shapes import SMALL, VL_28B, VL_424B

META = torch.device("meta")
DIMS = [
    ParallelDims(1, 1),
    ParallelDims(2, 1),
    ParallelDims(4, 1),
    ParallelDims(1, 4),
    ParallelDims(2, 2),
    ParallelDims(4, 2),
]


def config_of(heads: int, kv_heads: int, width: int, experts: int) -> ModelConfig:
    return ModelConfig.from_dict(
        SMALL
        | {
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "intermediate_size": width,
            "moe_num_experts": [experts, experts],
            "moe_intermediate_size": [width, 4],
        }
    )


@settings(max_examples=30)
@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3]), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2))
def test_parts_of_all_ranks_are_each_tensor_exactly(tp: int, dp: int, kv: int, group: int, more: int) -> None:
    """Split over tp: every number once per tp group. Experts: once in all. The rest: on every rank."""
    config = config_of(tp * kv * group, tp * kv, 2 * tp * more, tp * dp * more)
    dims = ParallelDims(tp, dp)
    times = {name: np.zeros(shape, int) for name, shape in synthetic.shapes_of(config).items()}
    for rank in range(dims.world):
        for copy in decoder_copies(config, has_vision_experts=True, shard=Shard(dims, rank)):
            times[copy.source][copy.part or ...] += 1
    for name, counts in times.items():
        if name.startswith(("vision_model", "model.resampler")):
            continue
        is_split = "_proj" in name and ".experts." not in name
        expected = 1 if ".experts." in name else dp if is_split else dims.world
        assert (counts == expected).all(), name


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_rank_reads_the_bytes_of_its_parameters_and_fills_each_once(
    dims: ParallelDims, role: str, made: Path
) -> None:
    config = ModelConfig.from_folder(made)
    total = 0
    for rank in range(dims.world):
        decoder = build_decoder(
            config,
            role,
            dtype=torch.bfloat16,
            device=tiny.CPU,
            shard=Shard(dims, rank),  # type: ignore[arg-type]
        )
        for parameter in decoder.parameters():
            parameter.fill_(torch.nan)
        with Checkpoint(made) as checkpoint:
            load_decoder(decoder, config, checkpoint, has_vision_experts=role == "prefill")
            assert checkpoint.bytes_read == sum(p.nbytes for p in decoder.parameters())
            total += checkpoint.bytes_read
        for name, parameter in decoder.named_parameters():
            assert not parameter.isnan().any(), name
    pools = [p for p in (config.text.text_experts, config.text.vision_experts)[: 2 if role == "prefill" else 1] if p]
    experts = len(config.text.sparse_layers) * sum(p.num_experts * 3 * 16 * p.intermediate_size * 2 for p in pools)
    whole = decoder_bytes(config, role)
    split = split_bytes(config)
    assert total == experts + dims.dp * split + dims.world * (whole - experts - split)


def decoder_bytes(config: ModelConfig, role: str) -> int:
    module = build_decoder(config, role, dtype=torch.bfloat16, device=META)  # type: ignore[arg-type]
    return sum(p.nbytes for p in module.parameters())


def split_bytes(config: ModelConfig) -> int:
    """Of attention, dense MLPs and shared experts."""
    module = build_decoder(config, "decode", dtype=torch.bfloat16, device=META)
    names = ("attention.", "mlp.gate_up", "mlp.down", "shared.")
    return sum(p.nbytes for n, p in module.named_parameters() if any(part in n for part in names))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic")
    synthetic.write_checkpoint(folder, SMALL, max_file_bytes=10_000)
    return folder


@pytest.mark.parametrize("dims", DIMS[1:], ids=str)
def test_ranks_put_together_are_the_whole_model(dims: ParallelDims, made: Path) -> None:
    whole = loaded(made, Shard())
    ranks = [loaded(made, Shard(dims, rank)) for rank in range(dims.world)]
    for name, expected in whole.named_parameters():
        parts = [dict(rank.named_parameters())[name] for rank in ranks]
        for group in range(dims.dp):
            mine = parts if ".pools." in name else parts[group * dims.tp : (group + 1) * dims.tp]
            torch.testing.assert_close(joined(name, mine), expected, atol=0, rtol=0, msg=name)


def loaded(folder: Path, shard: Shard) -> Decoder:
    config = ModelConfig.from_folder(folder)
    decoder = build_decoder(config, "mixed", dtype=torch.bfloat16, device=tiny.CPU, shard=shard)
    with Checkpoint(folder) as checkpoint:
        load_decoder(decoder, config, checkpoint, has_vision_experts=True)
    return decoder


def joined(name: str, parts: list[torch.nn.Parameter]) -> torch.Tensor:
    """One parameter of the whole model from those of the ranks that share it, in order; how, is written out anew here."""
    if ".pools." in name:
        return torch.cat(list(parts))
    if name.endswith("attention.qkv"):  # 8 query and 4 KV heads of 8, in all
        n = len(parts)
        thirds = [p.split([64 // n, 32 // n, 32 // n]) for p in parts]
        return torch.cat([third[i] for i in range(3) for third in thirds])
    if name.endswith("gate_up"):
        halves = [p.chunk(2) for p in parts]
        return torch.cat([half[i] for i in range(2) for half in halves])
    if name.endswith(("attention.out", ".down")):
        return torch.cat(list(parts), 1)
    for part in parts:
        assert torch.equal(part, parts[0])
    return parts[0]


def test_numbers_come_from_their_own_place(made: Path) -> None:
    """Against the generator, not against another load: the whole model may be wrong in the same way as its parts."""
    second = loaded(made, Shard(ParallelDims(2, 2), 3))
    down = synthetic.numbers("model.layers.0.mlp.down_proj.weight", (16, 24))
    assert torch.equal(second.layers[0].mlp.down, down[:, 12:])  # type: ignore[arg-type, union-attr]
    key = synthetic.numbers("model.layers.2.self_attn.k_proj.weight", (32, 16))
    assert torch.equal(second.layers[2].attention.qkv[32:48], key[16:])  # type: ignore[index, union-attr]
    up = synthetic.numbers("model.layers.1.mlp.experts.15.up_proj.weight", (4, 16))
    assert torch.equal(second.layers[1].mlp.pools[1].gate_up[1, 4:], up)  # type: ignore[index, union-attr]
    gate = synthetic.numbers("model.layers.1.mlp.gate.weight_1", (16, 8))
    assert torch.equal(second.layers[1].mlp.router.weight[8:], gate.T.float())  # type: ignore[index, union-attr]


@pytest.mark.parametrize("num_threads", [1, 7])
def test_pieces_and_threads_change_nothing(num_threads: int, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ernie_cluster.model.fill.PIECE_BYTES", 70)  # two rows of 16, not a divisor of any size
    config, shard, seen = ModelConfig.from_folder(made), Shard(ParallelDims(2, 2), 1), list[tuple[int, int]]()
    decoder = build_decoder(config, "mixed", dtype=torch.float32, device=tiny.CPU, shard=shard)
    copies = list(decoder_copies(config, has_vision_experts=True, shard=shard))
    with Checkpoint(made) as checkpoint:
        fill(decoder, copies, checkpoint, progress=lambda *now: seen.append(now), num_threads=num_threads)
    assert len(seen) > len(copies)
    done = [d for d, _ in seen]
    assert done == sorted(done)
    assert seen[-1] == (done[-1], done[-1])
    for (name, ours), theirs in zip(decoder.named_parameters(), loaded(made, shard).parameters(), strict=True):
        assert torch.equal(ours, theirs.float()), name


def test_routers_and_norms_are_whole_on_every_rank() -> None:
    config = ModelConfig.from_dict(SMALL)
    decoder = build_decoder(config, "mixed", dtype=torch.bfloat16, device=META, shard=Shard(ParallelDims(4, 2), 5))
    shapes = Counter({n: p.shape for n, p in decoder.named_parameters()})
    assert shapes["layers.1.mlp.router.weight"] == (16, 16)
    assert shapes["layers.1.input_norm"] == (16,)
    assert shapes["embed"] == shapes["head"] == (32, 16)
    assert shapes["layers.1.mlp.pools.0.gate_up"] == (1, 16, 16)
    assert shapes["layers.1.mlp.shared.down"] == (16, 4)


@pytest.mark.parametrize(("raw", "tp"), [(VL_28B, 4), (VL_424B, 8)])
def test_full_size_models_split_over_real_machines(raw: dict[str, object], tp: int) -> None:
    config, dims = ModelConfig.from_dict(raw), ParallelDims(tp)
    each = [
        num_parameters(build_decoder(config, "prefill", dtype=torch.bfloat16, device=META, shard=Shard(dims, rank)))
        for rank in range(tp)
    ]
    assert len(set(each)) == 1
    whole = build_decoder(config, "prefill", dtype=torch.bfloat16, device=META)
    names = ("embed", "head", "norm", "router")
    held = sum(p.numel() for n, p in whole.named_parameters() if any(part in n for part in names))
    assert each[0] == held + (num_parameters(whole) - held) // tp


def test_ranks_that_do_not_divide_the_model_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_kv_heads % tp = 4 % 8"):
        build_decoder(
            ModelConfig.from_dict(SMALL), "mixed", dtype=torch.bfloat16, device=META, shard=Shard(ParallelDims(8))
        )

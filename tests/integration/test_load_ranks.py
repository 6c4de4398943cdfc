"""Four ranks, each a process, load a checkpoint of 2 GB in the hub's names from many files, and hold what they should."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ernie_cluster.config.model import ModelConfig
from ernie_cluster.model.fill import NUM_THREADS, PIECE_BYTES
from tests import synthetic
from tests.shapes import VL_28B

RAW = VL_28B | {
    "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 14,
    "num_attention_heads": 16, "head_dim": 64, "freq_allocation": 8, "moe_num_experts": [16, 16],
    "moe_intermediate_size": [1024, 512], "im_patch_id": 8000,
    "vision_config": {"depth": 2, "embed_dim": 256, "num_heads": 4, "mlp_ratio": 4, "patch_size": 14},
}  # fmt: skip
"""The 28B, narrower and with fewer experts."""
TP, DP = 2, 2

CHILD = """
import json, sys, torch
from pathlib import Path
from ernie_cluster.config.model import ModelConfig
from ernie_cluster.config.parallel import ParallelDims, Shard
from ernie_cluster.model.build import build_decoder
from ernie_cluster.model.checkpoint import Checkpoint
from ernie_cluster.model.weights import decoder_copies, load_decoder
from tests import synthetic

folder, shard = sys.argv[1], Shard(ParallelDims(int(sys.argv[2]), int(sys.argv[3])), int(sys.argv[4]))

def status(key):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024

torch.set_num_threads(1)
config = ModelConfig.from_folder(folder)
decoder = build_decoder(config, "prefill", dtype=torch.bfloat16, device=torch.device("cpu"), shard=shard)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
with Checkpoint(folder) as checkpoint:
    load_decoder(decoder, config, checkpoint, has_vision_experts=True)
    read = checkpoint.bytes_read
peak = status("VmHWM")
own = sum(p.nbytes for p in decoder.parameters())
parameters, wrong = dict(decoder.named_parameters()), []
for copy in decoder_copies(config, has_vision_experts=True, shard=shard):
    expected = synthetic.numbers(copy.source, copy.shape)[copy.part or ...]
    expected = expected.T if copy.is_transposed else expected
    target = parameters[copy.parameter][copy.index or ...]
    if not torch.equal(target, expected.to(target.dtype)):
        wrong.append(copy.source)
print(json.dumps({"own": own, "read": read, "more": peak - before - own, "wrong": wrong}))
"""


@pytest.mark.slow
def test_four_ranks_share_a_checkpoint_of_two_gigabytes(tmp_path: Path) -> None:
    total = synthetic.write_checkpoint(tmp_path, RAW, max_file_bytes=100_000_000)
    assert total > 2e9
    assert len(list(tmp_path.glob("*.safetensors"))) > 15
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path), str(TP), str(DP), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(TP * DP)
    ]
    outputs = [child.communicate(timeout=600) for child in children]
    assert [child.returncode for child in children] == [0] * len(children), [said for _, said in outputs]
    seen = [json.loads(out) for out, _ in outputs]
    for rank in seen:
        assert rank["wrong"] == []
        assert rank["read"] == rank["own"]
        assert rank["more"] <= NUM_THREADS * PIECE_BYTES + 24e6
    assert sum(rank["read"] for rank in seen) == expected_bytes()
    assert max(rank["read"] for rank in seen) < total * 0.35


def expected_bytes() -> int:
    """By all ranks together: experts once, what is split over tp once per group, the rest on each."""
    total = 0
    for name, shape in synthetic.shapes_of(ModelConfig.from_dict(RAW)).items():
        if name.startswith(("vision_model", "model.resampler")):
            continue
        is_split = "_proj" in name
        times = 1 if ".experts." in name else DP if is_split else TP * DP
        total += times * synthetic.num_bytes(name, shape)
    return total

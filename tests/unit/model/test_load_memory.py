"""Host memory while a rank loads: its parameters and a few pieces, not the files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ernie_cluster.model.fill import NUM_THREADS, PIECE_BYTES
from tests import synthetic

RAW = {
    "model_type": "ernie4_5", "vocab_size": 1024, "hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 6,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "dtype": "bfloat16",
}  # fmt: skip

CHILD = """
import json, sys, torch
from pathlib import Path
from ernie_cluster.config.model import ModelConfig
from ernie_cluster.config.parallel import ParallelDims, Shard
from ernie_cluster.engine.runner import Runner
from ernie_cluster.model.group import Place

def status(key):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024

config = ModelConfig.from_folder(sys.argv[1])
torch.ones(1)
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before, read = status("VmRSS"), []
runner = Runner.load(
    sys.argv[1], config, "mixed", dtype="float32", device=torch.device("cpu"), num_blocks=2, block_size=1,
    quantization=sys.argv[2], place=Place(Shard(ParallelDims(tp=4), 3)), progress=lambda done, total: read.append(total),
)
own = sum(p.nbytes for p in runner.decoder.parameters())
print(json.dumps({"own": own, "read": read[-1], "more": status("VmHWM") - before - own}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux for the peak")
def test_a_rank_holds_its_parameters_and_a_few_pieces(tmp_path: Path) -> None:
    """300 MB of bfloat16 on disk, a quarter of it read, and converted: the longest way that a byte can take."""
    total, seen = load(tmp_path, "none")
    assert seen["read"] * 2 == seen["own"]
    assert seen["read"] < total * 0.26
    assert seen["more"] <= NUM_THREADS * PIECE_BYTES + 24e6, (
        "beside the parameters: a buffer per thread, and what Python takes"
    )


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux for the peak")
def test_quantising_takes_no_more(tmp_path: Path) -> None:
    """Of matrices that are split by columns, whole rows are read."""
    total, seen = load(tmp_path, "wint8")
    assert total * 0.25 < seen["read"] < total * 0.6
    assert seen["more"] <= NUM_THREADS * PIECE_BYTES + 48e6


def load(folder: Path, quantization: str) -> tuple[int, dict[str, int]]:
    """Bytes of the checkpoint, and what a process said that has loaded a quarter of it."""
    total = synthetic.write_checkpoint(folder, RAW, max_file_bytes=60_000_000, is_hollow=True)
    assert total > 300e6
    done = subprocess.run([sys.executable, "-c", CHILD, str(folder), quantization], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return total, json.loads(done.stdout)

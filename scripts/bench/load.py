"""Measure how fast a rank's weights are read, beside a plain sequential read of the same bytes, from the page cache.

    python scripts/bench/load.py [rounds] [folder]

Writes a checkpoint of about 1.7 GB in the hub's names to `folder` (a temporary one by default), in many files; then reads,
in turns, the same bytes (1) file by file into one buffer that stays in the caches, (2) file by file into fresh memory, as
weights need it, (3) as `load_decoder` does, into a fresh decoder. Best of `rounds` each. The rank of tp = 2 reads only its
part of the same files; its rate is per byte that it reads.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from ernie_cluster.config.model import ModelConfig
from ernie_cluster.config.parallel import WHOLE, ParallelDims, Shard
from ernie_cluster.model.build import build_decoder
from ernie_cluster.model.checkpoint import Checkpoint
from ernie_cluster.model.fill import PIECE_BYTES
from ernie_cluster.model.weights import decoder_copies, load_decoder

RAW = {
    "model_type": "ernie4_5_moe", "vocab_size": 16384, "hidden_size": 1024, "intermediate_size": 4096,
    "num_hidden_layers": 12, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64,
    "moe_num_experts": 32, "moe_intermediate_size": 704, "moe_k": 6, "moe_num_shared_experts": 2,
}  # fmt: skip
FILE_BYTES = 128 << 20


def write(folder: Path) -> None:
    """All tensors of the model, in files of `FILE_BYTES`; what they hold makes no difference."""
    group: dict[str, torch.Tensor] = {}
    used = number = 0
    for copy in decoder_copies(ModelConfig.from_dict(RAW), has_vision_experts=False):
        is_router = "gate.weight" in copy.source or "moe_statics" in copy.source
        group[copy.source] = torch.zeros(copy.shape, dtype=torch.float32 if is_router else torch.bfloat16)
        used += group[copy.source].nbytes
        if used > FILE_BYTES:
            save_file(group, folder / f"model-{number:05d}.safetensors")
            group, used, number = {}, 0, number + 1
    save_file(group, folder / f"model-{number:05d}.safetensors")


def read_plainly(folder: Path, *, is_fresh: bool) -> int:
    """Every file from its beginning to its end, one thread; bytes."""
    buffer, total, kept = bytearray(PIECE_BYTES), 0, []
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        target = memoryview(torch.empty(size, dtype=torch.uint8).numpy()) if is_fresh else memoryview(buffer)
        kept.append(target)
        with path.open("rb", buffering=0) as file:
            done = 0
            while done < size:
                out = target[done : done + PIECE_BYTES] if is_fresh else target
                done += os.preadv(file.fileno(), [out], done)
        total += size
    return total


def load(folder: Path, shard: Shard) -> int:
    """As a rank does; bytes."""
    config = ModelConfig.from_dict(RAW)
    decoder = build_decoder(config, "prefill", dtype=torch.bfloat16, device=torch.device("cpu"), shard=shard)
    with Checkpoint(folder) as checkpoint:
        load_decoder(decoder, config, checkpoint, has_vision_experts=False)
        return checkpoint.bytes_read


def main(rounds: int, folder: Path) -> None:
    write(folder)
    ways: dict[str, Callable[[], int]] = {
        "plain read, one buffer": lambda: read_plainly(folder, is_fresh=False),
        "plain read, fresh memory": lambda: read_plainly(folder, is_fresh=True),
        "load_decoder, whole": lambda: load(folder, WHOLE),
        "load_decoder, tp 2, rank 1": lambda: load(folder, Shard(ParallelDims(2), 1)),
    }
    rates = dict.fromkeys(ways, 0.0)
    read_plainly(folder, is_fresh=False)  # into the page cache
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            num_bytes = way()
            rate = num_bytes / (time.perf_counter() - start)
            rates[name] = max(rates[name], rate)
            print(f"  {name:28} {num_bytes / 1e9:5.2f} GB {rate / 1e9:6.2f} GB/s")
    plain, fresh = rates["plain read, one buffer"], rates["plain read, fresh memory"]
    for name, rate in rates.items():
        print(
            f"{name:28} {rate / 1e9:6.2f} GB/s = {rate / plain:4.0%} of one buffer, {rate / fresh:4.0%} of fresh memory"
        )


if __name__ == "__main__":
    num_rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    if len(sys.argv) > 2:
        main(num_rounds, Path(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory() as made:
            main(num_rounds, Path(made))

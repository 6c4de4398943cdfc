"""Measure what a gang of ranks costs per decode step on CPU, beside one rank.

    python scripts/bench/gang.py [steps] [batch]

Uses the packaged model in float32, one thread per rank, gloo. For each layout: (1) the whole step; (2) one word to the
others, of which an announcement takes two and a vote one. With two ranks on two cores a step has half
the products and, per layer, two sums (tp) or five exchanges (dp) over sockets: a small model can only lose.
"""

from __future__ import annotations

import sys
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from ernie_cluster.config.model import ModelConfig
from ernie_cluster.config.parallel import ParallelDims, Shard
from ernie_cluster.config.presets import POCKET
from ernie_cluster.engine.crew import Command, announce
from ernie_cluster.engine.runner import Runner
from ernie_cluster.engine.sampler import SamplerRow
from ernie_cluster.model.group import ALONE, join, open_store
from ernie_cluster.model.packing import make_step
from ernie_cluster.model.step import StepInput
from ernie_cluster.request import SamplingParams

CONTEXT, BLOCK_SIZE = 256, 16
LAYOUTS = [ParallelDims(1, 1), ParallelDims(2, 1), ParallelDims(1, 2)]


def decode_step(batch: int) -> StepInput:
    """One token for each of `batch` sequences of `CONTEXT` tokens."""
    per = CONTEXT // BLOCK_SIZE
    tables = np.arange(1, batch * per + 1).reshape(batch, per)
    return make_step(
        token_ids=np.full(batch, 300),
        positions=CONTEXT - 1,
        slots=tables[:, -1] * BLOCK_SIZE + BLOCK_SIZE - 1,
        block_tables=tables,
        query_lens=[1] * batch,
        context_lens=[CONTEXT] * batch,
        num_decode=batch,
        logits_rows=range(batch),
        device=torch.device("cpu"),
    )


def rank_main(dims: ParallelDims, rank: int, line: Connection, steps: int, batch: int) -> None:
    """One rank: the first of each tensor-parallel group leads, and sends its medians in microseconds."""
    torch.set_num_threads(1)
    place: Any = ALONE
    if dims.world > 1:
        store = open_store("127.0.0.1", 60.0) if rank == 0 else None
        if store is not None:
            line.send(store.port)
        place = join(store or ("127.0.0.1", line.recv()), Shard(dims, rank), torch.device("cpu"), 60.0)
    config = ModelConfig.from_folder(POCKET)
    runner = Runner.load(
        str(POCKET),
        config,
        "decode",
        dtype="float32",
        device=torch.device("cpu"),
        num_blocks=batch * CONTEXT // BLOCK_SIZE + 1,
        block_size=BLOCK_SIZE,
        place=place,
    )
    if place.shard.tp_rank:
        runner.follow(place.tp)
        return
    step, rows = decode_step(batch), [SamplerRow(SamplingParams(temperature=0), 0, (), (), ())] * batch
    whole = _median(lambda: runner.run(step, rows), steps)
    said = 0.0
    if dims.dp > 1:
        said = _median(runner.crew.rest, steps)
    elif dims.tp > 1:
        said = _median(lambda: announce(place.tp, Command.BEAT), steps)
    runner.crew.dismiss()
    line.send((whole, said))


def _median(call: Any, steps: int) -> float:
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times) * 1e6)


def main() -> None:
    """Print a line per layout."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    batch = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    context, first = get_context("spawn"), 0.0
    for dims in LAYOUTS:
        lines, processes = [], []
        for rank in range(dims.world):
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=rank_main, args=(dims, rank, theirs, steps, batch), daemon=True))
            processes[-1].start()
            lines.append(ours)
        if dims.world > 1:
            port = lines[0].recv()
            for line in lines[1:]:
                line.send(port)
        whole, said = lines[0].recv()
        first = first or whole
        print(
            f"tp {dims.tp} dp {dims.dp}, batch {batch}: {whole:7.0f} us per step, {whole - first:+7.0f} us to one rank; "
            f"one word to the others {said:5.0f} us"
        )
        for process in processes:
            process.join(30)


if __name__ == "__main__":
    main()

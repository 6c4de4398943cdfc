"""A gang whose ranks are processes, over gloo: what one rank says while experts move, and an end for all when one dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Literal

import pytest
import torch

from ernie_cluster.config.experts import Table
from ernie_cluster.config.parallel import ParallelDims, Shard
from ernie_cluster.engine.balance import Rule
from ernie_cluster.engine.runner import Runner
from ernie_cluster.engine.worker import Worker
from ernie_cluster.errors import GangBroken
from ernie_cluster.model.group import join, open_store
from tests import tiny

PATIENCE_S = 100.0
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [14] * 21]


Death = Literal["never", "before", "moving"]


def turned(loads: object, tables: Sequence[Table], num_pools: int) -> list[Table]:
    """Every expert goes to the next rank."""
    return [table[1:] + table[:1] for table in tables]


def rank_main(folder: str, dims: ParallelDims, rank: int, line: Connection, dies: Death) -> None:
    torch.set_num_threads(1)
    store = None
    if rank == 0:
        store = open_store("127.0.0.1", PATIENCE_S)
        line.send(store.port)
    place = join(store or ("127.0.0.1", line.recv()), Shard(dims, rank), tiny.CPU, PATIENCE_S)
    config = tiny.ModelConfig.from_folder(folder)
    runner = Runner.load(
        folder,
        config,
        "mixed",
        dtype="float32",
        device=tiny.CPU,
        num_blocks=64,
        block_size=4,
        place=place,
        rule=Rule(3, turned),
    )
    if dies == "before":
        line.send("loaded")
    if dies == "moving" and rank == 1:
        runner.decoder.sparse[1].move = lambda *_: os._exit(1)  # type: ignore[method-assign]
    try:
        if place.shard.tp_rank:
            runner.follow(place.tp)
            line.send({})
            return
        outcomes = tiny.Outcomes()
        worker = Worker(runner, config, tiny.make_worker()[0].settings, outcomes)
        if dies == "before" and rank == 0:
            line.recv()
        tiny.run_mixed(worker, [tiny.make_request(p, f"{i}") for i, p in enumerate(PROMPTS)])
        while runner.rest():
            pass
        runner.crew.dismiss()
        outcomes.drain()
        line.send(outcomes.tokens)
    except GangBroken:
        line.send("broken")


def start(dims: ParallelDims, dies: Death) -> tuple[list[Connection], list[object]]:
    context = get_context("spawn")
    lines, processes = [], []
    for rank in range(dims.world):
        ours, theirs = context.Pipe()
        process = context.Process(target=rank_main, args=(tiny.tiny_folder(), dims, rank, theirs, dies), daemon=True)
        process.start()
        lines.append(ours)
        processes.append(process)
    port = hear(lines[0])
    for line in lines[1:]:
        line.send(port)
    return lines, processes


def hear(line: Connection) -> object:
    assert line.poll(PATIENCE_S), "a rank does not answer"
    return line.recv()


@pytest.mark.parametrize("dims", [ParallelDims(2, 1), ParallelDims(1, 2)], ids=str)
def test_processes_say_what_one_rank_says(dims: ParallelDims) -> None:
    worker, outcomes = tiny.make_worker()
    tiny.run_mixed(worker, [tiny.make_request(p, f"{i}") for i, p in enumerate(PROMPTS)])
    outcomes.drain()
    lines, _ = start(dims, "never")
    for rank, line in enumerate(lines):
        assert hear(line) == ({} if dims.coordinates(rank).tp_rank else outcomes.tokens)


@pytest.mark.parametrize("dims", [ParallelDims(2, 1), ParallelDims(1, 2)], ids=str)
def test_when_a_rank_is_killed_the_others_hear_of_it(dims: ParallelDims) -> None:
    lines, processes = start(dims, "before")
    assert [hear(line) for line in lines] == ["loaded", "loaded"]
    os.kill(processes[1].pid, signal.SIGKILL)  # type: ignore[attr-defined]
    processes[1].join()  # type: ignore[attr-defined]
    lines[0].send("go on")
    assert hear(lines[0]) == "broken"


def test_when_a_rank_dies_while_experts_move_the_others_hear_of_it() -> None:
    lines, _ = start(ParallelDims(2, 1), "moving")
    assert hear(lines[0]) == "broken"

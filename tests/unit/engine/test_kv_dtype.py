"""Engines whose K and V are in 8 bits."""

from __future__ import annotations

import pytest
import torch

from ernie_cluster.config.parallel import ParallelDims
from ernie_cluster.engine.runner import Runner
from ernie_cluster.engine.worker import Worker
from ernie_cluster.model.build import build_decoder
from ernie_cluster.model.checkpoint import Checkpoint
from ernie_cluster.model.group import ALONE, Place
from ernie_cluster.model.weights import load_decoder
from tests import tiny
from tests.groups import together
from tests.unit.engine.test_crew import requests, settings_of


def said(kv_dtype: str, place: Place = ALONE) -> dict[str, list[int]]:
    """What one engine answers, or a gang under its leader."""
    config = tiny.tiny_config()
    decoder = build_decoder(config, "mixed", dtype=torch.float32, device=tiny.CPU, shard=place.shard, kv_dtype=kv_dtype)
    with Checkpoint(tiny.tiny_folder()) as checkpoint:
        load_decoder(decoder, config, checkpoint, has_vision_experts=True)
    decoder.connect(place)
    mine = Runner.around(decoder, num_blocks=256, block_size=tiny.BLOCK_SIZE, place=place)
    if place.shard.tp_rank:
        mine.follow(place.tp)
        return {}
    outcomes = tiny.Outcomes()
    worker = Worker(mine, config, settings_of(), outcomes, tiny.tiny_compiler)
    assert worker.layout.block_bytes * 256 == mine.kv.data.nbytes
    tiny.run_mixed(worker, [tiny.make_request(p, f"0.{i}") for i, p in enumerate(requests(0))])  # type: ignore[arg-type]
    mine.crew.dismiss()
    outcomes.drain()
    return outcomes.tokens


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_a_gang_says_what_one_rank_says(kv_dtype: str) -> None:
    tiny.encode(tiny.make_image(3))  # made once, before the threads
    assert together(lambda place: said(kv_dtype, place), ParallelDims(2, 1)) == [said(kv_dtype), {}]


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_chunks_change_nothing(kv_dtype: str) -> None:
    prompts = [tiny.make_request(p, f"0.{i}") for i, p in enumerate(requests(0))]  # type: ignore[arg-type]
    worker, outcomes = tiny.make_worker(kv_dtype=kv_dtype, max_batch_tokens=8, max_num_seqs=4)
    tiny.run_mixed(worker, prompts)
    outcomes.drain()
    assert outcomes.tokens == said(kv_dtype)

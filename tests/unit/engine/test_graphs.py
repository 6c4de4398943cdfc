"""Decode steps as graphs: padded to known sizes, run from memory that never moves, and the same tokens as without.

The recorder here is a twin of CUDA's: to start a graph is to run the recorded function again, which sees nothing but
the memory that it was recorded with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ernie_cluster.config.parallel import ParallelDims, Shard
from ernie_cluster.engine.buckets import DecodeBuckets
from ernie_cluster.engine.crew import Crew
from ernie_cluster.engine.graphs import GraphedDecoder, Run, choose_graphs
from ernie_cluster.engine.runner import Runner
from ernie_cluster.engine.worker import Worker
from ernie_cluster.model.cuda_ops import CudaOps
from ernie_cluster.model.decoder import Decoder
from ernie_cluster.model.flash import FlashAttention
from ernie_cluster.model.group import ALONE, Place
from ernie_cluster.model.step import KVCache
from ernie_cluster.model.storage import Storage
from tests import tiny
from tests.varlen import varlen_attn

BUCKETS = DecodeBuckets((1, 2, 4), width=16)


class TwinRecorder:
    def __init__(self) -> None:
        self.num_recorded, self.num_started = 0, 0

    def __call__(self, run: Run) -> tuple[Callable[[], None], Tensor]:
        self.num_recorded += 1
        out = torch.full_like(run(), torch.nan)  # a graph's result is nothing before it is started

        def start() -> None:
            self.num_started += 1
            out.copy_(run())

        return start, out


@functools.cache
def gpu_decoder() -> Decoder:
    """The tiny model on the GPU's kernels: others look at lengths on the host, which a graph does not see change."""
    ops = CudaOps(FlashAttention(varlen_attn, page_tokens=tiny.BLOCK_SIZE))
    decoder = Decoder(tiny.tiny_config().text, has_vision_experts=True, storage=Storage(torch.float32), ops=ops)
    decoder.load_state_dict(tiny.tiny_decoder().state_dict())
    return decoder


def graphed_worker(record: TwinRecorder) -> tuple[Worker, tiny.Outcomes]:
    decoder, text, outcomes = gpu_decoder(), tiny.tiny_config().text, tiny.Outcomes()
    shape = (text.num_layers, 256, tiny.BLOCK_SIZE, text.num_kv_heads, text.head_dim)
    kv = KVCache.allocate(*shape, torch.float32, tiny.CPU)
    runner = Runner(decoder, kv, Crew(), GraphedDecoder(decoder, kv, BUCKETS, record))
    settings = tiny.make_worker()[0].settings
    return Worker(runner, tiny.tiny_config(), settings, outcomes, tiny.tiny_compiler), outcomes


PROMPTS: list[list[object]] = [[5, 6, 7], [8, 9, 10, 11, 12], [tiny.make_image(3), 13], [14] * 9, [15, 16]]


def run(worker: Worker, outcomes: tiny.Outcomes, prompts: list[list[object]], max_tokens: int) -> dict[str, list[int]]:
    requests = [
        tiny.make_request(p, f"r{i}", max_tokens=max_tokens + i, temperature=i % 2, seed=i)  # type: ignore[arg-type]
        for i, p in enumerate(prompts)
    ]
    tiny.run_mixed(worker, requests)
    outcomes.drain()
    return outcomes.tokens


def test_graphs_say_what_the_decoder_says() -> None:
    """Requests end one after another: batches of 4, 3, 2 and 1, the second padded."""
    record = TwinRecorder()
    got = run(*graphed_worker(record), PROMPTS[:4], 4)
    assert got == run(*tiny.make_worker(), PROMPTS[:4], 4)
    assert record.num_recorded == len(BUCKETS.sizes)
    assert record.num_started > 4


def test_warm_up_records_every_size_and_serving_none() -> None:
    record = TwinRecorder()
    worker, outcomes = graphed_worker(record)
    worker.warm_up()
    assert record.num_recorded == len(BUCKETS.sizes)
    num_started = record.num_started
    run(worker, outcomes, PROMPTS[:3], 5)
    assert record.num_recorded == len(BUCKETS.sizes)
    assert record.num_started > num_started


def test_batches_and_contexts_without_a_size_run_as_ever() -> None:
    record = TwinRecorder()
    assert run(*graphed_worker(record), PROMPTS, 3) == run(*tiny.make_worker(), PROMPTS, 3)
    long = [[7] * (BUCKETS.width * tiny.BLOCK_SIZE)]
    started = record.num_started
    assert run(*graphed_worker(record), long, 4) == run(*tiny.make_worker(), long, 4)  # type: ignore[arg-type]
    assert record.num_started == started


def test_padding_writes_to_the_block_that_is_nobodys() -> None:
    worker, outcomes = graphed_worker(TwinRecorder())
    kv = worker.engine.runner.kv.data
    kv[:, :, 1:] = 7.0
    requests = PROMPTS[1:4]
    run(worker, outcomes, requests, 4)
    touched = {b for b in range(kv.shape[2]) if not (kv[:, :, b] == (0.0 if b == 0 else 7.0)).all()}
    assert 0 in touched, "three rows were padded to four"
    blocks = sum(-(-(n + 4 + i) // tiny.BLOCK_SIZE) for i, n in enumerate((5, 9, 9)))
    assert len(touched - {0}) <= blocks


def test_every_layer_is_told() -> None:
    """A hand-over may wait for the layers of a step that is a graph, too."""
    worker, _ = graphed_worker(TwinRecorder())
    runner, seen = worker.engine.runner, list[int]()
    worker.warm_up()
    build = worker.engine.builder.build
    steps = []
    worker.engine.builder.build = lambda schedule: steps.append(build(schedule)) or steps[-1]  # type: ignore[func-returns-value,method-assign]
    worker.warm_up()
    assert runner.graphs is not None
    with torch.inference_mode():
        runner.graphs(steps[-1], runner.kv, seen.append)
    assert seen == list(range(runner.decoder.config.num_layers))


@given(st.integers(1, 300), st.integers(1, 300))
def test_buckets(max_num_seqs: int, num_sequences: int) -> None:
    buckets = DecodeBuckets.up_to(max_num_seqs, 9)
    assert list(buckets.sizes) == sorted(set(buckets.sizes))
    assert buckets.sizes[-1] == max_num_seqs
    size = buckets.fit(num_sequences, 9)
    assert (size is None) == (num_sequences > max_num_seqs)
    if size is not None:
        assert num_sequences <= size <= max(2 * num_sequences - 1, num_sequences + 31)
    assert buckets.fit(num_sequences, 10) is None


def test_no_graphs_on_cpu_and_where_ranks_exchange_rows(caplog: pytest.LogCaptureFixture) -> None:
    runner = Runner.around(tiny.tiny_decoder(), num_blocks=4, block_size=4, max_graphed=8)  # type: ignore[arg-type]
    assert runner.graphs is None
    assert runner.buckets is None

    caplog.set_level("INFO")
    on_gpu = SimpleNamespace(embed=SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16))
    gang = Place(Shard(ParallelDims(1, 2), 0))
    assert choose_graphs(on_gpu, runner.kv, gang, 8) is None  # type: ignore[arg-type]
    assert "no CUDA graphs: with dp = 2" in caplog.text
    assert choose_graphs(on_gpu, runner.kv, ALONE, 0) is None  # type: ignore[arg-type]
    on_gpu.embed.dtype = torch.float32
    assert choose_graphs(on_gpu, runner.kv, ALONE, 8) is None  # type: ignore[arg-type]
    assert "no CUDA graphs: weights are torch.float32" in caplog.text

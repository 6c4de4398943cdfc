"""What only a GPU can show: its kernels give what plain torch gives, graphs what eager steps give, and nothing waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from ernie_cluster.engine.buckets import DecodeBuckets
from ernie_cluster.engine.crew import Crew
from ernie_cluster.engine.graphs import CudaRecorder, GraphedDecoder
from ernie_cluster.engine.host_tier import HostMemory
from ernie_cluster.engine.runner import Runner
from ernie_cluster.engine.worker import Worker
from ernie_cluster.model.build import build_decoder
from ernie_cluster.model.cuda_ops import CudaOps, PagedAttention, fused
from ernie_cluster.model.decoder import Decoder
from ernie_cluster.model.flash import PAGE_TOKENS, FlashAttention, choose_flash
from ernie_cluster.model.ops import ExpertWeights, TorchOps
from ernie_cluster.model.packing import make_step
from ernie_cluster.model.step import KVCache, StepInput
from tests import tiny

CUDA = torch.device("cuda", 0)
HEADS, KV_HEADS, DIM = 8, 2, 128


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(CUDA, dtype)


def step_of(parts: list[tuple[int, int]], width: int) -> StepInput:
    """(tokens in the step, tokens afterwards) of sequences that own `width` blocks each; those that decode first."""
    tables = np.arange(1, len(parts) * width + 1, dtype=np.int32).reshape(len(parts), width)
    slots = [
        int(tables[i, p // PAGE_TOKENS]) * PAGE_TOKENS + p % PAGE_TOKENS
        for i, (query, context) in enumerate(parts)
        for p in range(context - query, context)
    ]
    return make_step(
        token_ids=np.arange(len(slots)) % 500 + 5,
        positions=np.concatenate([np.arange(context - query, context) for query, context in parts]),
        slots=slots,
        block_tables=tables,
        query_lens=[query for query, _ in parts],
        context_lens=[context for _, context in parts],
        num_decode=sum(query == 1 for query, _ in parts),
        logits_rows=(np.cumsum([query for query, _ in parts]) - 1).tolist(),
        device=CUDA,
    )


@contextmanager
def nothing_waits() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="module")
def attend() -> FlashAttention:
    return choose_flash(CUDA)


@pytest.mark.parametrize(
    "parts",
    [[(1, 1), (1, 700)], [(1, 5000)], [(1, 3), (40, 300), (512, 512)], [(300, 300)], [(1, 257)] * 9],
    ids=["decodes", "a long one", "mixed", "a prompt", "many"],
)
def test_attention_equals_plain_torch(attend: FlashAttention, parts: list[tuple[int, int]]) -> None:
    width = -(-max(context for _, context in parts) // PAGE_TOKENS)
    step, num_pages = step_of(parts, width), len(parts) * width + 1
    pages = (
        random(num_pages, PAGE_TOKENS, KV_HEADS, DIM, seed=1),
        random(num_pages, PAGE_TOKENS, KV_HEADS, DIM, seed=2),
    )
    q = random(sum(query for query, _ in parts), HEADS, DIM)
    exact = TorchOps().attention(q.float(), (pages[0].float(), pages[1].float()), step)
    with nothing_waits():
        got = attend(q, pages, step)
    torch.testing.assert_close(got.float(), exact, atol=2e-2, rtol=2e-2)


def test_experts_equal_plain_torch(attend: FlashAttention) -> None:
    pools = [ExpertWeights(random(8, 2 * w, 256, seed=w) / 16, random(8, 256, w, seed=w + 1) / 16) for w in (128, 64)]
    ids = torch.randint(17, (37, 4), generator=torch.Generator().manual_seed(0)).to(CUDA)  # 16 adds nothing
    x, weights = random(37, 256), torch.rand(37, 4, device=CUDA)
    wide = [ExpertWeights(p.gate_up_EWD.float(), p.down_EDW.float()) for p in pools]
    exact = TorchOps().experts(x.float(), wide, ids, weights)
    ops = CudaOps(attend, fused)
    ops.experts(x, pools, ids, weights)  # compiles
    with nothing_waits():
        got = ops.experts(x, pools, ids, weights)
    torch.testing.assert_close(got.float(), exact, atol=2e-2, rtol=3e-2)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    config = tiny.tiny_config()
    decoder = build_decoder(config, "mixed", dtype=torch.bfloat16, device=CUDA)
    assert isinstance(decoder.ops, CudaOps)
    plain = tiny.tiny_decoder().state_dict()
    with torch.inference_mode():
        for name, p in decoder.named_parameters():
            p.copy_(plain[name])
    return decoder


def cache(decoder: Decoder, num_blocks: int) -> KVCache:
    text = decoder.config
    shape = (text.num_layers, num_blocks, PAGE_TOKENS, text.num_kv_heads, text.head_dim)
    return KVCache.allocate(*shape, torch.bfloat16, CUDA)


@torch.inference_mode()
def test_no_step_waits(decoder: Decoder) -> None:
    kv = cache(decoder, 9)
    for parts in ([(1, 300), (1, 2)], [(1, 301), (40, 42)]):
        decoder(step_of(parts, 2), kv)
        with nothing_waits():
            decoder(step_of(parts, 2), kv)


def test_a_step_goes_over_from_pinned_memory() -> None:
    step = step_of([(1, 300), (1, 2)], 2)
    assert step.memory.host.is_pinned()
    assert step.memory.device.device == CUDA
    assert step.seq_lens_B.tolist() == [300, 2]


def test_graphs_say_what_eager_steps_say(decoder: Decoder) -> None:
    """The same padded steps, so the same kernels: token for token."""
    said = []
    for is_graphed in (False, True):
        kv = cache(decoder, 64)
        graphs = GraphedDecoder(decoder, kv, DecodeBuckets((1, 2, 4), width=4), CudaRecorder())
        runner = Runner(decoder, kv, Crew(), graphs)
        outcomes = tiny.Outcomes()
        settings = replace(tiny.make_worker()[0].settings, block_size=PAGE_TOKENS)
        worker = Worker(runner, tiny.tiny_config(), settings, outcomes, tiny.tiny_compiler)
        worker.warm_up()
        if not is_graphed:
            graphs._is_bucket = lambda shape: False  # type: ignore[method-assign]
        prompts = [[5, 6, 7], [8] * 300, [9, 10], [11] * 40]
        requests = [tiny.make_request(p, f"r{i}", max_tokens=6 + 3 * i) for i, p in enumerate(prompts)]
        tiny.run_mixed(worker, requests)
        outcomes.drain()
        said.append(outcomes.tokens)
    assert said[0] == said[1]


def test_the_engine_takes_the_kernels_of_a_gpu(decoder: Decoder) -> None:
    attend: PagedAttention = decoder.ops.attend  # type: ignore[attr-defined]
    assert isinstance(attend, FlashAttention)
    runner = Runner.around(decoder, num_blocks=9, block_size=PAGE_TOKENS, max_graphed=8)
    assert runner.buckets is not None
    assert runner.buckets.sizes == (1, 2, 4, 8)


def test_blocks_go_to_pinned_memory_and_come_back_without_waiting() -> None:
    kv = random(3, 2, 6, 16, KV_HEADS, DIM)
    before, memory = kv.clone(), HostMemory(kv, 4)
    assert memory._slots.is_pinned()
    with nothing_waits():
        memory.offload([(3, 5), (1, 2)])
        kv.zero_()  # as the next step would, on the same stream
        memory.restore([(1, 4), (3, 2)])
    assert torch.equal(kv[:, :, [4, 2]], before[:, :, [2, 5]])
    assert not kv[:, :, [0, 1, 3, 5]].any()

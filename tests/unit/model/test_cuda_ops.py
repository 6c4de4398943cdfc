"""The GPU's calls on CPU tensors: the same numbers as plain torch, and no question to the device."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ernie_cluster.config.quantization import METHODS, Method
from ernie_cluster.errors import ConfigError
from ernie_cluster.model import flash
from ernie_cluster.model.build import choose_ops
from ernie_cluster.model.cuda_ops import CudaOps, choose_fuse, fused, plainly
from ernie_cluster.model.flash import FlashAttention, UnpackedAttention, splits_are_right
from ernie_cluster.model.kv_pages import PAGES, PLAIN_PAGES
from ernie_cluster.model.ops import ExpertWeights, TorchOps
from ernie_cluster.model.packing import make_step
from ernie_cluster.model.quant import Codec
from ernie_cluster.model.step import StepInput
from ernie_cluster.model.storage import QuantisedWeight, Storage
from tests import tiny
from tests.varlen import varlen_attn

PLAIN, OPS = TorchOps(), CudaOps(FlashAttention(varlen_attn, page_tokens=4))
BLOCK, HEADS, KV_HEADS, DIM = 4, 4, 2, 16
CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pools(num: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[ExpertWeights]:
    """Four experts each: text experts of width 16, then vision experts of width 8; hidden 32."""
    return [
        ExpertWeights(
            (random(4, 2 * width, 32, seed=width) / 5).to(device, dtype),
            (random(4, 32, width, seed=width) / 3).to(device, dtype),
        )
        for width in (16, 8)[:num]
    ]


@settings(max_examples=25)
@given(st.lists(st.sampled_from(["text", "vision", "elsewhere", "mixed"]), max_size=20), st.integers(0, 1000))
def test_experts_equal_one_product_per_expert(kinds: list[str], seed: int) -> None:
    """For any mix of the two modalities and of experts that are on other ranks, none and all included."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.empty(len(kinds), 2, dtype=torch.long)
    for row, kind in zip(ids, kinds, strict=True):
        chosen = torch.randperm(4, generator=generator)[:2] + 4 * (kind == "vision")
        row.copy_(torch.full((2,), 8) if kind == "elsewhere" else chosen)
        if kind == "mixed":
            row[0] = 8
    x, weights = random(len(kinds), 32, seed=seed), torch.rand(len(kinds), 2, generator=generator)
    got, expected = (ops.experts(x, pools(2), ids, weights) for ops in (OPS, PLAIN))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("num_tokens", [1, 3, 40], ids=["one", "few", "many"])
def test_quantised_experts_equal_what_they_stand_for(
    method: Method, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a few tokens' experts only those are unpacked, at most one for each place; of many all, once."""
    packed, plain = packed_pools(method)
    unpacked: list[int] = []
    exact = Codec.dequantise

    def counted(self: Codec, codes: Tensor, *rest: Any) -> Tensor:
        unpacked.append(len(codes))
        return exact(self, codes, *rest)

    monkeypatch.setattr(Codec, "dequantise", counted)
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(num_tokens)])
    ids[ids == 7] = 16  # on another rank
    x, weights = random(num_tokens, 128, seed=5), torch.rand(num_tokens, 2, generator=generator)
    got = OPS.experts(x, packed, ids, weights)
    assert set(unpacked) == {min(ids.numel(), 8)}
    torch.testing.assert_close(got, PLAIN.experts(x, plain, ids, weights), atol=1e-5, rtol=1e-5)


def packed_pools(method: Method) -> tuple[list[ExpertWeights], list[ExpertWeights]]:
    """Two pools of eight experts, as codes, and as the numbers that these stand for."""
    storage, seeds = Storage(torch.float32, method), itertools.count()
    packed, plain = [], []
    for _ in range(2):
        weights = [storage.expert(8, 256, 128), storage.expert(8, 128, 128)]
        for weight in weights:
            assert isinstance(weight, QuantisedWeight)
            weight.fill(lambda r, c: random(r, c, seed=next(seeds)) / 5)
        packed.append(ExpertWeights(*weights))
        plain.append(ExpertWeights(*(weight[...] for weight in weights)))
    return packed, plain


def test_undefined_rows_do_not_reach_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grouped product leaves the rows behind its last group as they were: anything, not-a-number included."""
    exact = torch.nn.functional.grouped_mm

    def careless(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
        return exact(a, b, offs=offs).masked_fill(torch.arange(len(a))[:, None] >= offs[-1], torch.nan)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", careless)
    ids, x, weights = torch.tensor([[0, 8], [4, 5], [8, 8]]), random(3, 32), torch.rand(3, 2)
    torch.testing.assert_close(
        OPS.experts(x, pools(2), ids, weights), PLAIN.experts(x, pools(2), ids, weights), atol=1e-5, rtol=1e-5
    )


def test_a_device_without_data_can_run_experts() -> None:
    """On the meta device there is nothing to ask: every shape follows from the number of tokens."""
    x = torch.empty(6, 32, device="meta", dtype=torch.bfloat16)
    ids, weights = torch.zeros(6, 2, device="meta", dtype=torch.long), torch.empty(6, 2, device="meta")
    assert OPS.experts(x, pools(2, "meta", torch.bfloat16), ids, weights).shape == (6, 32)
    with pytest.raises((NotImplementedError, RuntimeError)):  # the CPU form does ask
        PLAIN.experts(x, pools(2, "meta", torch.bfloat16), ids, weights)


CALLS: dict[str, Callable[[TorchOps], Any]] = {
    "rms_norm": lambda ops: ops.rms_norm(random(5, 32), random(32, seed=1), 1e-5),
    "add_rms_norm": lambda ops: ops.add_rms_norm(random(5, 32), random(5, 32, seed=1), random(32, seed=2), 1e-5),
    "gated_mlp": lambda ops: ops.gated_mlp(random(5, 32), random(24, 32, seed=1), random(32, 12, seed=2)),
    "route": lambda ops: tuple(
        x.sort(-1).values for x in ops.route(random(5, 32), random(8, 32, seed=1), random(8, seed=2) / 9, 3, 1e-12)
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_small_operations_equal_plain_torch(name: str) -> None:
    torch.testing.assert_close(CALLS[name](OPS), CALLS[name](PLAIN))


def step_of(query_lens: list[int], context_lens: list[int], seed: int = 0) -> StepInput:
    """Decodes first; block tables name pages in any order, and are padded with page 0."""
    rng = np.random.default_rng(seed)
    widest = max(-(-n // BLOCK) for n in context_lens)
    ids = rng.permutation(len(context_lens) * widest) + 1
    tables = np.zeros((len(context_lens), widest), np.int32)
    slots: list[int] = []
    for i, (query, context) in enumerate(zip(query_lens, context_lens, strict=True)):
        used = -(-context // BLOCK)
        tables[i, :used] = ids[i * widest : i * widest + used]
        slots += [int(tables[i, p // BLOCK]) * BLOCK + p % BLOCK for p in range(context - query, context)]
    return make_step(
        token_ids=np.zeros(sum(query_lens)),
        positions=0,
        slots=slots,
        block_tables=tables,
        query_lens=query_lens,
        context_lens=context_lens,
        num_decode=query_lens.count(1),
        logits_rows=[],
        device=CPU,
    )


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(1, 14), max_size=3),
    st.lists(st.tuples(st.integers(2, 5), st.integers(0, 8)), max_size=2),
    st.integers(0, 99),
)
def test_rope_and_attention_equal_plain_torch(decodes: list[int], chunks: list[tuple[int, int]], seed: int) -> None:
    """Decodes, prompts, later chunks of prompts, and any mix of them in one call."""
    queries, contexts = [1] * len(decodes) + [q for q, _ in chunks], decodes + [q + before for q, before in chunks]
    if not queries:
        return
    step = step_of(queries, contexts, seed)
    num_pages = int(step.block_tables_BM.max()) + 1
    qkv, angle = random(sum(queries), (HEADS + 2 * KV_HEADS) * DIM), random(sum(queries), DIM // 2, seed=1)
    results = []
    for ops in (OPS, PLAIN):
        pages = (random(num_pages, BLOCK, KV_HEADS, DIM, seed=2), random(num_pages, BLOCK, KV_HEADS, DIM, seed=3))
        q = ops.rotate_and_store(qkv, angle.cos(), angle.sin(), step.slots_T, pages, HEADS)
        results.append((q, *pages, ops.attention(q, pages, step)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", PAGES)
def test_pages_of_8_bits_are_unpacked_for_the_kernel(kind: str) -> None:
    pages_format = PAGES[kind]
    flash = FlashAttention(varlen_attn, page_tokens=4)
    ops = CudaOps(UnpackedAttention(flash, pages_format), pages=pages_format)
    step = step_of([1, 1, 3], [3, 9, 7])
    num_pages = int(step.block_tables_BM.max()) + 1
    qkv, angle = random(5, (HEADS + 2 * KV_HEADS) * DIM), random(5, DIM // 2, seed=1)
    row, dtype = pages_format.row(DIM, torch.float32)
    results = []
    for kernels in (ops, TorchOps(pages_format)):
        pages = (
            torch.zeros(num_pages, BLOCK, KV_HEADS, row, dtype=dtype),
            torch.zeros(num_pages, BLOCK, KV_HEADS, row, dtype=dtype),
        )
        q = kernels.rotate_and_store(qkv, angle.cos(), angle.sin(), step.slots_T, pages, HEADS)
        results.append((q, *pages, kernels.attention(q, pages, step)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
    with pytest.raises(ConfigError):
        ops.check_block_size(3)


def test_only_decoding_reads_keys_once_per_group_and_may_split_them() -> None:
    seen: list[dict[str, Any]] = []

    def kernel(*args: Any, **options: Any) -> Tensor:
        seen.append({"key_starts": args[4], "max_k": args[6], **options})
        return torch.empty_like(args[0])

    attend = FlashAttention(kernel, splits=1, decode_splits=None)
    pages = (random(9, BLOCK, KV_HEADS, DIM), random(9, BLOCK, KV_HEADS, DIM))
    for queries, contexts in (([1, 1], [3, 9]), ([1, 4], [3, 9])):
        attend(random(sum(queries), HEADS, DIM), pages, step_of(queries, contexts))
    assert [s["window_size"] for s in seen] == [(-1, -1), (-1, 0)]
    assert [s["num_splits"] for s in seen] == [None, 1]
    assert [s["max_k"] for s in seen] == [3 * BLOCK] * 2, "a bound from shapes alone"
    assert seen[0]["key_starts"].tolist() == [0, 3, 12]
    FlashAttention(kernel, has_key_starts=False)(random(2, HEADS, DIM), pages, step_of([1, 1], [3, 9]))
    assert seen[-1]["key_starts"] is None


def test_a_kernel_that_leaves_rows_out_when_it_splits_is_found_out() -> None:
    def right(q: Tensor, *_: Any, **options: Any) -> Tensor:
        return q

    def wrong(q: Tensor, *_: Any, num_splits: int | None, **options: Any) -> Tensor:
        return q if num_splits else torch.cat([q[:1], torch.full_like(q[1:], torch.nan)])

    with torch.device("meta"):  # models are built where their device is the default
        assert splits_are_right(right, CPU)
    assert not splits_are_right(wrong, CPU)


def test_block_sizes_that_the_kernel_cannot_take_are_refused() -> None:
    CudaOps(FlashAttention(varlen_attn)).check_block_size(512)
    PLAIN.check_block_size(16)
    with pytest.raises(ConfigError, match=r"block_size = 16: .* multiple of 256; set engine.block_size to 256"):
        CudaOps(FlashAttention(varlen_attn)).check_block_size(16)


def test_no_tokens_are_no_trouble() -> None:
    step = make_step(
        token_ids=[], positions=np.zeros((3, 0)), slots=[], block_tables=np.zeros((0, 0)), query_lens=[],
        context_lens=[], num_decode=0, logits_rows=[], device=CPU,
    )  # fmt: skip
    pages = (random(2, BLOCK, KV_HEADS, DIM), random(2, BLOCK, KV_HEADS, DIM))
    assert OPS.attention(torch.empty(0, HEADS, DIM), pages, step).shape == (0, HEADS * DIM)


def test_without_a_compiler_nothing_is_fused(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert choose_fuse() is plainly
    assert "has not a C compiler: install gcc, or name one in CC" in caplog.text
    monkeypatch.setenv("CC", "/usr/bin/cc")
    assert choose_fuse() is fused
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose_fuse() is plainly


def test_fused_functions_are_traced_whole_and_once_for_all_sizes() -> None:
    """What the compiler sees has no break, and a third number of tokens nothing new. Traced, not compiled."""
    seen: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        seen.append(graph)
        return graph.forward

    def traced(function: Callable[..., Any], /) -> Callable[..., Any]:
        return torch.compile(function, backend=keep, fullgraph=True)

    ops, weights, counts = CudaOps(FlashAttention(varlen_attn), traced), pools(1), []
    for num_tokens in (6, 4, 5):
        ids, x, shares = torch.arange(2 * num_tokens).view(-1, 2) % 5, random(num_tokens, 32), torch.rand(num_tokens, 2)
        torch.testing.assert_close(ops.experts(x, weights, ids, shares), PLAIN.experts(x, weights, ids, shares))
        counts.append(len(seen))
    assert counts == [2, 4, 4], "gate and combine: for one size, then for all"


@pytest.mark.parametrize("has_fa3", [False, True], ids=["torch's own", "FlashAttention 3"])
def test_what_a_gpu_gets(has_fa3: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hopper GPU, as far as the choice can see."""
    active: list[str] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", active.append)
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: active[0] if active else None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if has_fa3 else None)
    monkeypatch.setattr(flash, "splits_are_right", lambda kernel, device: True)
    config, cuda = tiny.tiny_config(), torch.device("cuda", 0)
    ops = choose_ops(config, Storage(torch.bfloat16), PLAIN_PAGES, cuda)
    assert isinstance(ops, CudaOps)
    assert active == (["FA3"] if has_fa3 else [])
    if has_fa3:
        ops.check_block_size(16)
    else:
        with pytest.raises(ConfigError, match="block_size = 16"):
            ops.check_block_size(16)
    assert type(choose_ops(config, Storage(torch.float32), PLAIN_PAGES, cuda)) is TorchOps

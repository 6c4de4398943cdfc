"""Decode and prefill of one decoder, as shares of what the measured bounds allow."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ernie_cluster.config.model import ModelConfig
from ernie_cluster.engine.buckets import DecodeBuckets
from ernie_cluster.engine.crew import Crew
from ernie_cluster.engine.graphs import CudaRecorder, GraphedDecoder
from ernie_cluster.engine.runner import Runner
from ernie_cluster.model.step import KVCache
from gpu_parts import models
from gpu_parts.bounds import Bounds, seconds_of
from gpu_parts.report import Row

_DECODE_GOAL = {1: 0.60}
_PREFILL_GOAL = {8192: 0.45}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured."""

    config: ModelConfig
    batches: tuple[int, ...]
    context: int
    """Tokens of each decoding sequence."""
    prompts: tuple[int, ...]
    chunk: int
    """Most tokens of a prompt in one step."""
    repeats: int
    block_size: int
    dtype: torch.dtype
    device: torch.device


def decode(plan: Plan, bounds: Bounds) -> Iterator[Row]:
    """Rows for each batch; gives the memory back."""
    yield from _decode(plan, bounds)
    _forget(plan.device)


def prefill(plan: Plan, bounds: Bounds) -> Iterator[Row]:
    """A row for each prompt; gives the memory back."""
    yield from _prefill(plan, bounds)
    _forget(plan.device)


def _decode(plan: Plan, bounds: Bounds) -> Iterator[Row]:
    """Whole steps as an engine takes them: numbers to the device, decoder, greedy tokens back on the host."""
    text, itemsize = plan.config.text, plan.dtype.itemsize
    decoder = models.random_decoder(plan.config, "decode", plan.dtype, plan.device)
    width = -(-plan.context // plan.block_size)
    kv = KVCache.allocate(
        text.num_layers, max(plan.batches) * width + 1, plan.block_size, text.num_kv_heads, text.head_dim,
        plan.dtype, plan.device,
    )  # fmt: skip
    runners = {"eager": Runner(decoder, kv)}
    if plan.device.type == "cuda":
        graphs = GraphedDecoder(decoder, kv, DecodeBuckets(plan.batches, width), CudaRecorder())
        runners["graphs"] = Runner(decoder, kv, Crew(), graphs)
    for batch in plan.batches:

        def run(runner: Runner, batch: int = batch) -> None:
            parts = [(1, plan.context)] * batch
            step = models.step_of(parts, plan.block_size, plan.device, vocab_size=text.vocab_size, width=width)
            runner.run(step, [models.GREEDY] * batch)

        hits = models.experts_hit(decoder, lambda run=run: run(runners["eager"]))  # type: ignore[misc]
        num_bytes = models.fixed_bytes(decoder) + hits * models.expert_bytes(text, itemsize)
        num_bytes += models.kv_bytes(text, batch * plan.context, itemsize)
        for name, runner in runners.items():
            seconds = seconds_of(lambda run=run, runner=runner: run(runner), plan.device, plan.repeats, warm_ups=5)  # type: ignore[misc]
            yield Row(
                f"decode, batch {batch}, context {plan.context:,}, {name}",
                f"{seconds * 1e3:.2f} ms, {batch / seconds:,.0f} tokens/s",
                num_bytes / bounds.read_bytes / seconds,
                _DECODE_GOAL.get(batch) if name == "graphs" else None,
                f"{num_bytes / 1e9:.1f} GB",
            )


def _prefill(plan: Plan, bounds: Bounds) -> Iterator[Row]:
    """A lone prompt in chunks, first token included, on a replica that has vision experts as well."""
    text = plan.config.text
    decoder = models.random_decoder(plan.config, "prefill", plan.dtype, plan.device)
    longest = max(plan.prompts)
    num_blocks = -(-longest // plan.block_size) + 1
    kv = KVCache.allocate(
        text.num_layers, num_blocks, plan.block_size, text.num_kv_heads, text.head_dim, plan.dtype, plan.device
    )
    runner = Runner(decoder, kv)
    for tokens in plan.prompts:

        def run(tokens: int = tokens) -> None:
            for start in range(0, tokens, plan.chunk):
                end = min(start + plan.chunk, tokens)
                step = models.step_of(
                    [(end - start, end)], plan.block_size, plan.device, vocab_size=text.vocab_size, seed=start
                )
                runner.run(step, [models.GREEDY])

        seconds = seconds_of(run, plan.device, max(3, plan.repeats // 10), warm_ups=3)
        flops = models.prefill_flops(decoder, tokens)
        yield Row(
            f"prefill of {tokens:,} tokens, chunks of {min(plan.chunk, tokens):,}",
            f"{seconds * 1e3:.1f} ms, {tokens / seconds:,.0f} tokens/s",
            flops / bounds.flops / seconds,
            _PREFILL_GOAL.get(tokens),
            f"{flops / 1e12:.3g} TFLOP",
        )


def _forget(device: torch.device) -> None:
    """The next model needs the memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

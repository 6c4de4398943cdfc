"""Decode steps as CUDA graphs: recorded once for each size, then started by one call instead of hundreds.

A graph reads and writes the memory that it was recorded with. So a step is copied over the recorded one's numbers, in
one piece, and the logits come out where they came out before. Prompts, and batches too large, run as they always did.

Ranks of a tensor-parallel group record the same sizes at the same steps, sums between ranks included: which steps are
graphs follows from the steps' shapes alone, and those are announced to all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ernie_cluster.engine.buckets import DecodeBuckets
from ernie_cluster.model.decoder import Decoder, no_hook
from ernie_cluster.model.group import Place
from ernie_cluster.model.packing import open_step
from ernie_cluster.model.step import KVCache, StepInput, StepMemory, StepShape

log = logging.getLogger(__name__)

_WARM_UPS = 2
"""Runs before one is recorded: compilers, libraries and communicators set themselves up in the first ones."""

Run = Callable[[], Tensor]


class Recorder(Protocol):
    """Records what a function does on a device."""

    def __call__(self, run: Run) -> tuple[Callable[[], None], Tensor]:
        """(starts the same work again, the function's result, which that overwrites)."""


class CudaRecorder:
    """Graphs that share one pool of memory, as only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()
        # other threads move KV meanwhile: what they do is not part of the graph, and no reason to give it up
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = run()
        return graph.replay, out


@dataclass(frozen=True, slots=True, eq=False)
class _Graph:
    numbers: Tensor
    """uint8 [n] on the device: the step that is run."""
    start: Callable[[], None]
    logits: Tensor


class GraphedDecoder:
    """Called like the `Decoder` around which it is made.

    Args:
        decoder: loaded and connected.
        kv: the only cache that it is called with.
        buckets: sizes of the decode steps that are recorded, each when it first comes; the builder of steps has the same.
        record: how.
    """

    def __init__(self, decoder: Decoder, kv: KVCache, buckets: DecodeBuckets, record: Recorder) -> None:
        self._decoder, self._kv, self.buckets, self._record = decoder, kv, buckets, record
        self._graphs: dict[int, _Graph] = {}

    def __call__(self, step: StepInput, kv: KVCache, layer_done: Callable[[int], None] = no_hook) -> Tensor:
        """See `Decoder.forward`. A graph's logits are overwritten by the next step of its size."""
        assert kv is self._kv, "graphs know one cache"
        shape = step.memory.shape
        if not self._is_bucket(shape):
            return self._decoder.forward(step, kv, layer_done)
        graph = self._graphs.get(shape.num_sequences)
        if graph is None:
            graph = self._graphs[shape.num_sequences] = self._make(step.memory)
        graph.numbers.copy_(step.memory.device, non_blocking=True)
        graph.start()
        for layer in range(self._decoder.config.num_layers):
            layer_done(layer)
        return graph.logits

    def _is_bucket(self, shape: StepShape) -> bool:
        return shape.is_decode and shape.num_sequences in self.buckets.sizes and shape.width == self.buckets.width

    def _make(self, memory: StepMemory) -> _Graph:
        """Running a step again writes the same K and V to the same places, so the first one can be tried out."""
        numbers = memory.device.clone()
        step = open_step(StepMemory(memory.shape, memory.host, numbers))

        def run() -> Tensor:
            return self._decoder.forward(step, self._kv)

        for _ in range(_WARM_UPS):
            run()
        start, logits = self._record(run)
        return _Graph(numbers, start, logits)


def choose_graphs(decoder: Decoder, kv: KVCache, place: Place, max_num_seqs: int) -> GraphedDecoder | None:
    """Graphs for decode steps of up to `max_num_seqs` sequences; None, and a line in the log, where there can be none."""
    device = decoder.embed.device
    if device.type != "cuda" or not max_num_seqs:
        return None
    if decoder.embed.dtype != torch.bfloat16:
        log.info("no CUDA graphs: weights are %s, and the kernels without questions to the host are for bfloat16",
                 decoder.embed.dtype)  # fmt: skip
        return None
    if place.shard.dims.dp > 1:
        log.info("no CUDA graphs: with dp = %d as many rows go to each rank as there happen to be", place.shard.dims.dp)
        return None
    num_blocks, block_size = kv.data.shape[2:4]
    width = min(num_blocks - 1, -(-decoder.config.max_position_embeddings // block_size))
    return GraphedDecoder(decoder, kv, DecodeBuckets.up_to(max_num_seqs, width), CudaRecorder())

"""Owns the weights and the KV tensors of one rank, and runs one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from ernie_cluster.config.model import ModelConfig
from ernie_cluster.config.quantization import Quantization
from ernie_cluster.engine.balance import Balancer, Rule
from ernie_cluster.engine.buckets import DecodeBuckets
from ernie_cluster.engine.crew import Command, Crew, empty_step, hear, receive
from ernie_cluster.engine.graphs import GraphedDecoder, choose_graphs
from ernie_cluster.engine.sampler import Sampled, SamplerRow, sample_and_report
from ernie_cluster.engine.shared_kv import share_kv
from ernie_cluster.errors import EngineFailed
from ernie_cluster.model.build import Role, build_decoder, has_vision_experts, torch_dtype
from ernie_cluster.model.checkpoint import Checkpoint
from ernie_cluster.model.decoder import Decoder, no_hook
from ernie_cluster.model.fill import no_progress
from ernie_cluster.model.group import ALONE, Group, Place
from ernie_cluster.model.step import KVCache, StepInput
from ernie_cluster.model.weights import load_decoder
from ernie_cluster.transport.base import Message


def _nothing(notes: list[Message]) -> Callable[[int], None]:
    return no_hook


@dataclass(frozen=True, slots=True, eq=False)
class Runner:
    """Decoder and KV cache of one rank, and what the others must know of each step."""

    decoder: Decoder
    kv: KVCache
    crew: Crew = field(default_factory=Crew)
    graphs: GraphedDecoder | None = None
    """Runs the decoder where it can; None: it runs by itself."""
    rejects_nan: bool = False
    """Stop at logits that are not numbers, as they are when KV was read that nobody held, see `poison`."""

    @classmethod
    def load(
        cls,
        folder: str,
        config: ModelConfig,
        role: Role,
        *,
        dtype: str,
        device: torch.device,
        num_blocks: int,
        block_size: int,
        place: Place = ALONE,
        quantization: Quantization | Literal["auto"] = "auto",
        kv_dtype: str = "auto",
        shares_kv: bool = True,
        rule: Rule | None = None,
        max_graphed: int = 0,
        progress: Callable[[int, int], None] = no_progress,
    ) -> Runner:
        """A rank's weights from a checkpoint folder, and an empty cache; raises CheckpointError and ConfigError.

        `rule` says when experts move between the ranks of a gang, `progress(bytes done, bytes in all)` is called as weights
        are read. See `around` for the rest.
        """
        decoder = build_decoder(
            config,
            role,
            dtype=torch_dtype(dtype),
            device=device,
            shard=place.shard,
            quantization=quantization,
            kv_dtype=kv_dtype,
        )
        with Checkpoint(folder) as checkpoint:
            has_vision = has_vision_experts(config, role)
            load_decoder(decoder, config, checkpoint, has_vision_experts=has_vision, progress=progress)
        decoder.connect(place)
        return cls.around(
            decoder,
            num_blocks=num_blocks,
            block_size=block_size,
            place=place,
            shares_kv=shares_kv,
            rule=rule,
            max_graphed=max_graphed,
        )

    @classmethod
    def around(
        cls,
        decoder: Decoder,
        *,
        num_blocks: int,
        block_size: int,
        place: Place = ALONE,
        shares_kv: bool = True,
        rule: Rule | None = None,
        max_graphed: int = 0,
    ) -> Runner:
        """A loaded decoder and an empty cache on its device, of the type that its kernels know.

        `shares_kv`: tensor-parallel ranks on the CPU of one host have one cache with all heads; else each has its own,
        with the heads that it computes on, as on GPUs. There decode steps of up to `max_graphed` sequences become CUDA
        graphs.

        Raises:
            ConfigError: the decoder's attention cannot take blocks of this size.
        """
        decoder.ops.check_block_size(block_size)
        c, weight = decoder.config, decoder.embed
        row, dtype = decoder.ops.pages.row(c.head_dim, weight.dtype)
        crew = Crew(place, balancer=Balancer(decoder, place, rule))
        if place.tp.size > 1 and weight.device.type == "cpu" and shares_kv:
            shape = (c.num_layers, 2, num_blocks, block_size, c.num_kv_heads, row)
            return cls(decoder, share_kv(place, shape, dtype), crew)
        num_kv_heads = len(decoder.shard.kv_heads(c.num_kv_heads))
        kv = KVCache.allocate(c.num_layers, num_blocks, block_size, num_kv_heads, row, dtype, weight.device)
        return cls(decoder, kv, crew, choose_graphs(decoder, kv, place, max_graphed))

    @property
    def buckets(self) -> DecodeBuckets | None:
        """Sizes to which decode steps must be padded to be run as graphs."""
        return None if self.graphs is None else self.graphs.buckets

    @property
    def device(self) -> torch.device:
        return self.decoder.embed.device

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, embeddings of pictures among them."""
        return self.decoder.embed.dtype

    @torch.inference_mode()
    def run(self, step: StepInput, rows: Sequence[SamplerRow], layer_done: Callable[[int], None] = no_hook) -> Sampled:
        """One token per row of logits; K and V of all its tokens are in the cache afterwards.

        Raises:
            GangBroken: another rank is gone.
        """
        self.crew.open(step)
        logits = self._forward(step, layer_done)
        return sample_and_report(logits[: len(rows)], rows)  # rows of padding are last

    @torch.inference_mode()
    def rest(self) -> bool:
        """Nothing to run here; True if other leaders have work, with which this call has helped."""
        if not self.crew.rest():
            return False
        step = empty_step(self.device)
        self.crew.join(step)
        self._forward(step)
        return True

    @torch.inference_mode()
    def follow(self, tp: Group, noted: Callable[[list[Message]], Callable[[int], None]] = _nothing) -> None:
        """Run what the leader of a tensor-parallel group announces, until it says stop; raises GangBroken.

        `noted` is told what the leader notes, and gives what is to be called after each layer of the step that comes next.
        """
        layer_done: Callable[[int], None] = no_hook
        while True:
            command, step = receive(tp, self.decoder.embed)
            if command is Command.STOP:
                return
            if command is Command.MOVE:
                assert self.crew.balancer is not None
                self.crew.balancer.follow(tp)
            if command is Command.NOTES:
                layer_done = noted(hear(tp))
            if step is not None:
                self._forward(step, layer_done)
                layer_done = no_hook

    def _forward(self, step: StepInput, layer_done: Callable[[int], None] = no_hook) -> torch.Tensor:
        logits = (self.graphs or self.decoder)(step, self.kv, layer_done)
        if self.rejects_nan and logits.isnan().any():
            raise EngineFailed("logits are NaN: a sequence has read KV of a block that nobody held")
        return logits

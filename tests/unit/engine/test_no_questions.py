"""Proof without a GPU that a decode step asks the device nothing and that its shapes follow from its size alone.

The decoder runs on a device without numbers (meta), and `Watch` sees every operation: it refuses what needs a number of
the device or whose shape would depend on one, and copies between devices, which wait; and it keeps the shapes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ernie_cluster.config.model import TextConfig
from ernie_cluster.config.parallel import ParallelDims, Shard
from ernie_cluster.config.quantization import METHODS, Method
from ernie_cluster.engine.batch import BatchBuilder
from ernie_cluster.engine.buckets import DecodeBuckets
from ernie_cluster.engine.scheduler import Schedule
from ernie_cluster.engine.sequence import Sequence
from ernie_cluster.model.cuda_ops import CudaOps
from ernie_cluster.model.decoder import Decoder
from ernie_cluster.model.flash import PAGE_TOKENS, FlashAttention, UnpackedAttention
from ernie_cluster.model.group import ALONE, Alone, Place
from ernie_cluster.model.kv_pages import PAGES
from ernie_cluster.model.ops import TorchOps
from ernie_cluster.model.packing import open_step
from ernie_cluster.model.rope import TextRope
from ernie_cluster.model.step import KVCache, StepInput, StepMemory
from ernie_cluster.model.storage import Storage
from tests import tiny

DEVICE = torch.device("meta")
BUCKETS = DecodeBuckets((1, 4, 8), width=3)
QUESTIONS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Asked(Exception):
    """The host would wait for the device."""


class Watch(TorchDispatchMode):
    """Keeps each operation's name and the shapes of its results; raises `Asked`."""

    def __init__(self) -> None:
        super().__init__()
        self.trace: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        by_numbers = func == torch.ops.aten.index.Tensor  # is a question only if it picks by truth
        if QUESTIONS & set(func.tags) and not (by_numbers and all(t.dtype != torch.bool for t in given[1:])):
            raise Asked(f"{func} needs numbers of the device")
        target = (kwargs or {}).get("device")
        if target is not None and any(t.device != target for t in given):
            raise Asked(f"{func} copies to {target}")
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if len({t.device for t in [*given, *made]}) > 1:
            raise Asked(f"{func} copies between devices")
        self.trace.append((str(func), [tuple(t.shape) for t in made]))
        return out


class Peer(Alone):
    """The other rank's share is already in."""

    size = 2


def place_of(tp: int) -> Place:
    return ALONE if tp == 1 else Place(Shard(ParallelDims(tp, 1), 0), tp=Peer(), ep=Peer())


def make(
    text: TextConfig, ops: TorchOps, *, has_vision_experts: bool, place: Place = ALONE, method: Method | None = None
) -> Decoder:
    storage = Storage(torch.bfloat16, method)
    decoder = Decoder(text, has_vision_experts=has_vision_experts, storage=storage, ops=ops, shard=place.shard)
    decoder.connect(place)
    return decoder


def cuda_ops() -> CudaOps:
    return CudaOps(FlashAttention(varlen_attn))


def host_step(lens: list[int], chunk: int = 0) -> StepInput:
    """A step of sequences that decode, one of each length, padded; or, with a chunk of a prompt behind them."""
    sequences = []
    for n in [*lens, *([chunk] if chunk else [])]:
        sequence = Sequence(tiny.make_request(list(range(5, 5 + n))), [], blocks=[1] * -(-(n + 1) // PAGE_TOKENS))
        sequence.num_computed = 0 if chunk and len(sequences) == len(lens) else n - 1
        sequences.append(sequence)
    schedule = Schedule(decodes=sequences[: len(lens)], chunks=[(s, chunk) for s in sequences[len(lens) :]])
    return BatchBuilder(PAGE_TOKENS, frozenset(), tiny.CPU, BUCKETS).build(schedule)


def device_without_numbers(
    ops: TorchOps, *, has_vision_experts: bool = False, tp: int = 1, method: Method | None = None
) -> Callable[[StepInput], Watch]:
    """Runs steps there, each with a new watch."""
    text, place = tiny.tiny_config().text, place_of(tp)
    with DEVICE:
        decoder = make(text, ops, has_vision_experts=has_vision_experts, place=place, method=method)
    heads, (row, dtype) = text.num_kv_heads // tp, ops.pages.row(text.head_dim, torch.bfloat16)
    kv = KVCache.allocate(text.num_layers, 8, PAGE_TOKENS, heads, row, dtype, DEVICE)

    decoder._rope = TextRope(text.head_dim, text.rope_theta, text.mrope_section, DEVICE)  # the first run would make it

    def run(step: StepInput) -> Watch:
        device = torch.empty(len(step.memory.host), dtype=torch.uint8, device=DEVICE)
        there = open_step(StepMemory(step.memory.shape, step.memory.host, device))
        with Watch() as watch:
            logits = decoder(there, kv)
        assert logits.shape == (step.memory.shape.num_logits, text.vocab_size)
        assert logits.device == DEVICE
        return watch

    return run


@pytest.mark.parametrize("has_vision_experts", [False, True], ids=["decode", "mixed"])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_decode_step_asks_nothing_and_its_size_says_its_shapes(has_vision_experts: bool, tp: int) -> None:
    run = device_without_numbers(cuda_ops(), has_vision_experts=has_vision_experts, tp=tp)
    three, four, eight = (run(host_step(lens)).trace for lens in ([9, 300, 2], [700, 1, 1, 1], [5] * 7))
    assert three == four
    assert len(three) > 50
    assert [name for name, _ in three] == [name for name, _ in eight]
    assert three != eight


@pytest.mark.parametrize(("weights", "kv"), [("wint8", "int8"), ("wint4", "fp8")])
def test_neither_does_one_of_fewer_bits(weights: str, kv: str) -> None:
    pages = PAGES[kv]
    ops = CudaOps(UnpackedAttention(FlashAttention(varlen_attn), pages), pages=pages)
    run = device_without_numbers(ops, method=METHODS[weights])
    three, four = (run(host_step(lens)).trace for lens in ([9, 300, 2], [700, 1, 1, 1]))
    assert three == four


def test_neither_does_a_prompt() -> None:
    run = device_without_numbers(cuda_ops(), has_vision_experts=True)
    run(host_step([9, 300], chunk=40))


class Tolist(CudaOps):
    def route(self, x_TD: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        x_TD[0, 0].tolist()
        return super().route(x_TD, *args)


class ToHost(CudaOps):
    def route(self, x_TD: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        x_TD.to("cpu")
        return super().route(x_TD, *args)


class Masked(CudaOps):
    def rms_norm(self, x_TD: Tensor, *args: Any) -> Tensor:
        return super().rms_norm(x_TD[x_TD[:, 0] > 0], *args)

    def add_rms_norm(self, x_TD: Tensor, residual_TD: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        return super().add_rms_norm(x_TD[x_TD[:, 0] > 0], residual_TD, *args)


class FromHost(CudaOps):
    def route(self, x_TD: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        return super().route(x_TD + torch.tensor([1.0, 2.0]).to(x_TD.device).sum(), *args)


OFFENDERS: dict[str, Callable[[], TorchOps]] = {
    "counts read for a loop over experts": TorchOps,
    **{cls.__name__: lambda cls=cls: cls(FlashAttention(varlen_attn)) for cls in (Tolist, ToHost, Masked, FromHost)},  # type: ignore[misc]
}


@pytest.mark.parametrize("name", OFFENDERS)
def test_the_proof_can_fail(name: str) -> None:
    run = device_without_numbers(OFFENDERS[name]())
    with pytest.raises(Asked):
        run(host_step([9, 300, 2]))


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.nonzero(),
        lambda x: x.long().bincount(),
        lambda x: x.sum().item(),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x[x > 0],
        lambda x: x.unique(),
        lambda x: bool(x.any()),
    ],
    ids=["nonzero", "bincount", "item", "repeat_interleave", "mask", "unique", "if"],
)
def test_questions_are_noticed(ask: Callable[[Tensor], object]) -> None:
    x = torch.ones(4, device=DEVICE)
    with Watch(), pytest.raises(Asked):
        ask(x)


def test_a_padded_step_is_the_same_bytes_but_for_its_numbers() -> None:
    """What a graph is started with: one copy over the memory of the step that was recorded."""
    three, four = host_step([9, 300, 2]), host_step([700, 1, 1, 1])
    assert three.memory.shape == four.memory.shape
    assert dataclasses.astuple(three.memory.shape)[:3] == (4, 4, BUCKETS.width)
    assert three.slots_T.tolist()[3:] == [0]
    assert three.seq_lens_B.tolist()[3:] == [1]
    assert not np.any(three.block_tables_BM.numpy()[3])

"""A gang of ranks says what one rank says."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.config.parallel import ParallelDims
from ernie_cluster.config.quantization import Quantization
from ernie_cluster.engine.crew import Command, Crew, announce, empty_step, hear, receive
from ernie_cluster.engine.runner import Runner
from ernie_cluster.engine.worker import Worker, WorkerSettings
from ernie_cluster.model.build import build_decoder
from ernie_cluster.model.checkpoint import Checkpoint
from ernie_cluster.model.group import ALONE, Place
from ernie_cluster.model.packing import make_step
from ernie_cluster.model.step import KVCache, StepInput
from ernie_cluster.model.weights import load_decoder
from ernie_cluster.transport.base import Message
from tests import tiny
from tests.groups import together

LAYOUTS = [ParallelDims(2, 1), ParallelDims(1, 2), ParallelDims(2, 2), ParallelDims(1, 4)]


def runner(place: Place, kv: KVCache, quantization: Quantization) -> Runner:
    config = tiny.tiny_config()
    decoder = build_decoder(
        config, "mixed", dtype=torch.float32, device=tiny.CPU, shard=place.shard, quantization=quantization
    )
    with Checkpoint(tiny.tiny_folder()) as checkpoint:
        load_decoder(decoder, config, checkpoint, has_vision_experts=True)
    decoder.connect(place)
    heads = place.shard.kv_heads(config.text.num_kv_heads)
    return Runner(decoder, KVCache(kv.data, slice(heads.start, heads.stop)), Crew(place))


def requests(group: int) -> list[list[object]]:
    """Prompts of one data-parallel group; their numbers and lengths differ."""
    prompts: list[list[object]] = [[5, 6, 7, 8, 9, 10, 11], [tiny.make_image(3), 12, 13], [14] * 21]
    return prompts[group:]


def settings_of() -> WorkerSettings:
    return tiny.make_worker()[0].settings


@functools.cache
def wanted(group: int, quantization: Quantization) -> dict[str, list[int]]:
    """What one rank says."""
    outcomes, text = tiny.Outcomes(), tiny.tiny_config().text
    kv = KVCache.allocate(
        text.num_layers, 256, tiny.BLOCK_SIZE, text.num_kv_heads, text.head_dim, torch.float32, tiny.CPU
    )
    worker = Worker(runner(ALONE, kv, quantization), tiny.tiny_config(), settings_of(), outcomes, tiny.tiny_compiler)
    tiny.run_mixed(worker, [tiny.make_request(p, f"{group}.{i}") for i, p in enumerate(requests(group))])  # type: ignore[arg-type]
    outcomes.drain()
    return outcomes.tokens


@pytest.mark.parametrize("quantization", ["none", "wint8", "wint4"])
@pytest.mark.parametrize("dims", LAYOUTS, ids=str)
def test_a_gang_says_what_one_rank_says(dims: ParallelDims, quantization: Quantization) -> None:
    text = tiny.tiny_config().text
    tiny.encode(tiny.make_image(3))  # made once, before the threads
    shape = (text.num_layers, 256, tiny.BLOCK_SIZE, text.num_kv_heads, text.head_dim, torch.float32, tiny.CPU)
    memory = [KVCache.allocate(*shape) for _ in range(dims.dp)]
    groups = [wanted(group, quantization) for group in range(dims.dp)]

    def work(place: Place) -> dict[str, list[int]]:
        group = dims.coordinates(place.shard.rank).dp_rank
        mine = runner(place, memory[group], quantization)
        if place.shard.tp_rank:
            mine.follow(place.tp)
            return {}
        outcomes = tiny.Outcomes()
        worker = Worker(mine, tiny.tiny_config(), settings_of(), outcomes, tiny.tiny_compiler)
        tiny.run_mixed(worker, [tiny.make_request(p, f"{group}.{i}") for i, p in enumerate(requests(group))])  # type: ignore[arg-type]
        while mine.rest():
            pass
        mine.crew.dismiss()
        outcomes.drain()
        return outcomes.tokens

    for rank, got in enumerate(together(work, dims)):
        where = dims.coordinates(rank)
        assert got == ({} if where.tp_rank else groups[where.dp_rank])


@given(st.integers(0, 9), st.integers(0, 3), st.integers(0, 4), st.booleans(), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_followers_get_the_very_step(num_tokens: int, num_rows: int, width: int, has_media: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_embeds = num_tokens // 2 if has_media else 0
    step = make_step(
        token_ids=rng.integers(0, 1000, num_tokens),
        positions=rng.integers(0, 1000, (3, num_tokens)),
        slots=rng.integers(0, 1000, num_tokens),
        is_vision=rng.integers(0, 2, num_tokens),
        block_tables=rng.integers(0, 1000, (num_rows, width)),
        query_lens=rng.integers(0, 1000, num_rows).tolist(),
        context_lens=rng.integers(0, 1000, num_rows).tolist(),
        num_decode=num_rows,
        logits_rows=range(num_rows),
        media_rows=rng.integers(0, 1000, num_embeds).tolist(),
        media_embeds=torch.rand(num_embeds, 6) if has_media else None,
        device=tiny.CPU,
    )

    def work(place: Place) -> list[tuple[Command, StepInput | None]]:
        if place.shard.rank:
            return [receive(place.tp, torch.empty(1, 6)) for _ in range(3)]
        announce(place.tp, Command.BEAT)
        announce(place.tp, Command.STEP, step)
        announce(place.tp, Command.STOP)
        return []

    beat, (command, got), stop = together(work, ParallelDims(2, 1))[1]
    assert (beat, stop, command) == ((Command.BEAT, None), (Command.STOP, None), Command.STEP)
    assert got is not None
    assert not len(got.logits_rows), "a follower's would be for nobody"
    for field in dataclasses.fields(StepInput):
        if field.name in ("memory", "logits_rows"):
            continue
        want, have = getattr(step, field.name), getattr(got, field.name)
        assert torch.equal(want, have) if isinstance(want, torch.Tensor) else want == have, field.name


def test_followers_hear_before_a_step_what_was_noted_for_it() -> None:
    notes: list[Message] = [{"push": ["a", 0, 3, [7, 5]]}, {"drop": ["ä", 1]}]

    def work(place: Place) -> list[object]:
        if place.shard.rank == 0:
            crew = Crew(place)
            for note in notes:
                crew.note(note)
            for _ in range(2):
                crew.open(empty_step(tiny.CPU))
            return []
        embed = torch.empty(1, 1)
        return [receive(place.tp, embed)[0], hear(place.tp), *(receive(place.tp, embed)[0] for _ in range(2))]

    assert together(work, ParallelDims(2, 1))[1] == [Command.NOTES, notes, Command.STEP, Command.STEP]


def test_an_idle_leader_beats() -> None:
    now = [0.0]

    def work(place: Place) -> list[Command]:
        if place.shard.rank:
            return [receive(place.tp, torch.empty(1, 1))[0] for _ in range(2)]
        crew = Crew(place, lambda: now[0])
        assert not crew.rest()
        now[0] = 6.0
        assert not crew.rest()
        crew.dismiss()
        return []

    assert together(work, ParallelDims(2, 1))[1] == [Command.BEAT, Command.STOP]


def test_quantised_weights_say_something_else() -> None:
    """Else the test above would not tell whether they were used."""
    assert len({str(wanted(0, name)) for name in ("none", "wint8", "wint4")}) == 3  # type: ignore[arg-type]

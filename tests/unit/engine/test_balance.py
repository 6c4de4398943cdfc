"""Experts that move under a running gang change no answer, and what is told of their use is so."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.config.experts import EMPTY, ExpertUse, Table, dealt
from ernie_cluster.config.parallel import ParallelDims
from ernie_cluster.engine.balance import Balancer, Rebalance, Rule, hottest_share, imbalance
from ernie_cluster.engine.crew import Crew
from ernie_cluster.engine.runner import Runner
from ernie_cluster.engine.worker import Worker
from ernie_cluster.model.build import build_decoder
from ernie_cluster.model.checkpoint import Checkpoint
from ernie_cluster.model.decoder import Decoder
from ernie_cluster.model.group import Place
from ernie_cluster.model.step import KVCache
from ernie_cluster.model.weights import load_decoder
from ernie_cluster.policy.experts import rebalance
from tests import tiny
from tests.groups import together

LAYOUTS = [ParallelDims(2, 1, 1), ParallelDims(1, 2), ParallelDims(2, 2), ParallelDims(2, 2, 1), ParallelDims(1, 4, 1)]


def decoder(place: Place) -> Decoder:
    """The tiny model's part for a rank; its routers prefer two experts of each modality."""
    config = tiny.tiny_config()
    out = build_decoder(config, "mixed", dtype=torch.float32, device=tiny.CPU, shard=place.shard)
    with Checkpoint(tiny.tiny_folder()) as checkpoint:
        load_decoder(out, config, checkpoint, has_vision_experts=True)
    for mlp in out.sparse:
        mlp.router.bias[:, :2] += 0.5
    out.connect(place)
    return out


def worker(runner: Runner) -> tuple[Worker, tiny.Outcomes]:
    outcomes = tiny.Outcomes()
    return Worker(runner, tiny.tiny_config(), tiny.make_worker()[0].settings, outcomes, tiny.tiny_compiler), outcomes


def answers(runner: Runner, group: int) -> dict[str, list[int]]:
    """What one data-parallel group answers; their requests differ in number and length."""
    prompts: list[list[object]] = [[5, 6, 7, 8, 9, 10, 11], [tiny.make_image(3), 12, 13], [14] * 21, [40, 41]]
    mine, outcomes = worker(runner)
    requests = [tiny.make_request(p, f"{group}.{i}", max_tokens=8) for i, p in enumerate(prompts[group:])]  # type: ignore[arg-type]
    tiny.run_mixed(mine, requests)
    while runner.rest():
        pass
    runner.crew.dismiss()
    outcomes.drain()
    return outcomes.tokens


@functools.cache
def wanted(group: int) -> dict[str, list[int]]:
    return answers(Runner.around(decoder(Place()), num_blocks=256, block_size=tiny.BLOCK_SIZE), group)


class Dice:
    """Another placement each time, copies and empty slots and all; remembers them."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self.loads: list[Sequence[Sequence[float]]] = []
        self.tables: list[list[Table]] = []

    def __call__(self, loads: Sequence[Sequence[float]], tables: Sequence[Table], num_pools: int) -> list[Table]:
        self.loads.append(loads)
        self.tables.append([self._one(len(loads[0]), table, num_pools) for table in tables])
        return self.tables[-1]

    def _one(self, num_experts: int, table: Table, num_pools: int) -> Table:
        world, size, per_pool = len(table), len(table[0]) // num_pools, num_experts // num_pools
        rows = np.full((world, num_pools, size), EMPTY)
        for pool in range(num_pools):
            slots = self._rng.permutation(world * size)
            rows[slots[:per_pool] // size, pool, slots[:per_pool] % size] = np.arange(per_pool) + pool * per_pool
            for slot in slots[per_pool:]:
                rest = set(range(pool * per_pool, (pool + 1) * per_pool)) - set(rows[slot // size, pool])
                rows[slot // size, pool, slot % size] = self._rng.choice([EMPTY, *sorted(rest)])
        return tuple(tuple(row.reshape(-1).tolist()) for row in rows)


def gang(dims: ParallelDims, rule: Rebalance, interval_steps: int) -> list[tuple[dict[str, list[int]], Balancer]]:
    """Answers and balancer of each rank."""
    text = tiny.tiny_config().text
    tiny.encode(tiny.make_image(3))  # made once, before the threads
    shape = (text.num_layers, 256, tiny.BLOCK_SIZE, text.num_kv_heads, text.head_dim, torch.float32, tiny.CPU)
    memory = [KVCache.allocate(*shape) for _ in range(dims.dp)]

    def work(place: Place) -> tuple[dict[str, list[int]], Balancer]:
        group = dims.coordinates(place.shard.rank).dp_rank
        model = decoder(place)
        balancer = Balancer(model, place, Rule(interval_steps, rule))
        heads = place.shard.kv_heads(text.num_kv_heads)
        kv = KVCache(memory[group].data, slice(heads.start, heads.stop))
        runner = Runner(model, kv, Crew(place, balancer=balancer))
        if place.shard.tp_rank:
            runner.follow(place.tp)
            return {}, balancer
        return answers(runner, group), balancer

    return together(work, dims)


@pytest.mark.parametrize("dims", LAYOUTS, ids=str)
def test_moving_experts_changes_no_token(dims: ParallelDims) -> None:
    groups, dice = [wanted(group) for group in range(dims.dp)], Dice(dims.tp)
    ranks = gang(dims, dice, interval_steps=2)
    assert len(dice.tables) >= 3
    for rank, (got, balancer) in enumerate(ranks):
        where = dims.coordinates(rank)
        assert got == ({} if where.tp_rank else groups[where.dp_rank])
        assert balancer.tables == dice.tables[-1]


def test_the_policy_itself_moves_experts_of_a_skewed_model_and_changes_no_token() -> None:
    dims = ParallelDims(1, 2, 1)
    for rank, (got, balancer) in enumerate(gang(dims, functools.partial(rebalance, min_gain=0.05), interval_steps=2)):
        assert got == wanted(rank)
        assert len({dealt(8, 2, dims), *balancer.tables}) > 2, "all layers stand as they were dealt, or all alike"


def test_rank_0_decides_by_what_all_leaders_have_counted_since() -> None:
    dims, dice = ParallelDims(1, 2), Dice(0)
    text = tiny.tiny_config().text
    assert text.text_experts is not None
    assert text.vision_experts is not None

    def work(place: Place) -> None:
        model = decoder(place)
        balancer = Balancer(model, place, Rule(1, dice))
        for count in (3, 5):
            model.routed_LE += count + place.shard.rank
            balancer.decide()

    together(work, dims)
    costs = np.repeat(
        [p.intermediate_size for p in (text.text_experts, text.vision_experts)], len(dice.loads[0][0]) // 2
    )
    for loads, count in zip(dice.loads, (3 + 4, 5 + 6), strict=True):
        assert (np.array(loads) == count * costs).all()


def test_experts_that_stand_well_are_left_alone() -> None:
    def stay(loads: object, tables: Sequence[Table], num_pools: int) -> list[Table]:
        asked.append(num_pools)
        return list(tables)

    asked: list[int] = []
    for got, balancer in gang(ParallelDims(2, 1), stay, interval_steps=4):
        assert got in ({}, wanted(0))
        assert balancer.use is None or balancer.use.num_moves == 0
    assert len(asked) >= 2


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(0, 2))
@settings(max_examples=30, deadline=None)
def test_imbalance_is_what_the_definition_says(seed: int, world: int, spare: int) -> None:
    rng, num = np.random.default_rng(seed), 2 * world
    tables = [dealt(num, 2, ParallelDims(world, 1, spare))] * 2
    tables = Dice(seed)([[0.0] * 2 * num] * 2, tables, 2) if spare <= num - 2 else tables
    loads = rng.integers(0, 5, (2, 2 * num))
    ranks = np.zeros((2, world))
    for layer, table in enumerate(tables):
        for e in range(2 * num):
            holders = [rank for rank, row in enumerate(table) if e in row]
            ranks[layer, holders] += loads[layer, e] / len(holders)
    expected = ranks.max(1).sum() / ranks.mean(1).sum() if loads.any() else 1.0
    assert imbalance(loads, np.array(tables)) == pytest.approx(expected)


def test_the_hottest_expert_is_found_in_its_modality() -> None:
    counts = np.array([[4, 4, 4, 4, 0, 0, 0, 0], [8, 4, 2, 2, 1, 0, 1, 0]])
    assert hottest_share(counts, num_pools=2, top_k=2) == 1.0
    assert hottest_share(counts[:1], num_pools=2, top_k=2) == 0.5
    assert hottest_share(counts[:0], num_pools=2, top_k=2) == 0.0


def test_use_is_counted_on_one_rank_too() -> None:
    runner = Runner.around(decoder(Place()), num_blocks=256, block_size=tiny.BLOCK_SIZE)
    mine, _ = worker(runner)
    picture = tiny.make_image(3)
    tiny.run_mixed(mine, [tiny.make_request([picture, 12, 13], max_tokens=3)])
    balancer = runner.crew.balancer
    assert balancer is not None
    balancer.is_due(float("inf"))
    use = mine.snapshot().experts
    assert use is not None
    text_tokens, vision_tokens = 2 + 2, picture.num_tokens + 2  # two generated ones ran; a picture has two borders
    assert use == ExpertUse(1.0, use.hottest_share, (text_tokens, vision_tokens), 0)
    assert use.hottest_share > 0
    layers = mine.experts()
    assert [one.layer for one in layers] == list(tiny.tiny_config().text.sparse_layers)
    assert {sum(one.tokens) for one in layers} == {(text_tokens + vision_tokens) * 2}

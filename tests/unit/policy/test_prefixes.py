"""Shared prefixes in a replay: what a way of routing finds in caches, and that the promised times are kept. Laws."""

from __future__ import annotations

import random
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.policy.replay.prefixes import (
    BLOCK_TOKENS,
    Arrival,
    ByCost,
    Choose,
    Outcome,
    Pool,
    least_loaded,
    one_cache,
    replay,
    round_robin,
)
from ernie_cluster.policy.snapshot import Rates

RATES = Rates(chunk_s=0.02, token_s=0.005, step_s=0.02, sequence_s=0.0002)


def chats(num_prompts: int, per_s: float, seed: int = 1) -> list[Arrival]:
    """Chats of some turns with one head; each turn adds blocks to all before it."""
    chance, out, number = random.Random(seed), list[Arrival](), 1
    start_s = 0.0
    while len(out) < num_prompts:
        start_s += chance.expovariate(per_s / 3)
        at_s, chain = start_s, [0]
        for _ in range(chance.randint(1, 5)):
            chain += range(number, number + chance.randint(2, 12))
            number += 12
            tokens = len(chain) * BLOCK_TOKENS - chance.randrange(BLOCK_TOKENS)
            out.append(Arrival(at_s, tokens, chance.randrange(20, 200), tuple(chain)))
            at_s += 5 + chance.expovariate(1 / 10)
    return sorted(out, key=lambda a: a.time_s)[:num_prompts]


@settings(max_examples=15)
@given(
    st.integers(0, 10**6), st.integers(1, 5), st.integers(20, 400), st.sampled_from([round_robin, least_loaded, None])
)
def test_no_way_finds_more_than_one_endless_cache(seed: int, replicas: int, blocks: int, way: Choose | None) -> None:
    trace = chats(40, per_s=4.0, seed=seed)
    got = replay(trace, way or ByCost(), Pool(replicas, blocks, RATES))
    assert 0 <= got.found <= one_cache(trace, 10**9) + 1e-9
    assert len(got.ttft_s) == len(trace)
    assert all(ttft_s >= RATES.chunk_s for ttft_s in got.ttft_s)


def test_a_lone_replica_finds_what_one_cache_of_its_size_finds() -> None:
    trace = chats(60, per_s=0.05)  # nobody waits
    got = replay(trace, ByCost(), Pool(1, 100, RATES))
    assert got.found == pytest.approx(one_cache(trace, 100))


@cache
def busy() -> tuple[float, dict[str, Outcome]]:
    """Four replicas whose caches hold a fifth of what is used each; without any, they would read all the time."""
    trace = chats(500, per_s=6.0)
    ways: dict[str, Choose] = {"in turn": round_robin, "least loaded": least_loaded, "by cost": ByCost()}
    pool = Pool(4, 700, RATES)
    return one_cache(trace, 10**9), {name: replay(trace, way, pool) for name, way in ways.items()}


def test_prompts_go_where_they_are_cached_without_piling_up_there() -> None:
    endless, results = busy()
    chosen = results["by cost"]
    assert chosen.found >= 0.9 * endless
    for other in (results["in turn"], results["least loaded"]):
        assert other.found < 0.8 * endless
        assert other.ttft(0.9) > 1.5 * chosen.ttft(0.9)


def test_the_expected_time_to_first_token_is_the_true_one() -> None:
    """But for what changed since the last snapshot."""
    errors = sorted(map(abs, busy()[1]["by cost"].errors))
    assert errors[len(errors) * 9 // 10] < 0.1

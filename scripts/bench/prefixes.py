"""Measure what the router's choices save: prompts with shared prefixes, and pictures that are asked for again. Pure Python.

    python scripts/bench/prefixes.py [--trace FILE] [--requests N] [--replicas 16] [--blocks 5000] [--load 0.6 1.0]

Prompts: `policy.replay.prefixes` plays a trace to mixed replicas of one speed, for each way of routing. A trace is JSON
lines as Mooncake publishes them (timestamp in ms, input_length, output_length, hash_ids of blocks of 512 tokens), scaled to
blocks of 16 tokens: a prompt keeps its blocks, and has 1/32 of the tokens. Without one, chats are made up. The load says
how fast the replicas are: the share of their time that they would read if nothing were ever cached.
Pictures: encoders of one kind, pictures asked for again and again, some much more often than others.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Sequence
from pathlib import Path

from ernie_cluster.config.router import RouterConfig
from ernie_cluster.policy.books import Books
from ernie_cluster.policy.encoding import choose_encoder
from ernie_cluster.policy.replay.prefixes import (
    BLOCK_TOKENS,
    Arrival,
    ByCost,
    Cache,
    Choose,
    Pool,
    least_loaded,
    one_cache,
    replay,
    round_robin,
)
from ernie_cluster.policy.snapshot import Demand, Picture, Promise, Rates, ReplicaSnapshot

TRACE_BLOCK_TOKENS = 512
SNAPSHOT_S = 0.1
ENCODERS = Rates(picture_s=0.01, media_token_s=0.0003)


def read_trace(file: Path) -> list[Arrival]:
    out = []
    for row in map(json.loads, file.read_text().splitlines()):
        num_tokens = -(-row["input_length"] * BLOCK_TOKENS // TRACE_BLOCK_TOKENS)
        out.append(Arrival(row["timestamp"] / 1e3, num_tokens, row["output_length"], tuple(row["hash_ids"])))
    return out


def make_trace(num_requests: int = 12_000, rate: float = 3.4) -> list[Arrival]:
    """Chats: turns that grow by some blocks, a head that all chats share, pauses for reading and typing."""
    chance, out, number = random.Random(2), list[Arrival](), 1
    start_s = 0.0
    while len(out) < num_requests:
        start_s += chance.expovariate(rate / 1.9)
        at_s, chain = start_s, [0]
        while True:
            new = 1 + int(chance.lognormvariate(2.0, 1.1))
            chain += range(number, number + new)
            number += new
            num_tokens = len(chain) * BLOCK_TOKENS - chance.randrange(BLOCK_TOKENS)
            out.append(Arrival(at_s, num_tokens, chance.randrange(20, 600), tuple(chain)))
            if chance.random() > 0.47:
                break
            at_s += 20 + chance.expovariate(1 / 60)
    return sorted(out, key=lambda a: a.time_s)[:num_requests]


def measure_prefixes(trace: Sequence[Arrival], num_replicas: int, num_blocks: int, load: float) -> None:
    offered = sum(a.num_tokens for a in trace) / (trace[-1].time_s - trace[0].time_s)
    speed = offered / load / num_replicas
    pool = Pool(num_replicas, num_blocks, Rates(chunk_s=0.02, token_s=1 / speed, step_s=0.02, sequence_s=0.0002))
    endless, same_size = one_cache(trace, 10**9), one_cache(trace, num_replicas * num_blocks)
    print(
        f"\n{len(trace)} prompts, {num_replicas} replicas of {num_blocks} blocks, {speed:.0f} tokens/s, load {load:.0%}"
    )
    print(f"  one endless cache finds {endless:.1%}; one of the size of all, {same_size / endless:.1%} of that; one of")
    print(f"  the size of a replica's, {one_cache(trace, num_blocks) / endless:.1%}")
    print(
        f"  {'':14}{'found':>7}{'of endless':>12}{'in use':>8}{'TTFT mean':>11}{'p50':>9}{'p90':>9}{'p99':>9}{'p90 x':>7}"
    )
    ways: dict[str, Choose] = {
        "round robin": round_robin,
        "least loaded": least_loaded,
        "by cost": ByCost(),
        "... 0.75 s old": ByCost(0.75),
    }
    results = {name: replay(trace, choose, pool) for name, choose in ways.items()}
    for name, got in results.items():
        times = "".join(f"{s:7.2f} s" for s in (statistics.mean(got.ttft_s), *map(got.ttft, (0.5, 0.9, 0.99))))
        times += f"{got.ttft(0.9) / results['by cost'].ttft(0.9):7.2f}"
        print(f"  {name:14}{got.found:7.1%}{got.found / endless:12.1%}{got.use:8.1%}  {times}")
    errors = sorted(results["by cost"].errors)
    marks = ", ".join(
        f"p{p} {errors[min(len(errors) - 1, len(errors) * p // 100)]:+.2f} s" for p in (1, 10, 50, 90, 99)
    )
    print(f"  expected minus true time to first token: {marks}")


def encoder(replica_id: str, waiting_tokens: int) -> ReplicaSnapshot:
    return ReplicaSnapshot(
        replica_id=replica_id,
        model="m",
        role="vision",
        node_id="n",
        incarnation="a",
        is_ready=True,
        is_draining=False,
        num_running=0,
        num_waiting=0,
        waiting_tokens=waiting_tokens,
        free_blocks=0,
        total_blocks=0,
        block_size=BLOCK_TOKENS,
        rates=ENCODERS,
    )


def measure_pictures(num_encoders: int = 16, num_requests: int = 20_000, num_pictures: int = 4000) -> None:
    chance = random.Random(3)
    weights = [1 / (i + 1) for i in range(num_pictures)]
    asked = chance.choices(range(num_pictures), weights, k=num_requests)
    hashes = [chance.getrandbits(64) for _ in range(num_pictures)]
    different = len(set(asked))
    print(f"\n{num_requests} pictures, {different} different, 60 a second, {num_encoders} encoders that keep 500 each")
    print(f"  {'':16}{'encoded':>8}{'times the fewest':>18}")
    for name in ("round_robin", "least_loaded", "by_policy"):
        books, caches, queues = Books(1e9), [Cache(500) for _ in range(num_encoders)], [0.0] * num_encoders
        num_encoded, next_s = 0, 0.0
        for number, picture in enumerate(asked):
            now_s, item = number / 60, hashes[picture]
            if now_s >= next_s:
                next_s = now_s + SNAPSHOT_S
                for i, cache in enumerate(caches):
                    waiting = int(max(0.0, queues[i] - now_s) / ENCODERS.media_token_s)
                    books.report(encoder(str(i), waiting), now_s)
                    books.cached(str(i), cache.log.since(books.seen(str(i))))
            if name == "round_robin":
                chosen = number % num_encoders
            elif name == "least_loaded":
                chosen = min(range(num_encoders), key=lambda i: (max(queues[i], now_s), i))
            else:
                wanted = Demand("m", 400, 1, 1, 400, pictures=(Picture(item, 400, 400),))
                found = choose_encoder(wanted, books.fleet(now_s), RouterConfig())
                assert isinstance(found, Promise)
                books.promise(str(number), (found,), now_s + 1)
                chosen = int(found.replica_id)
                books.confirm(str(number), str(chosen), now_s)
            if item not in caches[chosen]:
                num_encoded += 1
                queues[chosen] = max(queues[chosen], now_s) + ENCODERS.picture_s + 400 * ENCODERS.media_token_s
            caches[chosen].use([item])
        print(f"  {name:16}{num_encoded:8}{num_encoded / different:18.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="JSON lines of Mooncake's kind")
    parser.add_argument("--requests", type=int, help="only the first so many")
    parser.add_argument("--replicas", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=5000, help="that the cache of a replica keeps")
    parser.add_argument("--load", type=float, nargs="+", default=[0.6, 1.0])
    args = parser.parse_args()
    trace = (make_trace() if args.trace is None else read_trace(args.trace))[: args.requests]
    for load in args.load:
        measure_prefixes(trace, args.replicas, args.blocks, load)
    measure_pictures()


if __name__ == "__main__":
    main()

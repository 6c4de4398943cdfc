"""Measure the time of the router's decisions in a large cluster. Pure Python, no cluster.

    python scripts/bench/route.py [--replicas 1000] [--cached 10000] [--rounds 15]

CPU time of one thread. All decisions are made once per round, and of each the fastest round counts: neighbours on a shared
machine slow a stretch of time down, and seldom all stretches.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from ernie_cluster.config.pool import Role
from ernie_cluster.config.router import RouterConfig
from ernie_cluster.deltas import DeltaLog
from ernie_cluster.policy.books import Books
from ernie_cluster.policy.routing import Path, choose_path
from ernie_cluster.policy.snapshot import Demand, Picture, ReplicaSnapshot

LIMITS = RouterConfig(max_queued_tokens=10**9)


def snapshot(replica_id: str, role: Role, block_size: int = 16) -> ReplicaSnapshot:
    return ReplicaSnapshot(
        replica_id=replica_id,
        model="m",
        role=role,
        node_id=f"node-{sum(replica_id.encode()) % 125}",
        incarnation="a",
        is_ready=True,
        is_draining=False,
        num_running=0,
        num_waiting=0,
        waiting_tokens=0,
        free_blocks=60_000,
        total_blocks=60_000,
        block_size=block_size,
        token_bytes=57_344,
    )


def measure_decisions(num_replicas: int, num_cached: int, num_rounds: int, num_decisions: int = 2000) -> None:
    chance = random.Random(1)
    books = Books(heartbeat_timeout_s=1e9)
    shares: tuple[tuple[Role, int], ...] = (("vision", 2), ("prefill", 4), ("decode", 3), ("mixed", 1))
    roles: list[Role] = [role for role, n in shares for _ in range(n)]
    heads = [[chance.getrandbits(64) for _ in range(64)] for _ in range(20)]  # prompts of 1,024 tokens that many share
    chains: list[list[int]] = []
    pictures: list[int] = []
    for i in range(num_replicas):
        role = roles[i % len(roles)]
        told = replace(
            snapshot(f"{role}-{i}", role),
            num_running=chance.randrange(32),
            waiting_tokens=0 if role == "decode" else chance.randrange(4000),
            free_blocks=chance.randrange(2_000, 60_000),
        )
        books.report(told, 0.0)
        items = [chance.getrandbits(64) for _ in range(num_cached)]
        if role == "vision":
            pictures += items[:10]
        else:
            own = [chance.choice(heads) for _ in range(5)]
            chains += [[*head, *items[n * 400 : (n + 1) * 400]] for n, head in enumerate(own)]
            items[-320:] = [item for head in own for item in head]
        log = DeltaLog()
        for item in items:
            log.add(item)
        books.cached(told.replica_id, log.since(None))
    kinds: dict[str, Callable[[], Demand]] = {
        "no prefix, 2,000 tokens": lambda: demand([chance.getrandbits(64) for _ in range(124)], []),
        "shared head, 2,000 tokens": lambda: demand([*chance.choice(heads), *range(60)], []),
        "a chat, 7,440 tokens": lambda: demand(chance.choice(chains), []),
        "100,000 tokens": lambda: demand([*chance.choice(chains), *range(5800)], []),
        "a chat with 4 pictures": lambda: demand(chance.choice(chains), chance.choices(pictures, k=4)),
    }
    print(f"\ndecisions among {num_replicas} replicas, {num_cached} cached blocks each (us of CPU)")
    print(f"  {'':28}{'p50':>8}{'p99':>8}{'max':>8}   booked and released, p99")
    demands = [(name, make()) for name, make in kinds.items() for _ in range(num_decisions // len(kinds))]
    chosen, booked = [1.0] * len(demands), [1.0] * len(demands)
    for _ in range(num_rounds):
        for i, (_, wanted) in enumerate(demands):
            fleet = books.fleet(0.0)
            start = time.thread_time()
            found = choose_path(wanted, fleet, LIMITS)
            chosen[i] = min(chosen[i], time.thread_time() - start)
            assert isinstance(found, Path)
            start = time.thread_time()
            books.promise("", found.promises, 1e9)
            books.release("")
            booked[i] = min(booked[i], time.thread_time() - start)
    for name in kinds:
        mine = [i for i, (kind, _) in enumerate(demands) if kind == name]
        print(f"  {name:28}{_row([chosen[i] for i in mine])}   {_percentile([booked[i] for i in mine], 99) * 1e6:8.0f}")
    print(f"  {'all':28}{_row(chosen)}")


def demand(chain: Sequence[int], pictures: Sequence[int]) -> Demand:
    seen = tuple(Picture(item, 300 * (i + 1), 256) for i, item in enumerate(pictures))
    size = len(chain) * 16 + 8
    return Demand("m", size, 500, len(seen), 256 * len(seen), tuple(chain), seen)


def _percentile(values: Sequence[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


def _row(values: Sequence[float]) -> str:
    return "".join(f"{1e6 * v:8.0f}" for v in (statistics.median(values), _percentile(values, 99), max(values)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--cached", type=int, default=10_000, help="blocks that each replica has in its cache")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    measure_decisions(args.replicas, args.cached, args.rounds)


if __name__ == "__main__":
    main()

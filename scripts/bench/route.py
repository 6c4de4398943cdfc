"""Measure the router's policy: time of a decision in a large cluster, and what its choices save. Pure Python, no cluster.

    python scripts/bench/route.py [--trace FILE] [--replicas 1000] [--cached 10000]

Decisions: CPU time, and the least of fifteen tries at each, for the neighbours on a shared machine count for nothing here.
Caches: prompts arrive as in a trace, at mixed replicas that work at a fixed rate, each with a cache that drops what was
used longest ago; deltas and snapshots reach the router every 0.1 s. Without `--trace` (JSON lines as Mooncake publishes
them: timestamp in ms, input_length, output_length, hash_ids of blocks of 512 tokens) chats are made up.
Pictures: encoders of the same kind, pictures asked for again and again, some much more often than others.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path as File

from ernie_cluster.config.cluster import Role, RouterConfig
from ernie_cluster.deltas import DeltaLog
from ernie_cluster.policy.books import Books
from ernie_cluster.policy.encoding import choose_encoder
from ernie_cluster.policy.routing import Path, choose_path
from ernie_cluster.policy.snapshot import Demand, Picture, Promise, Rates, ReplicaSnapshot

LIMITS = RouterConfig(max_queued_tokens=10**9)
SNAPSHOT_S = 0.1


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


# ---- time of a decision


def measure_decisions(num_replicas: int, num_cached: int, num_decisions: int = 2000) -> None:
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
    everything: list[float] = []
    for name, make in kinds.items():
        demands = [make() for _ in range(num_decisions // len(kinds))]
        chosen, booked = [], []
        for number, wanted in enumerate(demands):
            decide = partial(choose_path, wanted, books.fleet(0.0), LIMITS)
            chosen.append(min(_seconds(decide) for _ in range(15)))
            found = decide()
            assert isinstance(found, Path)
            start = time.thread_time()
            books.promise(str(number), found.promises, 1e9)
            books.release(str(number))
            booked.append(time.thread_time() - start)
        everything += chosen
        print(f"  {name:28}{_row(chosen)}   {_percentile(booked, 99) * 1e6:8.0f}")
    print(f"  {'all':28}{_row(everything)}")
    report = [_seconds(lambda i=i: books.report(replace(told, num_running=i), 0.0)) for i in range(1000)]  # type: ignore[misc]
    print(f"  {'a snapshot comes':28}{_row(report)}")


def demand(chain: Sequence[int], pictures: Sequence[int]) -> Demand:
    seen = tuple(Picture(item, 300 * (i + 1), 256) for i, item in enumerate(pictures))
    size = len(chain) * 16 + 8
    return Demand("m", size, 500, len(seen), 256 * len(seen), tuple(chain), seen)


def _seconds(work: Callable[[], object]) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


def _percentile(values: Sequence[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


def _row(values: Sequence[float]) -> str:
    return "".join(f"{1e6 * v:8.0f}" for v in (statistics.median(values), _percentile(values, 99), max(values)))


# ---- what is saved


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace."""

    time_s: float
    num_tokens: int
    num_output: int
    chain: tuple[int, ...]


def read_trace(file: File) -> list[Arrival]:
    rows = map(json.loads, file.read_text().splitlines())
    return [Arrival(r["timestamp"] / 1e3, r["input_length"], r["output_length"], tuple(r["hash_ids"])) for r in rows]


def make_trace(num_requests: int = 12_000, rate: float = 3.4) -> list[Arrival]:
    """Chats: turns that grow by some thousand tokens, a head that all chats share, pauses for reading and typing."""
    chance, out, number = random.Random(2), list[Arrival](), 1
    start_s = 0.0
    while len(out) < num_requests:
        start_s += chance.expovariate(rate / 1.9)
        at_s, chain = start_s, [0]
        while True:
            new = 1 + int(chance.lognormvariate(2.0, 1.1))
            chain += range(number, number + new)
            number += new
            out.append(Arrival(at_s, len(chain) * 512 - chance.randrange(512), chance.randrange(20, 600), tuple(chain)))
            if chance.random() > 0.47:
                break
            at_s += 20 + chance.expovariate(1 / 60)
    return sorted(out, key=lambda a: a.time_s)[:num_requests]


class Cache:
    """Blocks or pictures, least recently used first out."""

    def __init__(self, capacity: int) -> None:
        self._capacity, self._items, self.log = capacity, OrderedDict[int, None](), DeltaLog()

    def num_leading(self, chain: Iterable[int]) -> int:
        count = 0
        for item in chain:
            if item not in self._items:
                break
            count += 1
        return count

    def use(self, chain: Sequence[int]) -> None:
        for item in reversed(chain):  # heads outlive tails
            self._items[item] = None
            self._items.move_to_end(item)
            self.log.add(item)
        while len(self._items) > self._capacity:
            self.log.remove(self._items.popitem(last=False)[0])


@dataclass(slots=True)
class Replica:
    """A mixed replica that reads one prompt after the other."""

    told: ReplicaSnapshot
    cache: Cache
    free_s: float = 0.0
    queue: list[tuple[float, int, tuple[int, ...]]] = field(default_factory=list)  # (read at, tokens, chain)
    ends: list[float] = field(default_factory=list)

    def advance(self, now_s: float) -> None:
        while self.queue and self.queue[0][0] <= now_s:
            self.cache.use(self.queue.pop(0)[2])
        while self.ends and self.ends[0] <= now_s:
            heapq.heappop(self.ends)

    def now(self) -> ReplicaSnapshot:
        return replace(self.told, num_running=len(self.ends), waiting_tokens=sum(n for _, n, _ in self.queue))


Chooser = Callable[[int, Arrival, Demand, Sequence[Replica], Books], int]


def round_robin(number: int, arrival: Arrival, wanted: Demand, replicas: Sequence[Replica], books: Books) -> int:
    return number % len(replicas)


def least_loaded(number: int, arrival: Arrival, wanted: Demand, replicas: Sequence[Replica], books: Books) -> int:
    return min(range(len(replicas)), key=lambda i: (max(replicas[i].free_s, arrival.time_s), len(replicas[i].ends), i))


def by_policy(number: int, arrival: Arrival, wanted: Demand, replicas: Sequence[Replica], books: Books) -> int:
    found = choose_path(wanted, books.fleet(arrival.time_s), LIMITS)
    assert isinstance(found, Path)
    books.promise(str(number), found.promises, arrival.time_s + 30)
    return int(found.prefill)


def replay(
    trace: Sequence[Arrival], choose: Chooser, num_replicas: int, capacity: int, rates: Rates
) -> tuple[float, list[float]]:
    """(share of tokens found in caches, time to first token of each request in s)."""
    books = Books(heartbeat_timeout_s=1e9)
    replicas = [
        Replica(replace(snapshot(str(i), "mixed", 512), rates=rates), Cache(capacity)) for i in range(num_replicas)
    ]
    num_hit, waits, next_s = 0, list[float](), 0.0
    for number, a in enumerate(trace):
        for r in replicas:
            r.advance(a.time_s)
        if a.time_s >= next_s:
            next_s = a.time_s + SNAPSHOT_S
            for r in replicas:
                books.report(r.now(), a.time_s)
                books.cached(r.told.replica_id, r.cache.log.since(books.seen(r.told.replica_id)))
        wanted = Demand("m", a.num_tokens, a.num_output, chain=a.chain[: (a.num_tokens - 1) // 512])
        chosen = replicas[choose(number, a, wanted, replicas, books)]
        books.confirm(str(number), chosen.told.replica_id, a.time_s)
        coming = {item for _, _, chain in chosen.queue for item in chain}  # read before this one
        hit = max(chosen.cache.num_leading(wanted.chain), _leading(wanted.chain, coming)) * 512
        num_hit += hit
        start_s = max(chosen.free_s, a.time_s)
        chosen.free_s = start_s + rates.chunk_s + (a.num_tokens - hit) * rates.token_s
        chosen.queue.append((chosen.free_s, a.num_tokens - hit, a.chain))
        heapq.heappush(chosen.ends, chosen.free_s + a.num_output * rates.step_s)
        waits.append(chosen.free_s - a.time_s)
    return num_hit / sum(a.num_tokens for a in trace), waits


def _leading(chain: Sequence[int], items: set[int]) -> int:
    return next((i for i, item in enumerate(chain) if item not in items), len(chain))


def ideal(trace: Sequence[Arrival], capacity: int) -> float:
    """Share of tokens in one cache for all."""
    cache, num_hit = Cache(capacity), 0
    for a in trace:
        num_hit += cache.num_leading(a.chain[: (a.num_tokens - 1) // 512]) * 512
        cache.use(a.chain)
    return num_hit / sum(a.num_tokens for a in trace)


def measure_prefixes(trace: Sequence[Arrival], num_replicas: int = 16, capacity: int = 2000) -> None:
    rates = Rates(chunk_s=0.02, token_s=1 / 4000, step_s=0.02, sequence_s=0.0002)
    infinite, pooled = ideal(trace, 10**9), ideal(trace, num_replicas * capacity)
    print(f"\n{len(trace)} prompts at {num_replicas} mixed replicas of {capacity} blocks of 512 tokens")
    print(f"  found in one cache without end {infinite:.1%}, in one cache of the same size {pooled:.1%}")
    print(f"  {'':16}{'found':>8}{'of endless':>12}{'TTFT p50':>10}{'p99':>8}")
    for choose in (round_robin, least_loaded, by_policy):
        hits, waits = replay(trace, choose, num_replicas, capacity, rates)
        p50, p99 = statistics.median(waits), _percentile(waits, 99)
        print(f"  {choose.__name__:16}{hits:8.1%}{hits / infinite:12.1%}{p50:8.2f} s{p99:6.1f} s")


def measure_pictures(num_encoders: int = 16, num_requests: int = 20_000, num_pictures: int = 4000) -> None:
    chance = random.Random(3)
    weights = [1 / (i + 1) for i in range(num_pictures)]
    asked = chance.choices(range(num_pictures), weights, k=num_requests)
    hashes = [chance.getrandbits(64) for _ in range(num_pictures)]
    print(
        f"\n{num_requests} pictures, {len(set(asked))} of them different, 60 a second, {num_encoders} encoders that keep 500 each"
    )
    print(f"  {'':16}{'encoded':>8}{'times the fewest':>18}")
    for name in ("round_robin", "least_loaded", "by_policy"):
        books, caches, queues = Books(1e9), [Cache(500) for _ in range(num_encoders)], [0.0] * num_encoders
        rates, num_encoded, next_s = Rates(picture_s=0.01, media_token_s=0.0003), 0, 0.0
        for number, picture in enumerate(asked):
            now_s, item = number / 60, hashes[picture]
            if now_s >= next_s:
                next_s = now_s + SNAPSHOT_S
                for i, cache in enumerate(caches):
                    waiting = int(max(0.0, queues[i] - now_s) / rates.media_token_s)
                    told = replace(snapshot(str(i), "vision"), waiting_tokens=waiting, rates=rates)
                    books.report(told, now_s)
                    books.cached(str(i), cache.log.since(books.seen(str(i))))
            if name == "round_robin":
                chosen = number % num_encoders
            elif name == "least_loaded":
                chosen = min(range(num_encoders), key=lambda i: (max(queues[i], now_s), i))
            else:
                wanted = Demand("m", 400, 1, 1, 400, pictures=(Picture(item, 400, 400),))
                found = choose_encoder(wanted, books.fleet(now_s), LIMITS)
                assert isinstance(found, Promise)
                books.promise(str(number), (found,), now_s + 1)
                chosen = int(found.replica_id)
                books.confirm(str(number), str(chosen), now_s)
            if not caches[chosen].num_leading([item]):
                num_encoded += 1
                queues[chosen] = max(queues[chosen], now_s) + rates.picture_s + 400 * rates.media_token_s
            caches[chosen].use([item])
        print(f"  {name:16}{num_encoded:8}{num_encoded / len(set(asked)):18.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=File, help="JSON lines of Mooncake's kind")
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--cached", type=int, default=10_000, help="blocks that each replica has in its cache")
    args = parser.parse_args()
    measure_decisions(args.replicas, args.cached)
    measure_prefixes(make_trace() if args.trace is None else read_trace(args.trace))
    measure_pictures()


if __name__ == "__main__":
    main()

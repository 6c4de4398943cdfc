"""Prompts with shared prefixes, replayed at replicas with caches: what a way of routing them finds, and how late they are.

Mixed replicas read one prompt after the other at a fixed speed, and drop from their caches what was used longest ago. The
router hears of loads and caches by snapshots and deltas, as in life; ways of routing without a router see loads at once.
Answers only occupy a replica: they slow nothing down.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from ernie_cluster.config.router import RouterConfig
from ernie_cluster.deltas import DeltaLog
from ernie_cluster.policy.books import Books
from ernie_cluster.policy.routing import Path, choose_path
from ernie_cluster.policy.snapshot import Demand, Rates, ReplicaSnapshot

BLOCK_TOKENS = 16
_LIMITS = RouterConfig(max_queued_tokens=10**9)
_LEASE_S = 30.0


@dataclass(frozen=True, slots=True)
class Arrival:
    """One prompt."""

    time_s: float
    num_tokens: int
    num_output: int
    chain: tuple[int, ...]
    """Of all its blocks, the last one maybe partly filled; equal numbers stand for equal prefixes."""

    @property
    def cacheable(self) -> tuple[int, ...]:
        """What a cache could cover: the block of the last token never is."""
        return self.chain[: (self.num_tokens - 1) // BLOCK_TOKENS]


class Cache:
    """Blocks, or anything else that has a number; least recently used first out. Tells what came and went."""

    def __init__(self, capacity: int) -> None:
        self._capacity, self._items, self.log = capacity, OrderedDict[int, None](), DeltaLog()

    def __contains__(self, item: int) -> bool:
        return item in self._items

    def num_leading(self, chain: Iterable[int], coming: Iterable[int] = ()) -> int:
        """How many of the first links are here, or in `coming`."""
        soon, count = frozenset(coming), 0
        for item in chain:
            if item not in self._items and item not in soon:
                break
            count += 1
        return count

    def use(self, chain: Sequence[int]) -> None:
        """A chain was read; its head outlives its tail."""
        for item in reversed(chain):
            self._items[item] = None
            self._items.move_to_end(item)
            self.log.add(item)
        while len(self._items) > self._capacity:
            self.log.remove(self._items.popitem(last=False)[0])


@dataclass(slots=True)
class Reader:
    """A replica that reads one prompt after the other."""

    told: ReplicaSnapshot
    cache: Cache
    free_s: float = 0.0
    """When it has read all that it has."""
    busy_s: float = 0.0
    """Spent reading, or to be spent."""
    queue: deque[tuple[float, tuple[int, ...]]] = field(default_factory=deque)
    """(when it is read, its chain)"""
    ends: list[float] = field(default_factory=list)
    """Heap: when answers are written."""

    def advance(self, now_s: float) -> None:
        """What is read by now is in the cache."""
        while self.queue and self.queue[0][0] <= now_s:
            self.cache.use(self.queue.popleft()[1])
        while self.ends and self.ends[0] <= now_s:
            heapq.heappop(self.ends)

    def now(self, now_s: float) -> ReplicaSnapshot:
        """What it tells of itself."""
        waiting = max(0.0, self.free_s - now_s) / self.told.rates.token_s
        return replace(self.told, num_running=len(self.ends), waiting_tokens=int(waiting))

    def take(self, arrival: Arrival) -> tuple[int, float]:
        """Read a prompt after all others: (its tokens found in the cache, time to its first token in s)."""
        rates = self.told.rates
        coming = {item for _, chain in self.queue for item in chain}
        num_found = self.cache.num_leading(arrival.cacheable, coming) * BLOCK_TOKENS
        read_s = rates.chunk_s + (arrival.num_tokens - num_found) * rates.token_s
        self.free_s = max(self.free_s, arrival.time_s) + read_s
        self.busy_s += read_s
        self.queue.append((self.free_s, arrival.chain))
        heapq.heappush(self.ends, self.free_s + arrival.num_output * rates.step_s)
        return num_found, self.free_s - arrival.time_s


@dataclass(frozen=True, slots=True)
class Pool:
    """The replicas of a replay, all alike."""

    num_replicas: int
    num_blocks: int
    """That the cache of each keeps."""
    rates: Rates

    def readers(self) -> list[Reader]:
        """At rest, with nothing cached."""
        return [
            Reader(
                ReplicaSnapshot(
                    replica_id=str(i),
                    model="m",
                    role="mixed",
                    node_id="n",
                    incarnation="a",
                    is_ready=True,
                    is_draining=False,
                    num_running=0,
                    num_waiting=0,
                    waiting_tokens=0,
                    free_blocks=10**6,
                    total_blocks=10**6,
                    block_size=BLOCK_TOKENS,
                    rates=self.rates,
                ),
                Cache(self.num_blocks),
            )
            for i in range(self.num_replicas)
        ]


Choose = Callable[[int, Arrival, Sequence[Reader]], tuple[int, float | None]]
"""(number of the prompt, the prompt, the replicas) -> (which of them, its expected time to first token if there is one)."""


def round_robin(number: int, arrival: Arrival, readers: Sequence[Reader]) -> tuple[int, float | None]:
    """In turn."""
    return number % len(readers), None


def least_loaded(number: int, arrival: Arrival, readers: Sequence[Reader]) -> tuple[int, float | None]:
    """Who has read soonest what he has; of those at rest, who writes the fewest answers."""
    order = ((max(r.free_s, arrival.time_s), len(r.ends), i) for i, r in enumerate(readers))
    return min(order)[2], None


class ByCost:
    """`policy.routing.choose_path`, by snapshots and deltas.

    Args:
        interval_s: between two of them.
    """

    def __init__(self, interval_s: float = 0.1) -> None:
        self._interval_s, self._next_s = interval_s, 0.0
        self._books = Books(heartbeat_timeout_s=1e9)

    def __call__(self, number: int, arrival: Arrival, readers: Sequence[Reader]) -> tuple[int, float | None]:
        now_s, books = arrival.time_s, self._books
        if now_s >= self._next_s:
            self._next_s = now_s + self._interval_s
            for reader in readers:
                replica_id = reader.told.replica_id
                books.report(reader.now(now_s), now_s)
                books.cached(replica_id, reader.cache.log.since(books.seen(replica_id)))
        demand = Demand("m", arrival.num_tokens, arrival.num_output, chain=arrival.cacheable)
        found = choose_path(demand, books.fleet(now_s), _LIMITS)
        assert isinstance(found, Path), found.reason
        books.promise(str(number), found.promises, now_s + _LEASE_S)
        books.confirm(str(number), found.prefill, now_s)
        return int(found.prefill), found.ttft_s


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a way of routing came to."""

    found: float
    """Share of all prompt tokens that was found in caches."""
    use: float
    """Share of their time that the replicas read."""
    ttft_s: tuple[float, ...]
    """Of each prompt."""
    errors: tuple[float, ...]
    """Expected minus true time to first token, of each prompt that something was expected of."""

    def ttft(self, share: float) -> float:
        """The time within which so many of the prompts had their first token: 0.9 = p90."""
        return sorted(self.ttft_s)[min(len(self.ttft_s) - 1, int(len(self.ttft_s) * share))]


def replay(trace: Sequence[Arrival], choose: Choose, pool: Pool) -> Outcome:
    """Route a trace; arrivals in order."""
    readers, num_found = pool.readers(), 0
    ttfts, errors = list[float](), list[float]()
    for number, arrival in enumerate(trace):
        for reader in readers:
            reader.advance(arrival.time_s)
        chosen, expected_s = choose(number, arrival, readers)
        found, ttft_s = readers[chosen].take(arrival)
        num_found += found
        ttfts.append(ttft_s)
        if expected_s is not None:
            errors.append(expected_s - ttft_s)
    whole_s = (trace[-1].time_s - trace[0].time_s) * len(readers)
    use = sum(r.busy_s for r in readers) / whole_s if whole_s else 1.0
    return Outcome(num_found / sum(a.num_tokens for a in trace), use, tuple(ttfts), tuple(errors))


def one_cache(trace: Sequence[Arrival], num_blocks: int) -> float:
    """Share of all prompt tokens that one cache for all finds: the most that any routing could."""
    cache, num_found = Cache(num_blocks), 0
    for arrival in trace:
        num_found += cache.num_leading(arrival.cacheable) * BLOCK_TOKENS
        cache.use(arrival.chain)
    return num_found / sum(a.num_tokens for a in trace)

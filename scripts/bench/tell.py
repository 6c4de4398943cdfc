"""Measure what it costs the router that replicas tell what is new: CPU time per answer, round trip and books. No Ray.

    python scripts/bench/tell.py [--replicas 50] [--answers 4000]

A second process offers `tell` as ranks do, at a connection for each replica; this one asks all of them over and over, as
the router does, and books the answers: a changed load, four blocks that came and four that went. CPU time of this process.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

from ernie_cluster.actors.direct import Address, DirectPeer, DirectServer
from ernie_cluster.actors.messages import Load, Told
from ernie_cluster.config.router import RouterConfig
from ernie_cluster.deltas import DeltaLog
from ernie_cluster.policy.books import Books
from ernie_cluster.policy.pace import pause_s
from ernie_cluster.policy.snapshot import ReplicaSnapshot


class Rank:
    """Always has news."""

    def __init__(self) -> None:
        self._log, self._next, self._load = DeltaLog(), 0, 0
        for _ in range(1000):
            self._change()

    def _change(self) -> None:
        self._log.add(self._next)
        if self._next >= 1000:
            self._log.remove(self._next - 1000)
        self._next += 1

    async def tell(self, seen: int | None) -> Told:
        """What is new."""
        for _ in range(4):
            self._change()
        self._load += 1
        return Told(Load(self._load % 8, 0, self._load, 3, 500, 1000), self._log.since(seen), 0.0)


def serve(num_replicas: int, addresses: Connection) -> None:
    async def run() -> None:
        servers = [DirectServer({"tell": Rank().tell}) for _ in range(num_replicas)]
        addresses.send([await server.start("127.0.0.1") for server in servers])
        await asyncio.get_running_loop().run_in_executor(None, addresses.poll, None)

    asyncio.run(run())


def snapshot(replica_id: str, load: Load) -> ReplicaSnapshot:
    return ReplicaSnapshot(
        replica_id=replica_id,
        model="m",
        role="mixed",
        node_id="n",
        incarnation="a",
        is_ready=True,
        is_draining=False,
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        waiting_tokens=load.waiting_tokens,
        free_blocks=load.free_blocks,
        total_blocks=load.total_blocks,
        block_size=16,
        rates=load.rates,
    )


async def ask(addresses: Sequence[Address], num_answers: int) -> tuple[float, float]:
    """CPU seconds of an answer: (all of it, of that the books)."""
    books, booked_s = Books(heartbeat_timeout_s=1e9), 0.0
    peers = [await DirectPeer.connect(address, str(i)) for i, address in enumerate(addresses)]

    async def watch(number: int, count: int) -> None:
        nonlocal booked_s
        replica_id = str(number)
        for _ in range(count):
            async with asyncio.timeout(60):
                told: Told = await peers[number].call("tell", books.seen(replica_id))
            start = time.thread_time()
            books.report(snapshot(replica_id, told.load), time.monotonic())
            books.cached(replica_id, told.cached)
            booked_s += time.thread_time() - start

    async def round_of(count: int) -> tuple[float, float]:
        nonlocal booked_s
        start, booked_s = time.process_time(), 0.0
        await asyncio.gather(*(watch(i, count) for i in range(len(peers))))
        return (time.process_time() - start) / count / len(peers), booked_s / count / len(peers)

    await round_of(1)  # whole caches
    best = min([await round_of(num_answers // len(peers) // 8) for _ in range(8)])
    for peer in peers:
        await peer.close()
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=50)
    parser.add_argument("--answers", type=int, default=4000)
    args = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(args.replicas, theirs), daemon=True)
    process.start()
    all_s, books_s = asyncio.run(ask(ours.recv(), args.answers))
    ours.send(None)
    process.join(10)
    print(f"an answer: {all_s * 1e6:.0f} us of CPU, {books_s * 1e6:.0f} of them in the books (best of 8 rounds)")
    for count in (100, 200, 1000, 4000):
        rate = count / pause_s(count, RouterConfig())
        print(f"  {count:5} replicas: {rate / count:5.2f} times a second each, {rate * all_s:.0%} of a core")


if __name__ == "__main__":
    main()

"""Blocks promised to requests before their work or their KV arrives.

A lease has an owner (request id), an epoch (the attempt) and a deadline that heartbeats move on, though never beyond the
request's own. Whoever writes under a lease names its epoch; a lease that was ended or taken over answers to no old epoch.
Time comes in as an argument.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from ernie_cluster.engine.block_pool import BlockPool, OutOfBlocks
from ernie_cluster.errors import ContextTooLong, Overloaded, TransferFailed
from ernie_cluster.transport.base import Message


@dataclass(slots=True, eq=False)
class Lease:
    """Blocks of one request attempt."""

    request_id: str
    epoch: int
    blocks: list[int]
    """Logical block index -> block id; the cached prefix first."""
    num_shared: int
    """Leading blocks that came from the prefix cache and are never written."""
    deadline_s: float
    until_s: float = float("inf")
    """The request's own deadline: no sign of life helps beyond it."""
    pieces: set[int] = field(default_factory=set)
    """Numbers of the pieces that have arrived."""
    bytes_received: int = 0
    first_piece_s: float | None = None
    told: Future[list[Message]] | None = None
    """Other ranks write under this lease too; done when they know it. None where there are none."""

    def owns(self, first: int, count: int) -> bool:
        """Whether so many blocks from a logical index on are this lease's to write to: inside, and not of the shared prefix."""
        return self.num_shared <= first < first + count <= len(self.blocks)

    def renew(self, now_s: float, timeout_s: float) -> None:
        """A sign of life."""
        self.deadline_s = min(now_s + timeout_s, self.until_s)


class LeaseTable:
    """Owns the leases of one engine.

    Args:
        pool: where blocks come from and go back to.
        timeout_s: how long a lease lives without a sign of life.
    """

    def __init__(self, pool: BlockPool, timeout_s: float) -> None:
        self.pool, self.timeout_s = pool, timeout_s
        self._leases: dict[str, Lease] = {}
        self._due: list[tuple[float, int, Lease]] = []
        """Heap of one entry for each lease, under a deadline that may have moved on since; and of some that have ended."""
        self._numbers = itertools.count()
        self._ending: list[Lease] = []
        """Ended, but other ranks may be writing into their blocks still."""
        self.recall: Callable[[Lease], None] = _no_recall
        """Makes other ranks forget a lease that has ended; `give_back` follows."""

    def __len__(self) -> int:
        return len(self._leases)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._leases

    def blocks(self) -> list[int]:
        """All leased blocks, shared ones as often as they are leased."""
        return [block for lease in (*self._leases.values(), *self._ending) for block in lease.blocks]

    @property
    def num_blocks(self) -> int:
        return len(self.blocks())

    def grant(
        self,
        request_id: str,
        epoch: int,
        num_tokens: int,
        hashes: Sequence[bytes],
        reserve_tokens: int,
        now_s: float,
        keep_free: int = 0,
        until_s: float = float("inf"),
    ) -> Lease:
        """Blocks for `num_tokens` and a first stretch of output; the cached prefix is shared.

        An older attempt of the same request is ended first.

        Args:
            num_tokens: prompt (and replayed output).
            hashes: content hashes of the prompt's full blocks; the last token is never taken from the cache.
            reserve_tokens: output tokens to hold blocks for, as far as there are any.
            keep_free: blocks that must stay free, since others have waited for them longer.
            until_s: the request's own deadline.

        Raises:
            ContextTooLong: the tokens would not fit even if all blocks were free.
            Overloaded: not enough blocks are free.
            TransferFailed: this attempt or a newer one holds a lease already, or has held one that other ranks still write
                under.
        """
        needed, capacity = self.pool.num_blocks_for(num_tokens), self.pool.num_blocks - 1
        if needed > capacity:
            raise ContextTooLong(
                f"{num_tokens} tokens need {needed} KV blocks of {self.pool.block_size}, this replica has {capacity}; "
                "shorten the prompt"
            )
        old = self._leases.get(request_id)
        if old is not None:
            if old.epoch >= epoch:
                raise TransferFailed(f"request {request_id}: attempt {epoch} came after attempt {old.epoch}")
            self.end(request_id)
        if any(x.request_id == request_id and x.epoch >= epoch for x in self._ending):
            # other ranks know a lease by request and attempt: told to forget the first, they would forget this one
            raise TransferFailed(f"request {request_id}: attempt {epoch} has ended here")
        usable = hashes[: (num_tokens - 1) // self.pool.block_size]
        wanted = min(self.pool.num_blocks_for(num_tokens + reserve_tokens), capacity)
        try:
            blocks, num_shared = self.pool.acquire(usable, wanted, keep_free)
        except OutOfBlocks as e:
            raise Overloaded(f"KV cache is full: {e}") from None
        lease = Lease(request_id, epoch, blocks, num_shared, min(now_s + self.timeout_s, until_s), until_s)
        self._leases[request_id] = lease
        self._watch(lease)
        return lease

    def find(self, request_id: str, epoch: int) -> Lease:
        """The lease of this very attempt; TransferFailed when it was ended, ran out or was taken over."""
        lease = self._leases.get(request_id)
        if lease is None:
            raise TransferFailed(f"request {request_id}: no lease; it ended or ran out")
        if lease.epoch != epoch:
            raise TransferFailed(
                f"request {request_id}: attempt {epoch} is fenced off, attempt {lease.epoch} holds the lease"
            )
        return lease

    def take(self, request_id: str, epoch: int) -> Lease:
        """End the lease but keep its blocks, which now belong to the caller."""
        lease = self.find(request_id, epoch)
        del self._leases[request_id]
        return lease

    def end(self, request_id: str, epoch: int | None = None) -> bool:
        """Free a lease's blocks; False when there is none, or it is another attempt's.

        Blocks that other ranks write into are free once those have forgotten the lease.
        """
        lease = self._leases.get(request_id)
        if lease is None or (epoch is not None and lease.epoch != epoch):
            return False
        del self._leases[request_id]
        if lease.told is None:
            self.pool.free(lease.blocks)
        else:
            self._ending.append(lease)
            self.recall(lease)
        return True

    def give_back(self, lease: Lease) -> None:
        """Nobody writes under a lease any more that has ended."""
        self._ending.remove(lease)
        self.pool.free(lease.blocks)

    def renew(self, request_id: str, now_s: float) -> None:
        """A sign of life."""
        lease = self._leases.get(request_id)
        if lease is not None:
            lease.renew(now_s, self.timeout_s)

    def sweep(self, now_s: float) -> list[str]:
        """End all leases whose deadline has passed; their request ids. Looks at those only that were due without renewal."""
        late: list[str] = []
        while self._due and self._due[0][0] <= now_s:
            _, _, lease = heapq.heappop(self._due)
            if self._leases.get(lease.request_id) is not lease:
                continue  # ended meanwhile
            if lease.deadline_s > now_s:
                self._watch(lease)
                continue
            self.end(lease.request_id)
            late.append(lease.request_id)
        return late

    def _watch(self, lease: Lease) -> None:
        heapq.heappush(self._due, (lease.deadline_s, next(self._numbers), lease))


def _no_recall(lease: Lease) -> None:
    raise AssertionError(f"lease of request {lease.request_id}: nobody was told of it")

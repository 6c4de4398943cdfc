"""From which replica a prompt's prefix is fetched where it is to be computed: any that holds more of it, if that is faster.

What was told of a cache may be gone when it is asked for, and then the time was lost; so what the way takes counts more than
once. Replicas of all roles lend, decode too: it holds the chats that it has written. So do those that part with their requests,
which then need not be computed again elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ernie_cluster.policy.cost import transfer_s
from ernie_cluster.policy.fleet import Member, Pool
from ernie_cluster.policy.holders import Trail
from ernie_cluster.policy.snapshot import ReplicaSnapshot

_DOUBT = 1.5
"""Weight of the way."""
_FETCH_S = 0.003
"""To ask the source and be answered, beside a hand-over."""
_TIMEOUT_S = 0.5
_TIMEOUT_WEIGHT = 4.0
_MAX_TIMEOUT_S = 2.0
"""A prefix is waited for as long as the second says in terms of what it should take, the first more, the third at most."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """A prefix that comes from another replica."""

    source: str
    num_blocks: int
    """From the start of the prompt."""
    timeout_s: float
    """Afterwards the prompt is computed without."""


@dataclass(frozen=True, slots=True)
class Offer:
    """One that is to be had, with its price."""

    fetch: Fetch
    cost_s: float
    """Until it is there, with the doubt that it comes."""


class Sources:
    """Those that could lend to one prompt.

    Args:
        trail: of its chain.
        pools: whose replicas have KV, one of each role.
        allowed: the replicas that may be asked.
        parted: those that may be asked, too, while they drain.
    """

    def __init__(self, trail: Trail, pools: tuple[Pool, Pool, Pool], allowed: int, parted: int) -> None:
        self._pools = a, b, c = pools
        parting = (allowed | parted) & (a.parting | b.parting | c.parting)
        self._depth, self._mask = trail.present(allowed & (a.mask | b.mask | c.mask) | parting)
        self._lenders: dict[int, list[Member]] = {}  # by the set that they are the best of

    def best(self, target: ReplicaSnapshot, depth: int) -> Offer | None:
        """The nearest of those that hold most; None where nobody holds more than the target, or too little more.

        Args:
            depth: leading blocks that the target holds.
        """
        num_tokens = (self._depth - depth) * target.block_size
        if num_tokens * target.rates.token_s <= _DOUBT * _FETCH_S:
            return None
        (a, b, c), node = self._pools, target.node_id
        near = self._mask & (a.on(node) | b.on(node) | c.on(node))
        best_s, source = math.inf, ""
        for member in self._least_busy(near or self._mask):
            now = member.now
            if now.block_size == target.block_size and now.replica_id != target.replica_id:
                best_s, source = min((best_s, source), (transfer_s(now, target, num_tokens), now.replica_id))
        if not source:
            return None
        fetch_s = _FETCH_S + best_s
        if fetch_s > _MAX_TIMEOUT_S:
            return None
        timeout_s = min(_TIMEOUT_S + _TIMEOUT_WEIGHT * fetch_s, _MAX_TIMEOUT_S)
        return Offer(Fetch(source, self._depth, timeout_s), _DOUBT * fetch_s)

    def _least_busy(self, among: int) -> list[Member]:
        """One of each role at most, beside those that part."""
        if among not in self._lenders:
            self._lenders[among] = [m for pool in self._pools for m in pool.lenders(among, _tells_weight)]
        return self._lenders[among]


def _tells_weight(source: ReplicaSnapshot) -> bool:
    """Else nobody knows what the way takes."""
    return source.token_bytes > 0

"""Whether a request can be served: ever, and now. Pure functions of the fleet; knows no clock and no replica."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ernie_cluster.config.cluster import Role, RouterConfig
from ernie_cluster.errors import ContextTooLong, Overloaded, RequestError
from ernie_cluster.policy.cost import decode_s, queue_s
from ernie_cluster.policy.fleet import Fleet
from ernie_cluster.policy.snapshot import Demand, ReplicaSnapshot

_MAX_RETRY_S = 60.0
"""Further ahead nobody can see."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not served."""

    reason: str
    """Which resource is short, with the numbers."""
    retry_after_s: float | None
    """When a retry is worth while; None = never."""

    def to_error(self) -> RequestError:
        """What the client gets to see."""
        if self.retry_after_s is None:
            return ContextTooLong(self.reason)
        return Overloaded(self.reason, self.retry_after_s)


def blocks_needed(demand: Demand, block_size: int, reserve_output_tokens: int) -> int:
    """KV blocks for the prompt and a first stretch of output. 30 + 8 tokens in blocks of 16 are 3."""
    num_tokens = demand.num_prompt_tokens + min(demand.max_tokens, reserve_output_tokens)
    return -(-num_tokens // block_size)


def own_blocks(replica: ReplicaSnapshot, demand: Demand, limits: RouterConfig, *, answers: bool) -> int:
    """KV blocks that a request takes of a replica.

    Args:
        answers: whether the answer is written there, too; else the prompt's KV leaves.
    """
    return blocks_needed(demand, replica.block_size, limits.reserve_output_tokens if answers else 0)


def has_room(replica: ReplicaSnapshot, demand: Demand, limits: RouterConfig, *, answers: bool | None = None) -> bool:
    """Whether a replica can take its stage of a request now.

    Vision, prefill and mixed queue: an unfilled queue takes a request of any size. All but vision must have the blocks.

    Args:
        answers: as of `own_blocks`; None = as its role says.
    """
    if replica.role != "decode" and replica.waiting_tokens >= limits.max_queued_tokens:
        return False
    if replica.role == "vision":
        return True
    is_written_here = replica.role != "prefill" if answers is None else answers
    return own_blocks(replica, demand, limits, answers=is_written_here) <= replica.free_blocks


def never_fits(demand: Demand, fleet: Fleet) -> Refusal | None:
    """Refusal of a request that no replica of its model could hold even when idle, else None.

    Looks also at replicas that are not ready, draining or excluded: they say how large replicas of this model are.
    """
    stages: tuple[tuple[tuple[Role, ...], int, str], ...] = (
        (("prefill", "mixed"), demand.num_prompt_tokens, "prompt"),
        (("decode", "mixed"), demand.num_prompt_tokens + demand.max_tokens, "prompt + max_tokens"),
    )
    for roles, num_tokens, what in stages:
        capacities = [fleet.pool(demand.model, role).capacity for role in roles]
        capacity = max((c for c in capacities if c is not None), default=None)
        if capacity is not None and num_tokens > capacity:
            reason = f"{what} = {num_tokens} tokens, but the largest replica of {demand.model!r} holds {capacity}"
            return Refusal(f"{reason}; shorten the prompt or lower max_tokens", retry_after_s=None)
    return None


def refuse(demand: Demand, fleet: Fleet, limits: RouterConfig, *, exclude: Collection[str]) -> Refusal:
    """What a request that fits nowhere now is told: what is short, and when that may be otherwise."""
    return _refusal(_wanted(demand, fleet), demand, fleet, limits, exclude)


def refuse_encoding(demand: Demand, fleet: Fleet, limits: RouterConfig, *, exclude: Collection[str]) -> Refusal:
    """The same of pictures of which nothing but a vector is wanted."""
    return _refusal(["vision"], demand, fleet, limits, exclude)


def _refusal(
    roles: Iterable[Role], demand: Demand, fleet: Fleet, limits: RouterConfig, exclude: Collection[str]
) -> Refusal:
    reasons: list[str] = []
    wait_s = limits.retry_after_s
    for role in roles:
        peers = [r for r in fleet.pool(demand.model, role).usable if r.replica_id not in exclude]
        if not any(has_room(r, demand, limits) for r in peers):
            reasons.append(_shortage(role, demand, peers, limits))
            wait_s = max(wait_s, min((_room_in_s(r, demand, limits) for r in peers), default=0.0))
    return Refusal(f"{demand.model!r}: {'; '.join(reasons)}", min(wait_s, _MAX_RETRY_S))


def _wanted(demand: Demand, fleet: Fleet) -> list[Role]:
    """Roles that a request may use, given which ones are deployed; prefill and decode while none is known."""
    deployed = fleet.roles(demand.model)
    wanted: list[Role] = ["vision"] if demand.num_media else []
    if deployed - {"vision"} != {"mixed"}:
        wanted += ["prefill", "decode"]
    return [*wanted, "mixed"] if "mixed" in deployed else wanted


def _room_in_s(replica: ReplicaSnapshot, demand: Demand, limits: RouterConfig) -> float:
    """When a full replica may have room, by what it works off.

    A queue shrinks at the measured rate. Blocks come back as answers end: each sequence is taken for an average one, in
    the middle of an answer of the reserved length.
    """
    wait_s = 0.0
    if replica.role != "decode" and replica.waiting_tokens >= limits.max_queued_tokens:
        excess = replica.waiting_tokens - limits.max_queued_tokens + 1
        wait_s = queue_s(replica) * excess / replica.waiting_tokens
    if replica.role != "vision":
        short = own_blocks(replica, demand, limits, answers=replica.role != "prefill") - replica.free_blocks
        used = replica.total_blocks - replica.free_blocks
        if short > 0 and used > 0:
            all_s = queue_s(replica)
            if replica.role != "prefill":
                all_s += decode_s(replica, limits.reserve_output_tokens)
            wait_s = max(wait_s, all_s * min(1.0, short / used))
    return wait_s


def _shortage(role: Role, demand: Demand, peers: list[ReplicaSnapshot], limits: RouterConfig) -> str:
    """What the replicas of one role are short of, given that none has room."""
    if not peers:
        return f"no {role} replica is ready"
    parts: list[str] = []
    if role != "decode":
        parts.append(f"{min(r.waiting_tokens for r in peers)} tokens wait, limit {limits.max_queued_tokens}")
    if role != "vision":
        best = max(peers, key=lambda r: (r.free_blocks * r.block_size, r.replica_id))
        need = own_blocks(best, demand, limits, answers=role != "prefill")
        parts.append(f"{need} blocks needed, {best.free_blocks} free")
    return f"every {role} replica is full (at best {', '.join(parts)})"

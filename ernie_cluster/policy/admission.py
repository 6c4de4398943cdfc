"""Whether a request can be served: ever, and now. Pure functions of the fleet; knows no clock and no replica."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ernie_cluster.config.pool import Role
from ernie_cluster.config.router import RouterConfig
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
    is_late: bool = False
    """There is room, but its answer would come after its deadline: waiting makes that no better."""

    def to_error(self) -> RequestError:
        """What the client gets to see."""
        if self.retry_after_s is None:
            return ContextTooLong(self.reason)
        return Overloaded(self.reason, self.retry_after_s)


@dataclass(frozen=True, slots=True)
class Need:
    """What a request takes of a replica, worked out once for all that are looked at."""

    prompt_tokens: int
    """KV where the prompt is read and the answer is not written."""
    total_tokens: int
    """KV where the answer is written: the prompt, and a first stretch of output."""
    max_queued_tokens: int

    @classmethod
    def of(cls, demand: Demand, limits: RouterConfig) -> Need:
        """Of one request."""
        stretch = min(demand.max_tokens, limits.reserve_output_tokens)
        return cls(demand.num_prompt_tokens, demand.num_prompt_tokens + stretch, limits.max_queued_tokens)

    def tokens(self, replica: ReplicaSnapshot) -> int:
        """KV that the role of a replica takes."""
        return self.prompt_tokens if replica.role == "prefill" else self.total_tokens

    def fits(self, replica: ReplicaSnapshot) -> bool:
        """Whether a replica can take the stage of its role now.

        Vision, prefill and mixed queue: an unfilled queue takes a request of any size. All but vision must have the
        blocks.
        """
        if replica.role != "decode" and replica.waiting_tokens >= self.max_queued_tokens:
            return False
        return replica.role == "vision" or self.tokens(replica) <= replica.free_blocks * replica.block_size

    def can_answer(self, replica: ReplicaSnapshot) -> bool:
        """Whether a prefill replica can take the answer, too."""
        return self.fits(replica) and self.total_tokens <= replica.free_blocks * replica.block_size


def blocks_for(num_tokens: int, replica: ReplicaSnapshot) -> int:
    """KV blocks that hold so many tokens. 38 tokens in blocks of 16 are 3."""
    return -(-num_tokens // replica.block_size)


def never_fits(demand: Demand, fleet: Fleet) -> Refusal | None:
    """Refusal of a request that no replica of its model could hold even when idle, else None.

    Looks also at replicas that are not ready, draining or excluded: they say how large replicas of this model are.
    """
    stages: tuple[tuple[Role, int, str], ...] = (
        ("prefill", demand.num_prompt_tokens, "prompt"),
        ("decode", demand.num_prompt_tokens + demand.max_tokens, "prompt + max_tokens"),
    )
    for role, num_tokens, what in stages:
        capacity = max(fleet.pool(demand.model, role).capacity, fleet.pool(demand.model, "mixed").capacity)
        if 0 < capacity < num_tokens:
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
    need, reasons = Need.of(demand, limits), list[str]()
    wait_s = limits.retry_after_s
    for role in roles:
        peers = [r for r in fleet.pool(demand.model, role).usable if r.replica_id not in exclude]
        if not any(map(need.fits, peers)):
            reasons.append(_shortage(role, need, peers))
            wait_s = max(wait_s, min((_room_in_s(r, need, limits) for r in peers), default=0.0))
    return Refusal(f"{demand.model!r}: {'; '.join(reasons)}", min(wait_s, _MAX_RETRY_S))


def _wanted(demand: Demand, fleet: Fleet) -> list[Role]:
    """Roles that a request may use, given which ones are deployed; prefill and decode while none is known."""
    deployed = fleet.roles(demand.model)
    wanted: list[Role] = ["vision"] if demand.num_media else []
    if deployed - {"vision"} != {"mixed"}:
        wanted += ["prefill", "decode"]
    return [*wanted, "mixed"] if "mixed" in deployed else wanted


def _room_in_s(replica: ReplicaSnapshot, need: Need, limits: RouterConfig) -> float:
    """When a full replica may have room, by what it works off.

    A queue shrinks at the measured rate. Blocks come back as answers end: each sequence is taken for an average one, in
    the middle of an answer of the reserved length.
    """
    wait_s = 0.0
    if replica.role != "decode" and replica.waiting_tokens >= need.max_queued_tokens:
        excess = replica.waiting_tokens - need.max_queued_tokens + 1
        wait_s = queue_s(replica) * excess / replica.waiting_tokens
    if replica.role != "vision":
        short = blocks_for(need.tokens(replica), replica) - replica.free_blocks
        used = replica.total_blocks - replica.free_blocks
        if short > 0 and used > 0:
            all_s = queue_s(replica)
            if replica.role != "prefill":
                all_s += decode_s(replica, limits.reserve_output_tokens)
            wait_s = max(wait_s, all_s * min(1.0, short / used))
    return wait_s


def _shortage(role: Role, need: Need, peers: list[ReplicaSnapshot]) -> str:
    """What the replicas of one role are short of, given that none has room."""
    if not peers:
        return f"no {role} replica is ready"
    parts: list[str] = []
    if role != "decode":
        parts.append(f"{min(r.waiting_tokens for r in peers)} tokens wait, limit {need.max_queued_tokens}")
    if role != "vision":
        best = max(peers, key=lambda r: (r.free_blocks * r.block_size, r.replica_id))
        parts.append(f"{blocks_for(need.tokens(best), best)} blocks needed, {best.free_blocks} free")
    return f"every {role} replica is full (at best {', '.join(parts)})"

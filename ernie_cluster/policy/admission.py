"""Whether a request can be served: ever, and now. Pure functions of snapshots; knows no clock and no replica."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ernie_cluster.config.cluster import Role, RouterConfig
from ernie_cluster.errors import ContextTooLong, Overloaded, RequestError
from ernie_cluster.policy.snapshot import Demand, ReplicaSnapshot


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


@dataclass(frozen=True, slots=True)
class Candidates:
    """Replicas that have room for a request now. Either `mixed` holds some, or both `prefill` and `decode` do."""

    vision: tuple[ReplicaSnapshot, ...]
    """Empty also when the request has no media."""
    prefill: tuple[ReplicaSnapshot, ...]
    decode: tuple[ReplicaSnapshot, ...]
    mixed: tuple[ReplicaSnapshot, ...]


def blocks_needed(demand: Demand, block_size: int, reserve_output_tokens: int) -> int:
    """KV blocks for the prompt and a first stretch of output. 30 + 8 tokens in blocks of 16 are 3."""
    num_tokens = demand.num_prompt_tokens + min(demand.max_tokens, reserve_output_tokens)
    return -(-num_tokens // block_size)


def has_room(replica: ReplicaSnapshot, demand: Demand, limits: RouterConfig) -> bool:
    """Whether a replica can take its stage of a request now.

    Vision and prefill queue: an unfilled queue takes a request of any size. Decode must have the blocks. Mixed: both.
    """
    has_queue = replica.role == "decode" or replica.waiting_tokens < limits.max_queued_tokens
    has_blocks = replica.role in ("vision", "prefill") or (
        blocks_needed(demand, replica.block_size, limits.reserve_output_tokens) <= replica.free_blocks
    )
    return has_queue and has_blocks


def never_fits(demand: Demand, replicas: Iterable[ReplicaSnapshot]) -> Refusal | None:
    """Refusal of a request that no replica of its model could hold even when idle, else None.

    Looks also at replicas that are not ready, draining or excluded: they say how large replicas of this model are.
    """
    stages: tuple[tuple[tuple[Role, ...], int, str], ...] = (
        (("prefill", "mixed"), demand.num_prompt_tokens, "prompt"),
        (("decode", "mixed"), demand.num_prompt_tokens + demand.max_tokens, "prompt + max_tokens"),
    )
    known = [r for r in replicas if r.model == demand.model and r.total_blocks]
    for roles, num_tokens, what in stages:
        capacity = max((r.total_blocks * r.block_size for r in known if r.role in roles), default=None)
        if capacity is not None and num_tokens > capacity:
            reason = f"{what} = {num_tokens} tokens, but the largest replica of {demand.model!r} holds {capacity}"
            return Refusal(f"{reason}; shorten the prompt or lower max_tokens", retry_after_s=None)
    return None


def admit(
    demand: Demand,
    replicas: Collection[ReplicaSnapshot],
    limits: RouterConfig,
    *,
    exclude: Collection[str] = frozenset(),
) -> Candidates | Refusal:
    """Replicas with room for each stage of a request, or why there are none.

    Args:
        replicas: a view with the open promises folded in, in any order; other models' replicas are passed over.
        exclude: ids of replicas not to be used, for example those that just failed this request.
    """
    never = never_fits(demand, replicas)
    if never is not None:
        return never
    usable = _usable(demand, replicas, exclude)
    roomy = [r for r in usable if has_room(r, demand, limits)]
    found = Candidates(
        vision=tuple(r for r in roomy if r.role == "vision" and demand.num_media),
        prefill=tuple(r for r in roomy if r.role == "prefill"),
        decode=tuple(r for r in roomy if r.role == "decode"),
        mixed=tuple(r for r in roomy if r.role == "mixed"),
    )
    if (found.vision or not demand.num_media) and (found.mixed or (found.prefill and found.decode)):
        return found
    short = [role for role in _wanted(demand, replicas) if not getattr(found, role)]
    reasons = "; ".join(_shortage(role, demand, usable, limits) for role in short)
    return Refusal(f"{demand.model!r}: {reasons}", limits.retry_after_s)


def admit_encoder(
    demand: Demand,
    replicas: Collection[ReplicaSnapshot],
    limits: RouterConfig,
    *,
    exclude: Collection[str] = frozenset(),
) -> tuple[ReplicaSnapshot, ...] | Refusal:
    """Vision replicas with room for pictures of which nothing but a vector is wanted; arguments as of `admit`."""
    usable = _usable(demand, replicas, exclude)
    roomy = tuple(r for r in usable if r.role == "vision" and has_room(r, demand, limits))
    if roomy:
        return roomy
    return Refusal(f"{demand.model!r}: {_shortage('vision', demand, usable, limits)}", limits.retry_after_s)


def _usable(demand: Demand, replicas: Iterable[ReplicaSnapshot], exclude: Collection[str]) -> list[ReplicaSnapshot]:
    return [r for r in replicas if r.model == demand.model and r.is_usable and r.replica_id not in exclude]


def _wanted(demand: Demand, replicas: Iterable[ReplicaSnapshot]) -> list[Role]:
    """Roles that a request may use, given which ones are deployed; prefill and decode while none is known."""
    deployed = {r.role for r in replicas if r.model == demand.model}
    wanted: list[Role] = ["vision"] if demand.num_media else []
    if deployed - {"vision"} != {"mixed"}:
        wanted += ["prefill", "decode"]
    return [*wanted, "mixed"] if "mixed" in deployed else wanted


def _shortage(role: Role, demand: Demand, usable: Iterable[ReplicaSnapshot], limits: RouterConfig) -> str:
    """What the replicas of one role are short of, given that none has room."""
    peers = [r for r in usable if r.role == role]
    if not peers:
        return f"no {role} replica is ready"
    parts: list[str] = []
    if role != "decode":
        parts.append(f"{min(r.waiting_tokens for r in peers)} tokens wait, limit {limits.max_queued_tokens}")
    if role in ("decode", "mixed"):
        best = max(peers, key=lambda r: (r.free_blocks * r.block_size, r.replica_id))
        need = blocks_needed(demand, best.block_size, limits.reserve_output_tokens)
        parts.append(f"{need} blocks needed, {best.free_blocks} free")
    return f"every {role} replica is full (at best {', '.join(parts)})"

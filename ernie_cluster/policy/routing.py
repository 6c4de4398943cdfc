"""Which replicas serve a request: one decision for the whole path, with its reasons and what it takes of each.

Fewest waiting tokens for vision and prefill, most free blocks for decode; a mixed replica is prefill and decode in
one. Ties go to the lower replica id, so that the order of the snapshots does not matter.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ernie_cluster.config.cluster import RouterConfig
from ernie_cluster.policy.admission import Candidates, Refusal, admit, admit_encoder, blocks_needed
from ernie_cluster.policy.snapshot import Demand, Promise, ReplicaSnapshot


@dataclass(frozen=True, slots=True)
class Path:
    """The replicas of one request."""

    encoder: str | None
    """None when the request has no media."""
    prefill: str
    decode: str
    """The same as `prefill` when one mixed replica does both."""
    reasons: tuple[str, ...]
    """Why each of them, one line per stage."""
    promises: tuple[Promise, ...]
    """What to book before any work starts, one per replica."""

    @property
    def is_mixed(self) -> bool:
        """Whether no KV has to travel."""
        return self.prefill == self.decode


def choose_path(
    demand: Demand,
    replicas: Collection[ReplicaSnapshot],
    limits: RouterConfig,
    *,
    exclude: Collection[str] = frozenset(),
) -> Path | Refusal:
    """Pick encoder, prefill and decode together, or refuse.

    Args:
        replicas: a view with the open promises folded in, in any order.
        exclude: ids of replicas not to be used.
    """
    candidates = admit(demand, replicas, limits, exclude=exclude)
    if isinstance(candidates, Refusal):
        return candidates
    prefill, decode = _choose_engines(candidates)
    reasons: list[str] = []
    promises: list[Promise] = []
    encoder: ReplicaSnapshot | None = None
    if demand.num_media:
        encoder = min(candidates.vision, key=_queue_rank)
        reasons.append(f"vision {encoder.replica_id}: {_queue_reason(encoder, candidates.vision)}")
        promises.append(Promise(encoder.replica_id, media_tokens=demand.media_tokens))
    else:
        reasons.append("vision none: no media")
    blocks = blocks_needed(demand, decode.block_size, limits.reserve_output_tokens)
    tokens = demand.num_prompt_tokens
    block_reason = f"needs {blocks} of {decode.free_blocks} free blocks"
    if prefill is decode:
        rivals = (*candidates.mixed, *(candidates.prefill if candidates.decode else ()))
        reasons.append(f"mixed {decode.replica_id}: {_queue_reason(decode, rivals)}, {block_reason}")
        promises.append(Promise(decode.replica_id, blocks=blocks, tokens=tokens))
    else:
        rivals = (*candidates.prefill, *candidates.mixed)
        reasons.append(f"prefill {prefill.replica_id}: {_queue_reason(prefill, rivals)}")
        reasons.append(f"decode {decode.replica_id}: most room of {len(candidates.decode)}, {block_reason}")
        promises += [Promise(prefill.replica_id, tokens=tokens), Promise(decode.replica_id, blocks=blocks)]
    return Path(
        encoder=encoder.replica_id if encoder else None,
        prefill=prefill.replica_id,
        decode=decode.replica_id,
        reasons=tuple(reasons),
        promises=tuple(promises),
    )


def choose_encoder(
    model: str,
    num_tokens: int,
    replicas: Collection[ReplicaSnapshot],
    limits: RouterConfig,
    *,
    exclude: Collection[str] = frozenset(),
) -> Promise | Refusal:
    """Pick the vision replica for a picture that belongs to no prompt, or refuse; what is to be booked names it.

    Args:
        num_tokens: that the picture would take in a prompt.
        replicas, exclude: as of `choose_path`.
    """
    demand = Demand(model, num_tokens, max_tokens=1, num_media=1, media_tokens=num_tokens)
    roomy = admit_encoder(demand, replicas, limits, exclude=exclude)
    if isinstance(roomy, Refusal):
        return roomy
    return Promise(min(roomy, key=_queue_rank).replica_id, media_tokens=num_tokens)


def _choose_engines(candidates: Candidates) -> tuple[ReplicaSnapshot, ReplicaSnapshot]:
    """(prefill, decode): the shortest queue, be it a prefill replica's with its decode partner, or a mixed one's."""
    starts = candidates.mixed
    if candidates.decode:
        starts += candidates.prefill
    first = min(starts, key=_queue_rank)
    return (first, first) if first.role == "mixed" else (first, min(candidates.decode, key=_room_rank))


def _queue_rank(replica: ReplicaSnapshot) -> tuple[int, int, str]:
    return replica.waiting_tokens, -replica.free_blocks * replica.block_size, replica.replica_id


def _room_rank(replica: ReplicaSnapshot) -> tuple[int, int, str]:
    return -replica.free_blocks * replica.block_size, replica.num_running, replica.replica_id


def _queue_reason(chosen: ReplicaSnapshot, rivals: Collection[ReplicaSnapshot]) -> str:
    return f"fewest waiting tokens of {len(rivals)}, {chosen.waiting_tokens}"

"""Which replicas take a request in the replay: as the router decides, or its rule in short for very many replicas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Protocol

from ernie_cluster.config.pool import Role
from ernie_cluster.config.router import RouterConfig
from ernie_cluster.policy.admission import Refusal
from ernie_cluster.policy.fleet import Fleet
from ernie_cluster.policy.replay.machine import Job, SimReplica
from ernie_cluster.policy.routing import choose_path
from ernie_cluster.policy.snapshot import Demand, Rates, ReplicaSnapshot

Chosen = tuple[SimReplica | None, SimReplica, SimReplica]
"""Encoder (None without media), prefill, decode."""
ByRole = Mapping[Role, Sequence[SimReplica]]
"""Replicas of one model that take work."""

_BLOCK = 16


class Route(Protocol):
    """Picks the path of a request."""

    def __call__(self, job: Job, replicas: ByRole) -> Chosen | None:
        """None = refused."""
        ...


@dataclass(frozen=True, slots=True)
class PolicyRoute:
    """`policy.routing.choose_path`, with what a perfect view of the replicas would show."""

    limits: RouterConfig = field(default_factory=RouterConfig)

    def __call__(self, job: Job, replicas: ByRole) -> Chosen | None:
        known = {r.replica_id: r for group in replicas.values() for r in group}
        demand = Demand(
            job.model,
            job.prompt_tokens,
            job.output_tokens,
            num_media=1 if job.media_tokens else 0,
            media_tokens=job.media_tokens,
        )
        path = choose_path(demand, Fleet.of(map(_snapshot, known.values())), self.limits)
        if isinstance(path, Refusal):
            return None
        return known[path.encoder] if path.encoder else None, known[path.prefill], known[path.decode]


@dataclass(frozen=True, slots=True)
class LeastLoaded:
    """Shortest queue, most room: one look at each replica and nothing built, for a thousand of them."""

    limits: RouterConfig = field(default_factory=RouterConfig)

    def __call__(self, job: Job, replicas: ByRole) -> Chosen | None:
        most = self.limits.max_queued_tokens
        need = job.prompt_tokens + min(job.output_tokens, self.limits.reserve_output_tokens)
        encoder = min(replicas["vision"], key=_queued, default=None) if job.media_tokens else None
        if job.media_tokens and (encoder is None or encoder.queued_tokens >= most):
            return None
        prefill = min(replicas["prefill"], key=_queued, default=None)
        decode = min(replicas["decode"], key=_leased, default=None)
        mixed = min(replicas["mixed"], key=_queued, default=None)
        if mixed is not None and (mixed.queued_tokens >= most or mixed.free_kv < need):
            mixed = None
        is_split = (
            prefill is not None and prefill.queued_tokens < most and decode is not None and decode.free_kv >= need
        )
        if mixed is not None and not (is_split and prefill and prefill.queued_tokens <= mixed.queued_tokens):
            return encoder, mixed, mixed
        if not is_split or prefill is None or decode is None:
            return None
        return encoder, prefill, decode


_queued = attrgetter("queued_tokens")
_leased = attrgetter("leased_kv")


def _snapshot(replica: SimReplica) -> ReplicaSnapshot:
    costs = replica.costs
    return ReplicaSnapshot(
        replica_id=replica.replica_id,
        model=replica.model,
        role=replica.role,
        node_id="",
        incarnation="",
        is_ready=True,
        is_draining=False,
        num_running=len(replica.batch),
        num_waiting=len(replica.queue),
        waiting_tokens=int(replica.queued_tokens),
        free_blocks=max(0, int(replica.free_kv / _BLOCK)),
        total_blocks=costs.kv_tokens // _BLOCK,
        block_size=_BLOCK,
        rates=Rates(
            chunk_s=costs.base_s,
            token_s=costs.per_prompt_token_s,
            step_s=costs.base_s,
            sequence_s=0.0,
            picture_s=0.0,
            media_token_s=costs.per_media_token_s,
        ),
    )

"""What the processes of one application tell each other; plain data, so that nobody imports torch to read it."""

from __future__ import annotations

from dataclasses import dataclass

from ernie_cluster.actors.direct import Address
from ernie_cluster.config.cluster import ClusterConfig, Role
from ernie_cluster.config.experts import ExpertUse
from ernie_cluster.config.parallel import WHOLE, Shard
from ernie_cluster.policy.routing import Path
from ernie_cluster.request import MediaInput, RequestFailed, Span, TokenEvent
from ernie_cluster.transport.choose import Endpoint

NAMESPACE = "ernie_cluster"
"""Ray namespace of our named actors."""

Outcome = TokenEvent | RequestFailed


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """How a replica is reached."""

    replica_id: str
    incarnation: str
    """Another one after each start."""
    model: str
    role: Role
    node_id: str
    actor_name: str
    """Name of its rank 0 in `NAMESPACE`."""
    address: Address
    """Of its rank 0, for direct calls."""
    endpoint: Endpoint


Meeting = tuple[str, int]
"""Host and port where the ranks of a gang find each other."""


@dataclass(frozen=True, slots=True)
class RankArgs:
    """What a rank is made of."""

    config: ClusterConfig
    """Of the whole application."""
    model: str
    """Served name."""
    role: Role
    """Decides which weights are loaded."""
    actor_name: str
    """The rank's own, in `NAMESPACE`."""
    num_cpus: float
    """Cores that it may use."""
    shard: Shard = WHOLE
    """Its share of the model."""


@dataclass(frozen=True, slots=True)
class Ready:
    """What a rank tells when its weights are loaded."""

    address: Address
    endpoint: Endpoint
    node_id: str
    pid: int
    load_s: float


@dataclass(frozen=True, slots=True)
class Load:
    """What a rank has to do, at one moment. A vision rank has no blocks and no leases."""

    num_running: int
    num_waiting: int
    waiting_tokens: int
    """Prompt tokens not computed yet; of a vision rank, media tokens not encoded yet."""
    num_leases: int = 0
    free_blocks: int = 0
    total_blocks: int = 0
    experts: ExpertUse | None = None

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs, waits or is expected."""
        return not (self.num_running or self.num_waiting or self.waiting_tokens or self.num_leases)


@dataclass(frozen=True, slots=True)
class Route:
    """The replicas that serve one attempt, each with how to reach it."""

    path: Path
    encoder: ReplicaInfo | None
    prefill: ReplicaInfo
    decode: ReplicaInfo | None
    """None when the prefill replica decodes too."""

    @property
    def replicas(self) -> tuple[ReplicaInfo, ...]:
        return tuple(r for r in (self.encoder, self.prefill, self.decode) if r is not None)


@dataclass(frozen=True, slots=True)
class EncodeTask:
    """Pictures of one attempt for a vision replica."""

    request_id: str
    epoch: int
    media: tuple[MediaInput, ...]
    """In prompt order, with patches."""
    destination: Endpoint
    """The prefill replica."""


@dataclass(frozen=True, slots=True)
class EncodeReport:
    """What a vision replica did for a task."""

    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """Outcomes on their way to one API replica."""

    number: int
    """Ascending; the next poll acknowledges it."""
    outcomes: tuple[Outcome, ...]

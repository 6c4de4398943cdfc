"""What the processes of one application tell each other; plain data, so that nobody imports torch to read it."""

from __future__ import annotations

from dataclasses import dataclass

from ernie_cluster.actors.direct import Address
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.deployment import ModelDeployment
from ernie_cluster.config.experts import ExpertUse
from ernie_cluster.config.parallel import WHOLE, Shard
from ernie_cluster.config.pool import Role, weights_role
from ernie_cluster.deltas import Delta
from ernie_cluster.policy.routing import Path
from ernie_cluster.policy.scaling.observe import Work
from ernie_cluster.policy.snapshot import Rates
from ernie_cluster.request import MediaInput, RequestFailed, Span, TokenEvent
from ernie_cluster.transport.choose import Endpoint

NAMESPACE = "ernie_cluster"
"""Ray namespace of our named actors."""

Outcome = TokenEvent | RequestFailed


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """How a replica is reached."""

    replica_id: str
    gang: str
    """The replica whose ranks these are; its id is the same unless it has several groups that take requests."""
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
    version: str | None = None
    """Of its model, see `ModelDeployment.version`; None = as configured now."""
    started_s: float = 0.0
    """When it was ready, Unix time."""


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
    """Of its pool: what it does at first."""
    actor_name: str
    """The rank's own, in `NAMESPACE`."""
    num_cpus: float
    """Cores that it may use."""
    shard: Shard = WHOLE
    """Its share of the model."""

    @property
    def deployment(self) -> ModelDeployment:
        return self.config.model(self.model)

    @property
    def weights_role(self) -> Role:
        """What its weights must be able to do."""
        return weights_role(self.role, switch_roles=self.deployment.switch_roles)


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
    rates: Rates = Rates()
    token_bytes: int = 0
    """What one token weighs on its way from here."""
    role: Role | None = None
    """What it does at present; None = as it was started."""
    is_draining: bool = False
    """An operator or the autoscaler wants it to take no more."""
    is_leaving: bool = False
    """It takes no more for good: its process is about to end."""
    within_s: float | None = None
    """After how long it then parts with what it has, as it was told; None = never."""
    num_prompts: int = 0
    """Requests whose prompt it computes, or whose KV it still hands over."""
    num_answers: int = 0
    """Requests that it decodes, or will, as their KV is on its way."""
    is_lending: bool = False
    """Others fetch from its cache, or will soon: requests that had to leave."""
    work: Work = Work()

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs, waits, is expected or is on its way to another replica; and nobody comes for what he left."""
        now = (self.num_running, self.num_waiting, self.waiting_tokens, self.num_leases)
        return not any((*now, self.num_prompts, self.num_answers, self.is_lending))


@dataclass(frozen=True, slots=True)
class Told:
    """A rank's answer to the router's question what is new."""

    load: Load
    cached: Delta
    """What came and went in its cache: KV blocks, on a vision rank pictures."""
    held_s: float
    """For how long it waited for news before it looked."""


@dataclass(frozen=True, slots=True)
class Route:
    """The replicas that serve one attempt, each with how to reach it."""

    path: Path
    encoders: tuple[ReplicaInfo, ...]
    """In the order of the path's shares."""
    prefill: ReplicaInfo
    decode: ReplicaInfo | None
    """None when the prefill replica decodes too."""
    source: ReplicaInfo | None = None
    """Has the prefix that the path says; what becomes of it does not matter."""

    @property
    def engines(self) -> tuple[ReplicaInfo, ...]:
        """Those that the answer's tokens come from; the last of them decodes."""
        return (self.prefill, *(() if self.decode is None else (self.decode,)))

    @property
    def links(self) -> dict[str, str]:
        """By id, the replica that each sends its work to."""
        links = {encoder.replica_id: self.prefill.replica_id for encoder in self.encoders}
        return links if self.decode is None else {**links, self.prefill.replica_id: self.decode.replica_id}


@dataclass(frozen=True, slots=True)
class Ended:
    """An attempt that is over, however it ended; what the API replica measured of it."""

    key: str
    """Names the attempt."""
    ttft_s: float | None = None
    """From the request's acceptance to its first token; None without one, and after an earlier attempt."""
    tpot_s: float | None = None
    """Mean time of each token after the first; None of fewer than two."""
    output_tokens: int = 0
    """Generated in this attempt."""
    path_ttft_s: float | None = None
    """From the router's decision to the first token, in any attempt: what `Path.ttft_s` foretells."""
    served: tuple[str, ...] = ()
    """Replicas that have done all of their part."""


@dataclass(frozen=True, slots=True)
class EncodeTask:
    """Pictures of one attempt for a vision replica."""

    request_id: str
    epoch: int
    media: dict[int, MediaInput]
    """With patches, by their numbers among all of the request; others of it may be another replica's."""
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

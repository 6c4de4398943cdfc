"""Replicas of one role of one model."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from ernie_cluster.config.checks import check_labels, check_positive, check_range
from ernie_cluster.config.parallel import ParallelDims
from ernie_cluster.config.quantization import Quantization
from ernie_cluster.errors import ConfigError

Role = Literal["vision", "prefill", "decode", "mixed"]


def can_serve(roles: Collection[Role]) -> bool:
    """Whether replicas of these roles bring a prompt to its answer."""
    return "mixed" in roles or {"prefill", "decode"} <= set(roles)


def weights_role(role: Role, *, switch_roles: bool) -> Role:
    """What the weights of a replica that starts in `role` must be able to do; `switch_roles` as in `ModelDeployment`."""
    return "mixed" if switch_roles and role != "vision" else role


@dataclass(frozen=True, slots=True)
class EplbConfig:
    """Expert-parallel load balancing: experts of a gang move to where the ranks have equally much to do."""

    enabled: bool = False
    """Move experts, between two steps, by the tokens that each has had. Answers stay the same. For gangs only."""
    interval_steps: int = 1000
    """Steps between two decisions, at least 1; each looks at the tokens since the one before."""
    redundant_experts: int = 0
    """Slots of each rank, layer and modality for copies of hot experts, at least 0, while `enabled`; each costs the memory
    of an expert. With 0 experts change places only."""
    min_gain: float = 0.05
    """A layer's experts stay unless the fullest rank would lose at least this part of its load, 0 to 1."""

    def __post_init__(self) -> None:
        check_range(self, 1, "interval_steps")
        check_range(self, 0, "redundant_experts")
        check_range(self, 0, "min_gain", high=1)


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """All replicas of one role of one model."""

    role: Role
    """What the replicas do at first; vision: pictures to embeddings, mixed: prefill and decode in one place."""
    num_replicas: int = 1
    """Replicas, at least 1, at the start where there is `scaling`; each is a gang of `tp * dp` ranks."""
    num_cpus: float = 1.0
    """CPU cores per rank, more than 0; fractions share a core."""
    num_gpus: float = 0.0
    """GPUs per rank, 0 to 1; fractions share a GPU."""
    node_labels: tuple[str, ...] = ()
    """Labels, each as `key=value`, that a node must have to run these replicas: of `ray start --labels`, or of the cluster's
    node types; none = any node."""
    tp: int = 1
    """Tensor-parallel ranks, at least 1; 1 in vision pools."""
    dp: int = 1
    """Data-parallel groups of `tp` ranks, at least 1; 1 in vision pools."""
    eplb: EplbConfig = EplbConfig()
    """Where experts stand; only where `tp * dp` is more than 1."""
    quantization: Literal["auto", Quantization] = "auto"
    """auto = the model's; another one is refused, see `ModelDeployment`."""
    min_replicas: int = 0
    """Replicas that always do this work, at least 0; only with `scaling`."""
    max_replicas: int | None = None
    """Most that may do this work, at least `num_replicas`; None = as many as the budget holds. Only with `scaling`."""

    def __post_init__(self) -> None:
        check_range(self, 1, "num_replicas")
        check_range(self, 0, "min_replicas")
        check_range(self, self.num_replicas, "max_replicas")
        if self.min_replicas > self.num_replicas:
            raise ConfigError(
                f"{self.role} pool: min_replicas = {self.min_replicas} is more than num_replicas = {self.num_replicas}, which it "
                "begins with; raise num_replicas"
            )
        check_positive(self, "num_cpus")
        check_range(self, 0, "num_gpus", high=1)
        check_labels(self, "node_labels")
        world = self.dims.world  # checks both
        if self.role == "vision" and world > 1:
            raise ConfigError(
                f"vision pool: tp * dp = {self.tp} * {self.dp} = {world} must be 1; "
                "a picture is encoded on one rank, so raise num_replicas instead"
            )
        if self.eplb.enabled and world == 1:
            raise ConfigError(
                f"{self.role} pool: eplb.enabled with tp * dp = 1: one rank has all experts; raise tp or dp, or turn it off"
            )

    @property
    def dims(self) -> ParallelDims:
        """How one replica's ranks split the model."""
        return ParallelDims(self.tp, self.dp, self.eplb.redundant_experts if self.eplb.enabled else 0)

"""What an operator sees of a running application, and can ask of its replicas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from pydantic import ConfigDict

from ernie_cluster.config.faults import FaultRule
from ernie_cluster.faults import FaultOrder

Phase = Literal["starting", "ready", "switching", "draining"]
"""starting: takes no work yet. switching: takes work of its new role and finishes that of its former one. draining:
finishes what it has and takes no more."""

Role = Literal["vision", "prefill", "decode", "mixed"]

_TOLD = ConfigDict(use_attribute_docstrings=True)
"""So that `/openapi.json` says of each field what stands here."""


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One replica: a gang of ranks that live and die together."""

    __pydantic_config__ = _TOLD

    replica: str
    """Its id, which the orders below take."""
    model: str
    home: Role
    """Of the pool that it was started in."""
    role: Role
    """What it does at present."""
    phase: Phase
    node: str
    """Empty while it starts."""
    gpus: float
    """That all its ranks hold."""
    num_running: int = 0
    num_waiting: int = 0
    waiting_tokens: int = 0
    free_blocks: int = 0
    total_blocks: int = 0
    age_s: float = 0.0
    """Since it last told of itself."""
    num_leases: int = 0
    """Answers whose KV blocks are promised and whose KV is on its way."""
    started_s: float = 0.0
    """When it was ready for its first request, Unix time; 0 while it starts."""


@dataclass(frozen=True, slots=True)
class ModelView:
    """One served model, averaged over the last seconds."""

    __pydantic_config__ = _TOLD

    name: str
    is_ready: bool
    detail: str
    """What is missing, if not."""
    num_held: int
    """Requests that wait for a place, or for the model to wake up."""
    requests_per_s: float = 0.0
    """Offered, those refused included."""
    prompt_tokens_per_s: float = 0.0
    """Offered, of prompts that no cache holds."""
    output_tokens_per_s: float = 0.0
    ttft_p90_s: float | None = None
    """Measured; None where nothing ended lately."""
    tpot_p90_s: float | None = None
    needs: Mapping[str, float] | None = None
    """Replicas that each role needs by the last look of the autoscaler; None where it knows none, or is off."""


@dataclass(frozen=True, slots=True)
class DecisionView:
    """One action of the autoscaler or of an operator, or what it would have done and could not."""

    __pydantic_config__ = _TOLD

    at_s: float
    """Unix time."""
    model: str
    """Empty where it concerns none."""
    action: str
    """switch_role, move_gpus, scale_out, scale_in, scale_to_zero, wake_up, note; of operators drain,
    undrain, restart, role."""
    replicas: tuple[str, ...]
    """That it names."""
    detail: str
    """In words, such as "2 prefill -> decode"."""
    reason: str


@dataclass(frozen=True, slots=True)
class ClusterView:
    """Everything, at one moment."""

    __pydantic_config__ = _TOLD

    models: tuple[ModelView, ...]
    replicas: tuple[ReplicaView, ...]
    """By model, home and id."""
    is_autoscaled: bool
    budget: float
    """What all replicas together may hold; what the pools began with where nothing scales."""
    used: float
    budget_unit: Literal["GPUs", "cores"]
    """Cores where no pool has GPUs."""
    decisions: tuple[DecisionView, ...]
    """The last few, newest first."""
    num_promises: int = 0
    """What the router has booked for attempts that are under way."""


@dataclass(frozen=True, slots=True)
class FaultView:
    """A fault on purpose, in one process."""

    __pydantic_config__ = _TOLD

    process: str
    """Which one: a replica's actor, `router`, or `api/<id>`."""
    fault: FaultRule
    left_s: float | None
    """Until it is over; null = it comes from the configuration, and stays."""
    num_hits: int
    """How often its point was passed."""
    num_struck: int
    """How often it struck."""


@dataclass(frozen=True, slots=True)
class FaultsView:
    """All faults on purpose, of all processes that answer."""

    __pydantic_config__ = _TOLD

    faults: tuple[FaultView, ...]
    silent: tuple[str, ...]
    """Replicas that do not answer now."""


@dataclass(frozen=True, slots=True)
class Order:
    """What an operator wants of one replica."""

    replica: str
    action: Literal["drain", "undrain", "restart", "role"]
    """drain: finish what it has and take no more, until undrain. restart: drain, and then end, so that another one is started
    in its place. role: get work of `role` from now on."""
    role: Role | None = None
    within_s: float | None = None
    """When others go on with what a drained replica still has, at least 0; None = after `router.drain_timeout_s`."""


class Operations(Protocol):
    """Who carries orders out and tells how things are."""

    async def cluster(self) -> ClusterView:
        """How things are; answers within a second.

        Raises:
            ReplicaError: nobody can tell.
        """
        ...

    async def decisions(self) -> list[DecisionView]:
        """The last 1,000, newest first. Errors as of `cluster`."""
        ...

    async def faults(self, order: FaultOrder) -> FaultsView:
        """Set a fault on purpose, end those that were set so, or tell of all.

        Raises:
            Forbidden: this server is not set up for it.
            ReplicaError: the router does not answer.
        """
        ...

    async def order(self, order: Order) -> ReplicaView:
        """Carry an order out; the replica as it is then.

        Raises:
            UnknownReplica: there is none of this name.
            OrderRefused: it cannot be done; the message says why, for example a role that its model has no pool for.
            ReplicaError: the replica, or the router, does not answer.
        """
        ...

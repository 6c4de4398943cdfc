"""What the scaling decision looks at: replicas, and what was measured since the last look."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ernie_cluster.config.pool import Role
from ernie_cluster.sums import Sums

Phase = Literal["planned", "starting", "silent", "ready", "switching", "draining"]
"""planned: waits for the GPUs of a move, holds none yet. starting: holds GPUs, takes no work yet. silent: runs, and has not
registered yet or not again, so nobody can tell it anything. switching: gets work of `role`, and finishes that of its former
one beside. draining: finishes its work, then stops; counts for nothing but its GPUs."""

ENGINE_ROLES: tuple[Role, ...] = ("prefill", "decode", "mixed")


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """One replica."""

    replica_id: str
    role: Role
    """What it does, or will do."""
    gpus: float = 0.0
    """That it holds, or will."""
    phase: Phase = "ready"
    load: float = 0.0
    """Of what takes longest to drain: queued tokens, or KV tokens in use. Only compared within a role."""

    @property
    def holds_gpus(self) -> bool:
        return self.phase != "planned"

    @property
    def counts(self) -> bool:
        """Whether it serves, or will."""
        return self.phase != "draining"


@dataclass(frozen=True, slots=True)
class StageStats:
    """One stage of one model since the last look; zeros where nothing came."""

    requests_per_s: float = 0.0
    """Offered, refused ones included."""
    tokens_per_s: float = 0.0
    """prefill, vision: offered, of prompts that no cache holds or of pictures. decode: emitted, as nobody knows how long an
    answer will be."""
    backlog_tokens: float = 0.0
    """Waiting now, on all replicas of the stage."""
    latency_p90_s: float | None = None
    """Measured: TTFT (prefill), TPOT (decode); None where nothing ended, and of vision, which is a part of TTFT."""
    samples: Sums = Sums()
    """prefill, vision: (tokens, seconds of computing) of each prompt or picture. decode: (KV tokens of the batch, seconds)
    of steps that held no prefill."""


@dataclass(frozen=True, slots=True)
class ModelState:
    """One model."""

    name: str
    replicas: tuple[ReplicaState, ...]
    prefill: StageStats = StageStats()
    decode: StageStats = StageStats()
    vision: StageStats = StageStats()
    kv_tokens: float = 0.0
    """That one decode replica can hold, 0 while not known."""
    context_tokens: float = 0.0
    """KV tokens of a running sequence, on average; 0 while none runs."""
    num_held: int = 0
    """Requests in the wake-up queue: accepted while no replica is there."""
    idle_s: float = 0.0
    """Since the last request ended or came; 0 while any is in flight."""

    def count(self, role: Role) -> int:
        """Replicas that do this or will."""
        return sum(r.role == role and r.counts for r in self.replicas)

    def silent(self, *roles: Role) -> int:
        """Those that may be dead for all that is known."""
        return sum(r.role in roles and r.phase == "silent" for r in self.replicas)


@dataclass(frozen=True, slots=True)
class ScalingSnapshot:
    """Everything, at one moment."""

    models: tuple[ModelState, ...] = field(default=())
    """Those of the configuration, each once; one that is missing is left alone."""

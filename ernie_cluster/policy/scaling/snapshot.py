"""What the scaling decision looks at: replicas, and what was measured since the last look."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ernie_cluster.config.scaling import PoolRole

Phase = Literal["planned", "starting", "ready", "switching", "draining"]
"""planned: waits for the GPUs of a move, holds none yet. starting: holds GPUs, takes no work yet. switching: gets work of
`role`, and finishes that of its former one beside. draining: finishes its work, then stops; counts for nothing but its GPUs."""

ENGINE_ROLES: tuple[PoolRole, ...] = ("prefill", "decode", "mixed")


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """One replica."""

    replica_id: str
    role: PoolRole
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
class Sums:
    """Measured durations against sizes, as sums, so that they add up over replicas and fade with time."""

    n: float = 0.0
    x: float = 0.0
    t: float = 0.0
    xx: float = 0.0
    xt: float = 0.0

    @staticmethod
    def of(*points: tuple[float, float]) -> Sums:
        """Of (size, seconds) each."""
        total = Sums()
        for x, t in points:
            total = total + Sums(1.0, x, t, x * x, x * t)
        return total

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.n + other.n, self.x + other.x, self.t + other.t, self.xx + other.xx, self.xt + other.xt)

    def faded(self, factor: float) -> Sums:
        return Sums(self.n * factor, self.x * factor, self.t * factor, self.xx * factor, self.xt * factor)

    @property
    def line(self) -> tuple[float, float]:
        """(seconds at size 0, seconds per unit of size): least squares, neither of them negative.

        Where all sizes were alike, nothing says how it grows: it is taken not to, until larger ones are seen.
        """
        if not self.n:
            return 0.0, 0.0
        spread = self.xx * self.n - self.x * self.x
        slope = (self.xt * self.n - self.x * self.t) / spread if spread > 1e-6 * self.xx * self.n else 0.0
        slope = min(max(slope, 0.0), self.t / self.x if self.x else 0.0)
        return (self.t - slope * self.x) / self.n, slope

    @property
    def variation(self) -> float:
        """Squared coefficient of variation of the sizes."""
        return max(0.0, self.xx * self.n / (self.x * self.x) - 1.0) if self.x else 0.0


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

    def count(self, role: PoolRole) -> int:
        """Replicas that do this or will."""
        return sum(r.role == role and r.counts for r in self.replicas)


@dataclass(frozen=True, slots=True)
class ScalingSnapshot:
    """Everything, at one moment."""

    models: tuple[ModelState, ...] = field(default=())
    """Those of the configuration, each once; one that is missing is left alone."""

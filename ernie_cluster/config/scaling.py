"""What an operator lets the autoscaler do: targets, bounds per pool and model, one budget of GPUs."""

from __future__ import annotations

from dataclasses import dataclass

from ernie_cluster.config.checks import check_positive, check_range, check_unique
from ernie_cluster.config.pool import Role, can_serve
from ernie_cluster.errors import ConfigError

ROUNDING = 1e-9
"""GPUs that two sums may differ by and be the same: three times 0.1 is more than 0.3."""


@dataclass(frozen=True, slots=True)
class Targets:
    """What nine requests in ten are to see."""

    ttft_s: float = 2.0
    """From acceptance to the first token, more than 0."""
    tpot_s: float = 0.05
    """Per token after the first, more than 0."""
    queue_s: float = 1.0
    """In the queue of a stage (encoding, prefill), more than 0."""

    def __post_init__(self) -> None:
        check_positive(self, "ttft_s", "tpot_s", "queue_s")


@dataclass(frozen=True, slots=True)
class PoolBounds:
    """How many replicas of a model may do one kind of work."""

    role: Role
    """What they do at present, not the pool that they were started in."""
    gpus: float
    """That one replica holds, at least 0."""
    min_replicas: int = 0
    """At least 0."""
    max_replicas: int = 10_000
    """At least `min_replicas`."""

    def __post_init__(self) -> None:
        check_range(self, 0, "gpus", "min_replicas")
        if self.max_replicas < self.min_replicas:
            raise ConfigError(
                f"{self.role}: max_replicas = {self.max_replicas} must be at least min_replicas = {self.min_replicas}"
            )


@dataclass(frozen=True, slots=True)
class ModelBounds:
    """One model's share in the decision. A role that has no entry in `pools` is never given."""

    name: str
    """As it is served."""
    pools: tuple[PoolBounds, ...]
    """Mixed, or prefill and decode, or all three; each role once."""
    targets: Targets = Targets()
    floor: int = 1
    """Engine replicas (prefill, decode, mixed) that no other model and no lull may take, at least 0."""
    idle_to_zero_s: float | None = None
    """After this long without a request all replicas stop, where `floor` and all minima are 0; None = never."""
    may_switch: bool = True
    """Whether engine replicas may change their roles."""

    def __post_init__(self) -> None:
        roles = [p.role for p in self.pools]
        if len(set(roles)) < len(roles):
            raise ConfigError(f"pools of {self.name!r}: {roles} names a role twice; give each its own")
        if not can_serve(roles):
            raise ConfigError(f"pools of {self.name!r}: {roles} cannot serve; add mixed, or prefill and decode")
        check_range(self, 0, "floor")
        if self.idle_to_zero_s is not None:
            check_positive(self, "idle_to_zero_s")
        if self.idle_to_zero_s is not None and (self.floor or any(p.min_replicas for p in self.pools)):
            raise ConfigError(
                f"{self.name!r}: idle_to_zero_s = {self.idle_to_zero_s:g} with floor = {self.floor} and min_replicas = "
                f"{max(p.min_replicas for p in self.pools)}: it could never sleep; set floor: 0 and every min_replicas to 0"
            )

    def pool(self, role: Role) -> PoolBounds | None:
        """Bounds of a role, None where it is never given."""
        return next((p for p in self.pools if p.role == role and p.max_replicas), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingPace:
    """How fast and how readily the autoscaler changes things."""

    smoothing_s: float = 10.0
    """Time constant with which demand and measured rates are averaged, more than 0."""
    memory_s: float = 90.0
    """Time constant with which a past peak of demand is forgotten, before replicas are given up; more than 0."""
    settle_s: float = 20.0
    """A role switch is not taken back, and a model that was taken from gives no more, for this long; at least 0."""
    down_delay_s: float = 60.0
    """For how long fewer replicas must have been enough before one stops, at least 0."""
    margin: float = 0.1
    """Gain below which nothing is changed, a fraction; at least 0. It widens by itself where few requests make the
    measurements noisy."""
    max_share: float = 0.34
    """Part of a role's replicas that one decision changes at most (one always may), more than 0."""

    def __post_init__(self) -> None:
        check_range(self, 0, "settle_s", "down_delay_s", "margin")
        check_positive(self, "smoothing_s", "memory_s", "max_share")


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoscalerConfig(ScalingPace):
    """That there is an autoscaler, and what it may spend."""

    budget: float | None = None
    """GPUs that all replicas together may hold; cores, where no pool has GPUs. None = what the pools begin with: then roles
    change and models take from each other, and nothing grows."""
    interval_s: float = 1.0
    """Between two decisions, more than 0."""
    drain_timeout_s: float = 600.0
    """A replica that is to stop finishes its answers for at most this long, more than 0; the rest go on elsewhere."""
    wake_up_timeout_s: float = 600.0
    """Requests for a model that was scaled to zero wait this long for it, more than 0."""

    def __post_init__(self) -> None:
        ScalingPace.__post_init__(self)
        check_range(self, 0, "budget")
        check_positive(self, "interval_s", "drain_timeout_s", "wake_up_timeout_s")


@dataclass(frozen=True, slots=True)
class ScalingConfig:
    """One decision over all pools of all models."""

    models: tuple[ModelBounds, ...]
    """Each once."""
    total_gpus: float
    """The budget: what all replicas together may hold, at least 0."""
    pace: ScalingPace = ScalingPace()

    def __post_init__(self) -> None:
        check_unique("model", [m.name for m in self.models])
        check_range(self, 0, "total_gpus")
        least = sum(p.gpus * p.min_replicas for m in self.models for p in m.pools)
        if least > self.total_gpus + ROUNDING:
            raise ConfigError(
                f"min_replicas of all pools hold {least:g} GPUs, the budget is {self.total_gpus:g}; raise it, or lower them"
            )

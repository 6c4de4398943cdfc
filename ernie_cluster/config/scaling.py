"""What an operator lets the autoscaler do: targets, bounds per pool and model, one budget of GPUs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ernie_cluster.errors import ConfigError

PoolRole = Literal["vision", "prefill", "decode", "mixed"]
"""The same as `config.cluster.Role`, which stands above this file."""


def _check(owner: object, low: float, *names: str, is_open: bool = False) -> None:
    """Raise ConfigError unless each named field is None, or finite and at least (`is_open`: above) `low`."""
    for name in names:
        value = getattr(owner, name)
        if value is None or (math.isfinite(value) and (value > low or (value == low and not is_open))):
            continue
        raise ConfigError(f"{name} = {value} must be {'more than' if is_open else 'at least'} {low:g}")


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
        _check(self, 0, "ttft_s", "tpot_s", "queue_s", is_open=True)


@dataclass(frozen=True, slots=True)
class PoolBounds:
    """How many replicas of a model may do one kind of work."""

    role: PoolRole
    """What they do at present, not the pool that they were started in."""
    gpus: float
    """That one replica holds, at least 0."""
    min_replicas: int = 0
    """At least 0."""
    max_replicas: int = 10_000
    """At least `min_replicas`."""

    def __post_init__(self) -> None:
        _check(self, 0, "gpus", "min_replicas")
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

    def __post_init__(self) -> None:
        roles = [p.role for p in self.pools]
        if len(set(roles)) < len(roles):
            raise ConfigError(f"pools of {self.name!r}: {roles} names a role twice; give each its own")
        if "mixed" not in roles and not {"prefill", "decode"} <= set(roles):
            raise ConfigError(f"pools of {self.name!r}: {roles} cannot serve; add mixed, or prefill and decode")
        _check(self, 0, "floor")
        _check(self, 0, "idle_to_zero_s", is_open=True)
        if self.idle_to_zero_s is not None and (self.floor or any(p.min_replicas for p in self.pools)):
            raise ConfigError(
                f"{self.name!r}: idle_to_zero_s = {self.idle_to_zero_s:g} needs floor and every min_replicas to be 0"
            )

    def pool(self, role: PoolRole) -> PoolBounds | None:
        """Bounds of a role, None where it is never given."""
        return next((p for p in self.pools if p.role == role and p.max_replicas), None)


@dataclass(frozen=True, slots=True)
class ScalingConfig:
    """One decision over all pools of all models."""

    models: tuple[ModelBounds, ...]
    """Each once."""
    total_gpus: float
    """The budget: what all replicas together may hold, at least 0."""
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
        names = [m.name for m in self.models]
        if len(set(names)) < len(names):
            raise ConfigError(f"models {names} names one twice; give each its own bounds")
        _check(self, 0, "total_gpus", "settle_s", "down_delay_s", "margin")
        _check(self, 0, "smoothing_s", "memory_s", "max_share", is_open=True)
        least = sum(p.gpus * p.min_replicas for m in self.models for p in m.pools)
        if least > self.total_gpus:
            raise ConfigError(f"the minima of all pools hold {least:g} GPUs, total_gpus is {self.total_gpus:g}")

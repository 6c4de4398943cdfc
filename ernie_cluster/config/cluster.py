"""The whole configuration of one application: values, frozen, checked at birth.

What follows from a field is a property, never a second field. Names carry their units; `config.load` reads sizes
("256MiB") into `*_bytes` and durations ("30s") into `*_s`. Knows no file format, no Ray and no device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ernie_cluster.config.api import ApiConfig
from ernie_cluster.config.auto_model import AutoModelConfig
from ernie_cluster.config.checks import check_unique
from ernie_cluster.config.deployment import ModelDeployment
from ernie_cluster.config.faults import FaultsConfig
from ernie_cluster.config.pool import PoolConfig
from ernie_cluster.config.router import RouterConfig
from ernie_cluster.config.scaling import ROUNDING, AutoscalerConfig, ModelBounds, PoolBounds, ScalingConfig, ScalingPace
from ernie_cluster.config.transport import TransportConfig
from ernie_cluster.errors import ConfigError, UnknownModel

_AS_MANY_AS_FIT = 10_000
"""Replicas: the budget says how many."""


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """Everything that one application serves, and how."""

    models: tuple[ModelDeployment, ...]
    """Served models, at least one, with different names."""
    router: RouterConfig = RouterConfig()
    """Limits of admission and routing, the same for all models."""
    api: ApiConfig = ApiConfig()
    """The front door."""
    transport: TransportConfig = TransportConfig()
    """How KV and embeddings travel."""
    auto_model: AutoModelConfig | None = None
    """A name that stands for two of the models; None = there is none."""
    scaling: AutoscalerConfig | None = None
    """Who changes roles and numbers of replicas as the load changes; None = they stay as they are."""
    faults: FaultsConfig = FaultsConfig()
    """Faults on purpose, for tests and staging; there are none by default."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("models is empty; name at least one, for example {preset: tiny, path: FOLDER}")
        check_unique("model name", [m.name for m in self.models])
        self._check_scaling()
        if self.auto_model is not None:
            self.auto_model.check(tuple(m.name for m in self.models))
        if self.api.image_search is not None and self.search_model is None:
            wish = self.api.image_search.model
            whose = "any served model" if wish is None else f"a served model {wish!r}"
            raise ConfigError(f"api.image_search compares with the vision pool of {whose}, and there is none")

    def _check_scaling(self) -> None:
        if self.scaling is not None:
            self.bounds()  # says what cannot work
            return
        for model in self.models:
            changes = [k for p in model.pools for k in ("min_replicas", "max_replicas") if getattr(p, k)]
            if model.idle_to_zero_s is not None:
                changes.append("idle_to_zero_s")
            if changes:
                raise ConfigError(f"model {model.name!r}: {changes[0]} needs the autoscaler; add `scaling: {{}}`")

    @property
    def budget_unit(self) -> Literal["GPUs", "cores"]:
        """What replicas are counted in: cores where no pool has GPUs."""
        return "GPUs" if any(p.num_gpus for m in self.models for p in m.pools) else "cores"

    def holds(self, pool: PoolConfig) -> float:
        """What one replica of a pool takes of the budget."""
        return pool.dims.world * (pool.num_gpus if self.budget_unit == "GPUs" else pool.num_cpus)

    @property
    def budget(self) -> float:
        """What all replicas together may hold."""
        if self.scaling is not None and self.scaling.budget is not None:
            return self.scaling.budget
        return math.fsum(pool.num_replicas * self.holds(pool) for m in self.models for pool in m.pools)

    def bounds(self) -> ScalingConfig:
        """What the autoscaler may do.

        Raises:
            ConfigError: nothing that could be done keeps to it.
        """
        begin = math.fsum(pool.num_replicas * self.holds(pool) for m in self.models for pool in m.pools)
        if begin > self.budget + ROUNDING:
            raise ConfigError(
                f"scaling.budget = {self.budget:g} {self.budget_unit}, and the pools begin with {begin:g}; raise it, or lower "
                "num_replicas"
            )
        models = tuple(
            ModelBounds(
                m.name,
                tuple(
                    PoolBounds(p.role, self.holds(p), p.min_replicas, p.max_replicas or _AS_MANY_AS_FIT)
                    for p in m.pools
                ),
                m.targets,
                m.floor,
                m.idle_to_zero_s,
                may_switch=m.switch_roles,
            )
            for m in self.models
        )
        return ScalingConfig(models, self.budget, self.scaling or ScalingPace())

    def wake_up_s(self, model: str) -> float:
        """How long requests for a model may wait until it is back from zero replicas; 0 where it never goes there."""
        if self.scaling is None or self.model(model).idle_to_zero_s is None:
            return 0.0
        return self.scaling.wake_up_timeout_s

    @property
    def search_model(self) -> ModelDeployment | None:
        """The deployment that compares pictures for `image_search`."""
        if self.api.image_search is None:
            return None
        wish = self.api.image_search.model
        return next((m for m in self.models if m.has_vision_pool and wish in (None, m.name)), None)

    def model(self, name: str) -> ModelDeployment:
        """The deployment that serves `name`.

        Raises:
            UnknownModel: none does; the message lists those that are served.
        """
        for deployment in self.models:
            if deployment.name == name:
                return deployment
        raise UnknownModel(f"model {name!r} is not served here; known: {', '.join(m.name for m in self.models)}")

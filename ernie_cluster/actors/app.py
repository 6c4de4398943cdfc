"""ClusterConfig -> one Serve application. The only file that says who is bound to whom.

    ingress (FastAPI) ── router actor ── pools: "<model>-<role>", each replica a conductor with its ranks

The pools are arguments of the ingress only so that they belong to the application: requests do not go through Serve
handles, whose price is milliseconds, but from the API replica straight to the ranks.
"""

from __future__ import annotations

import uuid
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from ernie_cluster.actors.find_router import router_name
from ernie_cluster.actors.ingress import asgi_builder
from ernie_cluster.actors.planned import PLANNED_REPLICAS
from ernie_cluster.actors.replica import PoolReplica
from ernie_cluster.config.checks import label_selector
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.deployment import ModelDeployment
from ernie_cluster.config.pool import PoolConfig

APP_NAME = "ernie"

_MAX_CONCURRENT = 100_000
"""Serve's own per-replica bound; ours are the API's limits and the router's books."""
_MOST_REPLICAS = 10_000
_GRACE_S = 20.0
"""What running answers get to come to their end or go elsewhere when a replica is stopped."""


def build_app(config: ClusterConfig, app_name: str = APP_NAME) -> serve.Application:
    """The whole application, ready for `serve.run(..., name=app_name, route_prefix="/")`."""
    life = uuid.uuid4().hex[:8]
    pools = [_pool(config, m, pool, app_name, life) for m in config.models for pool in m.pools]
    return build_api(config, app_name, pools)


def build_api(config: ClusterConfig, app_name: str, pools: list[serve.Application]) -> serve.Application:
    """The ingress over these pools; without any it waits for replicas that register by themselves."""
    ingress = serve.deployment(
        name="api",
        num_replicas=config.api.num_replicas,
        max_ongoing_requests=_MAX_CONCURRENT,
        ray_actor_options={"num_cpus": 0, "label_selector": label_selector(config.api.node_labels)},
        graceful_shutdown_timeout_s=max(_GRACE_S, config.router.drain_timeout_s),
        max_surge_percent=100,  # deployed anew, one that takes connections is there before another stops to
        health_check_period_s=2,
    )(serve.ingress(asgi_builder(app_name, config))(_Api))
    return ingress.bind(pools)


class _Api:
    """State of the ASGI app lives in the app; this only holds the handles that keep the pools in the application."""

    def __init__(self, pools: list[Any]) -> None:
        self._pools = pools


def _pool(
    config: ClusterConfig, model: ModelDeployment, pool: PoolConfig, app_name: str, life: str
) -> serve.Application:
    bundle: dict[str, float] = {"CPU": pool.num_cpus}
    if pool.num_gpus:
        bundle["GPU"] = pool.num_gpus
    deployment = serve.deployment(
        name=model.deployment_name(pool.role),
        **_size(config, model, pool, app_name, life),
        max_ongoing_requests=_MAX_CONCURRENT,
        ray_actor_options={"num_cpus": 0},
        placement_group_bundles=[bundle] * pool.dims.world,
        placement_group_strategy="STRICT_PACK",
        placement_group_bundle_label_selector=[label_selector(pool.node_labels)] * pool.dims.world,
        health_check_period_s=1,
        health_check_timeout_s=5,
        graceful_shutdown_timeout_s=_GRACE_S,
    )(PoolReplica)
    return deployment.bind(app_name, config, model.name, pool.role)


def _size(config: ClusterConfig, model: ModelDeployment, pool: PoolConfig, app_name: str, life: str) -> dict[str, Any]:
    """How many replicas Serve keeps in a pool: a number, or what the plan says at any time."""
    if config.scaling is None:
        return {"num_replicas": pool.num_replicas}
    kwargs = {"router": router_name(app_name), "life": life, "model": model.name, "role": pool.role}
    policy = AutoscalingPolicy(policy_function=PLANNED_REPLICAS, policy_kwargs=kwargs)
    scaling = AutoscalingConfig(  # bounds and delays are the plan's own, so Serve's let everything pass
        min_replicas=0,
        max_replicas=_MOST_REPLICAS,
        initial_replicas=pool.num_replicas,
        upscale_delay_s=0,
        downscale_delay_s=0,
        downscale_to_zero_delay_s=0,
        policy=policy,
    )
    return {"autoscaling_config": scaling}

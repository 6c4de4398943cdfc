"""ClusterConfig -> one Serve application. The only file that says who is bound to whom.

    ingress (FastAPI) ── router actor ── pools: "<model>-<role>", each replica a conductor with its ranks

The pools are arguments of the ingress only so that they belong to the application: requests do not go through Serve
handles, whose price is milliseconds, but from the API replica straight to the ranks.
"""

from __future__ import annotations

from typing import Any

from ray import serve

from ernie_cluster.actors.ingress import asgi_builder
from ernie_cluster.actors.replica import PoolReplica
from ernie_cluster.config.cluster import ClusterConfig, ModelDeployment, PoolConfig

APP_NAME = "ernie"

_MAX_CONCURRENT = 100_000
"""Serve's own per-replica bound; ours are the API's limits and the router's books."""
_GRACE_S = 14.0
"""What running answers get to come to their end when a replica is stopped."""


def deployment_name(model: str, role: str) -> str:
    return f"{model}-{role}".replace("/", "_").replace("#", "_")


def build_app(config: ClusterConfig, app_name: str = APP_NAME) -> serve.Application:
    """The whole application, ready for `serve.run(..., name=app_name, route_prefix="/")`."""
    return build_api(config, app_name, [_pool(config, m, pool, app_name) for m in config.models for pool in m.pools])


def build_api(config: ClusterConfig, app_name: str, pools: list[serve.Application]) -> serve.Application:
    """The ingress over these pools; without any it waits for replicas that register by themselves."""
    ingress = serve.deployment(
        name="api",
        num_replicas=config.api.num_replicas,
        max_ongoing_requests=_MAX_CONCURRENT,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=_GRACE_S,
        health_check_period_s=2,
    )(serve.ingress(asgi_builder(app_name, config))(_Api))
    return ingress.bind(pools)


class _Api:
    """State of the ASGI app lives in the app; this only holds the handles that keep the pools in the application."""

    def __init__(self, pools: list[Any]) -> None:
        self._pools = pools


def _pool(config: ClusterConfig, model: ModelDeployment, pool: PoolConfig, app_name: str) -> serve.Application:
    bundle: dict[str, float] = {"CPU": pool.num_cpus}
    if pool.num_gpus:
        bundle["GPU"] = pool.num_gpus
    deployment = serve.deployment(
        name=deployment_name(model.name, pool.role),
        num_replicas=pool.num_replicas,
        max_ongoing_requests=_MAX_CONCURRENT,
        ray_actor_options={"num_cpus": 0},
        placement_group_bundles=[bundle] * pool.dims.world,
        placement_group_strategy="STRICT_PACK",
        health_check_period_s=1,
        health_check_timeout_s=5,
        graceful_shutdown_timeout_s=_GRACE_S,
    )(PoolReplica)
    return deployment.bind(app_name, config, model.name, pool.role)

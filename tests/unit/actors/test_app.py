"""Where Serve is told to put the parts of an application."""

from __future__ import annotations

from typing import Any

from ernie_cluster.actors.app import build_app
from ernie_cluster.config.api import ApiConfig
from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.deployment import ModelDeployment
from ernie_cluster.config.pool import PoolConfig


def placed(config: ClusterConfig) -> dict[str, Any]:
    """The labels that Serve looks for: of each pool's bundles, and of the API replicas."""
    ingress = build_app(config)._bound_deployment
    (pools,) = ingress.init_args
    found = {p._bound_deployment.name: p._bound_deployment._replica_config for p in pools}
    labels = {name: one.placement_group_bundle_label_selector for name, one in found.items()}
    return {"api": ingress.ray_actor_options.get("label_selector"), **labels}


def application(*pools: PoolConfig, api: ApiConfig) -> ClusterConfig:
    return ClusterConfig((ModelDeployment("m", "/m", pools),), api=api)


def test_pools_and_api_go_to_the_nodes_of_their_labels() -> None:
    pools = (PoolConfig("prefill", tp=2, node_labels=("pool=prefill", "zone=a")), PoolConfig("decode"))
    found = placed(application(*pools, api=ApiConfig(node_labels=("pool=api",))))
    assert found["api"] == {"pool": "api"}
    assert found["m-prefill"] == [{"pool": "prefill", "zone": "a"}] * 2
    assert not any(found["m-decode"])


def test_without_labels_they_go_anywhere() -> None:
    found = placed(application(PoolConfig("mixed"), api=ApiConfig()))
    assert not found["api"]
    assert not any(found["m-mixed"])

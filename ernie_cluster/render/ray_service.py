"""The RayService of KubeRay 1.7: the cluster, and the application on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ernie_cluster.config.checks import label_selector
from ernie_cluster.render import pods
from ernie_cluster.render.groups import NodeGroup
from ernie_cluster.render.options import RAY_VERSION, Options
from ernie_cluster.render.serve_config import API_DEPLOYMENT, serve_config
from ernie_cluster.render.setup import API, Setup
from ernie_cluster.render.text import yaml_text

REDIS = "ernie-redis"
REDIS_SECRET = "ernie-redis"
REDIS_PORT = 6379

_START_S = 1800
"""Weights of hundreds of gigabytes have to be read until the application runs."""

_HEADER = """\
Preset {name} on Kubernetes, by KubeRay 1.7.

Change first:
  image         in every group: what you have built from the Dockerfile and pushed
  nodeSelector  the label by which your nodes' GPUs are known; tolerations as your nodes' taints
  {network}

Pods, beside the head, which runs nothing of ours; a pod holds one replica:
{groups}

Ports, memory, GPUs and labels follow from the configuration in serveConfigV2: change that one, then render anew.
Written by `ernie-cluster render --target kuberay`; see k8s/README.md for how to apply it.
"""


def header(setup: Setup, groups: Sequence[NodeGroup], options: Options) -> str:
    """What to change first, and what it starts."""
    lines = [f"  {g.name}: {g.nodes}" + (f", {g.gpus} x {g.machine.gpu} each" if g.gpus else "") for g in groups]
    network = "NCCL          goes by TCP over eth0; where nodes have RDMA, render with --rdma RESOURCE"
    if options.rdma:
        network = f"{options.rdma} is what the nodes' adapters are named"
    return _HEADER.format(name=setup.name, groups="\n".join(lines), network=network)


def ray_service(setup: Setup, groups: Sequence[NodeGroup], options: Options) -> dict[str, Any]:
    """The object; `groups` with one replica per node."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": name_of(setup), "labels": {pods.NAME_LABEL: pods.NAME}},
        "spec": {
            "serviceUnhealthySecondThreshold": _START_S,
            "deploymentUnhealthySecondThreshold": _START_S,
            "excludeHeadPodFromServeSvc": True,
            "upgradeStrategy": {"type": "NewCluster"},
            "rayClusterDeletionDelaySeconds": pods.grace_s(setup.config),
            "serveConfigV2": yaml_text(_application(setup)),
            "rayClusterConfig": {
                "rayVersion": RAY_VERSION,
                "enableInTreeAutoscaling": True,
                "autoscalerOptions": {
                    "version": "v2",
                    "upscalingMode": "Default",
                    "idleTimeoutSeconds": 600,
                    "resources": {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"memory": "1Gi"}},
                },
                "authOptions": {"mode": "token"},
                "gcsFaultToleranceOptions": {
                    "redisAddress": f"{REDIS}:{REDIS_PORT}",
                    "redisPassword": {"valueFrom": {"secretKeyRef": {"name": REDIS_SECRET, "key": "password"}}},
                },
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
                    "template": pods.head_pod(setup, options),
                },
                "workerGroupSpecs": [_worker_group(setup, g, options) for g in groups],
            },
        },
    }


def _application(setup: Setup) -> dict[str, Any]:
    """The same as for `serve deploy`, with an API pod for each API replica: Prometheus finds one per pod, at one port."""
    document = serve_config(setup)
    for application in document["applications"]:
        application["deployments"] = [{"name": API_DEPLOYMENT, "max_replicas_per_node": 1}]
    return document


def name_of(setup: Setup) -> str:
    return f"ernie-{setup.name}"


def _worker_group(setup: Setup, group: NodeGroup, options: Options) -> dict[str, Any]:
    pod = pods.api_pod if group.name == API else pods.engine_pod
    spare = group.nodes if group.name == API else 0  # a new configuration's API replicas start before the old ones stop
    params = {"num-cpus": str(group.cpus), "object-store-memory": str(group.object_store_bytes)}
    if group.gpus:
        params["num-gpus"] = str(group.gpus)
    return {
        "groupName": group.name,
        "replicas": group.nodes,
        "minReplicas": group.nodes,
        "maxReplicas": group.max_nodes + spare,
        "numOfHosts": 1,
        "labels": label_selector(group.labels),
        "rayStartParams": params,
        "template": pod(setup, group, options),
    }

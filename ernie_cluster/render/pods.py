"""Pods of a RayCluster: the head, API nodes, and one pod per gang of a pool."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.environment import SETTINGS
from ernie_cluster.config.units import GIB
from ernie_cluster.render.groups import NodeGroup
from ernie_cluster.render.options import (
    AGENT_PORT,
    DASHBOARD_PORT,
    METRICS_PORT,
    RAY_PORT,
    REPLICA_PORT,
    Options,
)
from ernie_cluster.render.setup import API, KEYS_FILE, Setup
from ernie_cluster.render.text import quantity

NAME = "ernie-cluster"
NAME_LABEL = "app"  # app.kubernetes.io/name of its pods is KubeRay's
PART_LABEL = "pool"
HEAD = "head"
MODELS_CLAIM = "ernie-models"
KEYS_SECRET = "ernie-keys"
GPU_PRODUCTS: Mapping[str, str] = {
    "a100-80g": "NVIDIA-A100-SXM4-80GB",
    "h100-80g": "NVIDIA-H100-80GB-HBM3",
    "h200-141g": "NVIDIA-H200",
    "b200-180g": "NVIDIA-B200",
}
"""What NVIDIA's feature discovery labels nodes with."""

_USER = 1000
"""Of the image."""
_STOP_GRACE_S = 20.0
"""Serve's own, for what a replica is at; see actors/app.py."""
_MARGIN_S = 30
_ENDPOINTS_S = 10
"""A stopped API pod takes requests for so long, until all balancers know."""
_HEAD_BYTES = 8 * GIB
_HEAD_CPUS = 2


def grace_s(config: ClusterConfig) -> int:
    """What a pod is given to end: more than anything in it may take to hand over what it is at."""
    longest = max(_STOP_GRACE_S, config.router.drain_timeout_s, config.router.notice_s)
    return int(longest) + _ENDPOINTS_S + _MARGIN_S


def labels(part: str) -> dict[str, str]:
    """Of all pods of this kind, in whichever RayCluster."""
    return {NAME_LABEL: NAME, PART_LABEL: part}


def head_pod(setup: Setup, options: Options) -> dict[str, Any]:
    """Ray's tables and Serve's controller; nothing of ours but the place where applications are built."""
    ports = [_port("gcs-server", RAY_PORT), _port("dashboard", DASHBOARD_PORT), _port("metrics", METRICS_PORT)]
    ports.append(_port("serve", setup.config.api.port))
    container = {
        **_container(HEAD, setup, options, ports),
        "resources": _resources(_HEAD_CPUS, quantity(_HEAD_BYTES), {}),
        **_probes(_raylet_lives(), _raylet_lives()),
    }
    return _pod(HEAD, setup, container, shm="2Gi")


def api_pod(setup: Setup, group: NodeGroup, options: Options) -> dict[str, Any]:
    """One API replica; takes requests when every model can."""
    api = setup.config.api
    ports = [_port("serve", api.port), _port("metrics", METRICS_PORT), _port("api-metrics", REPLICA_PORT)]
    if api.grpc_port is not None:
        ports.append(_port("grpc", api.grpc_port))
    container = {
        **_container(API, setup, options, ports),
        "resources": _resources(group.all_cpus, quantity(group.memory_bytes), {}),
        **_probes({"httpGet": {"path": "/ready", "port": "serve"}}, _raylet_lives()),
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(_ENDPOINTS_S)]}}},
    }
    pod = _pod(API, setup, container, shm=quantity(group.shm_bytes))
    pod["spec"]["topologySpreadConstraints"] = [
        {
            "maxSkew": 1,
            "topologyKey": "kubernetes.io/hostname",
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": labels(API)},
        }
    ]
    return pod


def engine_pod(setup: Setup, group: NodeGroup, options: Options) -> dict[str, Any]:
    """One replica of a pool: all ranks of its gang."""
    extra = {"nvidia.com/gpu": str(group.gpus)} if group.gpus else {}
    if group.gpus and options.rdma:
        extra[options.rdma] = "1"
    container = {
        **_container(group.name, setup, options, [_port("metrics", METRICS_PORT)], gpus=bool(group.gpus)),
        "resources": _resources(group.all_cpus, quantity(group.memory_bytes), extra),
        **_probes(_raylet_lives(), _raylet_lives()),
    }
    pod = _pod(group.name, setup, container, shm=quantity(group.shm_bytes))
    if group.gpus:
        pod["spec"]["nodeSelector"] = {"nvidia.com/gpu.product": GPU_PRODUCTS[group.machine.gpu]}
        pod["spec"]["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return pod


def _pod(part: str, setup: Setup, container: dict[str, Any], shm: str) -> dict[str, Any]:
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": shm}}]
    if setup.folders:
        volumes.append({"name": "models", "persistentVolumeClaim": {"claimName": MODELS_CLAIM, "readOnly": True}})
    if _holds_keys(part, setup):
        volumes.append({"name": "keys", "secret": {"secretName": KEYS_SECRET}})
    spec = {
        "terminationGracePeriodSeconds": grace_s(setup.config),
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "fsGroup": _USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": volumes,
    }
    return {"metadata": {"labels": labels(part)}, "spec": spec}


def _container(
    part: str, setup: Setup, options: Options, ports: list[dict[str, Any]], *, gpus: bool = False
) -> dict[str, Any]:
    any_gpus = any(p.num_gpus for m in setup.config.models for p in m.pools)
    mounts: list[dict[str, Any]] = [{"name": "shm", "mountPath": "/dev/shm"}]
    if setup.folders:
        mounts.append({"name": "models", "mountPath": options.models_folder, "readOnly": True})
    if _holds_keys(part, setup):  # the folder, not the file: only so a change of the secret arrives
        mounts.append({"name": "keys", "mountPath": KEYS_FILE.rpartition("/")[0], "readOnly": True})
    allowed = ["IPC_LOCK"] if gpus and options.rdma else []
    capabilities = {"drop": ["ALL"]} | ({"add": allowed} if allowed else {})
    return {
        "name": "ray-head" if part == HEAD else "ray-worker",
        "image": options.image_for(gpus=any_gpus),
        "imagePullPolicy": "IfNotPresent",
        "ports": ports,
        "env": [{"name": k, "value": v} for k, v in _environment(options, gpus=gpus).items()],
        "volumeMounts": mounts,
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": capabilities},
    }


def _holds_keys(part: str, setup: Setup) -> bool:
    return part == API and setup.config.api.keys_file == KEYS_FILE


def _environment(options: Options, *, gpus: bool) -> dict[str, str]:
    found = {**SETTINGS, "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(REPLICA_PORT)}
    found["RAY_SERVE_PORT_QUARANTINE_S"] = (
        "0"  # the next API replica of a pod takes this port again, where it is measured
    )
    if gpus:
        found |= {"NCCL_DEBUG": "WARN", "NCCL_SOCKET_IFNAME": "eth0", "NCCL_IB_DISABLE": "0" if options.rdma else "1"}
    return found


def _resources(cpus: int, memory: str, extra: Mapping[str, str]) -> dict[str, Any]:
    """Requests and limits alike, so that neither memory nor cores are lent away."""
    amounts = {"cpu": str(cpus), "memory": memory, **extra}
    return {"requests": amounts, "limits": amounts}


def _probes(ready: dict[str, Any], lives: dict[str, Any]) -> dict[str, Any]:
    return {
        "startupProbe": {**lives, "periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 60},
        "livenessProbe": {**lives, "periodSeconds": 10, "timeoutSeconds": 10, "failureThreshold": 12},
        "readinessProbe": {**ready, "periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 3},
    }


def _raylet_lives() -> dict[str, Any]:
    return {"httpGet": {"path": "/api/local_raylet_healthz", "port": AGENT_PORT}}


def _port(name: str, number: int) -> dict[str, Any]:
    return {"name": name, "containerPort": number}

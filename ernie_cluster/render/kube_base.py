"""What every preset on Kubernetes shares: the way in, who may talk to whom, what is measured, and Redis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ernie_cluster.config.api import ApiConfig
from ernie_cluster.render.options import DASHBOARD_PORT, METRICS_PORT, REPLICA_PORT
from ernie_cluster.render.pods import HEAD, NAME, NAME_LABEL, labels
from ernie_cluster.render.ray_service import REDIS, REDIS_PORT, REDIS_SECRET
from ernie_cluster.render.setup import API
from ernie_cluster.render.text import Document
from ernie_cluster.render.watch import outputs

SERVICE = "ernie-api"
_REDIS_IMAGE = "redis:7.2.5-alpine"
PUBLIC_PATHS = ("/v1", "/tokenize", "/detokenize", "/openapi.json", "/ready", "/version")
"""What the Gateway lets in: neither /metrics nor what operators ask and order, nor the page to try the models."""
_GRPC_SERVICES = ("ernie_cluster.v1.Inference", "grpc.health.v1.Health")

HEADERS: Mapping[str, str] = {
    "kustomization": "What every preset shares; an overlay adds its RayService.",
    "service": "The way in, for both protocols: API pods that can serve every model. Nothing to change.",
    "routes": "HTTP and gRPC from a Gateway of yours.\n\nChange first:\n  parentRefs  name and namespace of your Gateway\n"
    "  hostnames   names that its certificates are for",
    "network-policy": "Who may reach the pods.\n\nChange first:\n  namespaces of your Gateway, of Prometheus and of KubeRay's operator",
    "pod-monitor": "What Prometheus (its operator) reads: Ray's metrics of every pod, ours of each API replica.\n\n"
    "Change first:\n  labels  those by which your Prometheus chooses PodMonitors\n"
    "With api.admin_key_sha256 set, /metrics needs that key: add `authorization` to its endpoint.",
    **outputs.KUBE_HEADERS,
    "redis": "Where Ray's tables outlive the head. One Redis with a disk will do to begin with.\n\n"
    "Change first:\n  nothing, or all of it: a Redis that your platform offers is better; gcsFaultToleranceOptions names it",
    "disruption": "The API stays reachable while nodes are drained. Nothing to change.",
}
"""What each file opens with."""


def base_files(api: ApiConfig) -> dict[str, tuple[str, Sequence[Document]]]:
    """File -> (header, documents), as they lie in k8s/base."""
    documents: dict[str, Sequence[Document]] = {
        "service": [_service(api)],
        "routes": [_http_route(api)] if api.grpc_port is None else [_http_route(api), _grpc_route(api)],
        "network-policy": [_network_policy(api), _redis_policy()],
        "pod-monitor": [_pod_monitor()],
        "alerts": [outputs.prometheus_rule()],
        "dashboards": [outputs.config_map()],
        "redis": _redis(),
        "disruption": [budget(API, 1 if api.num_replicas > 1 else 0)],
    }
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [f"{name}.yaml" for name in documents],
    }
    documents["kustomization"] = [kustomization]
    return {f"{name}.yaml": (HEADERS[name], found) for name, found in documents.items()}


def budget(part: str, most_missing: int) -> dict[str, Any]:
    """How many pods of a kind may be taken away at once; 0 = none, until somebody says so."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": f"ernie-{part}"},
        "spec": {"maxUnavailable": most_missing, "selector": {"matchLabels": labels(part)}},
    }


def _service(api: ApiConfig) -> dict[str, Any]:
    ports = [{"name": "http", "port": api.port, "targetPort": "serve", "appProtocol": "http"}]
    if api.grpc_port is not None:
        ports.append({"name": "grpc", "port": api.grpc_port, "targetPort": "grpc", "appProtocol": "kubernetes.io/h2c"})
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": SERVICE, "labels": {NAME_LABEL: NAME}},
        "spec": {"type": "ClusterIP", "selector": labels(API), "ports": ports},
    }


def _route(kind: str, rule: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": kind,
        "metadata": {"name": SERVICE},
        "spec": {
            "parentRefs": [{"name": "ernie", "namespace": "gateway"}],
            "hostnames": ["ernie.example.com" if kind == "HTTPRoute" else "grpc.ernie.example.com"],
            "rules": [rule],
        },
    }


def _http_route(api: ApiConfig) -> dict[str, Any]:
    rule = {
        "matches": [{"path": {"type": "PathPrefix", "value": path}} for path in PUBLIC_PATHS],
        "timeouts": {"request": "0s"},  # an answer may stream for long; api.request_timeout_s ends it
        "backendRefs": [{"name": SERVICE, "port": api.port}],
    }
    return _route("HTTPRoute", rule)


def _grpc_route(api: ApiConfig) -> dict[str, Any]:
    rule = {
        "matches": [{"method": {"type": "Exact", "service": name}} for name in _GRPC_SERVICES],
        "backendRefs": [{"name": SERVICE, "port": api.grpc_port}],
    }
    return _route("GRPCRoute", rule)


def _from(*namespaces: str) -> list[dict[str, Any]]:
    return [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": n}}} for n in namespaces]


def _ports(*numbers: int | None) -> list[dict[str, Any]]:
    return [{"protocol": "TCP", "port": n} for n in numbers if n is not None]


def _network_policy(api: ApiConfig) -> dict[str, Any]:
    ours = {"podSelector": {"matchLabels": {NAME_LABEL: NAME}}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "ernie"},
        "spec": {
            "podSelector": {"matchLabels": {NAME_LABEL: NAME}},
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [ours]},  # Ray and NCCL choose their ports
                {"from": _from("gateway"), "ports": _ports(api.port, api.grpc_port)},
                {"from": _from("monitoring"), "ports": _ports(METRICS_PORT, REPLICA_PORT)},
                {"from": _from("kuberay-system"), "ports": _ports(DASHBOARD_PORT, api.port)},
            ],
        },
    }


def _redis_policy() -> dict[str, Any]:
    head = {"podSelector": {"matchLabels": {NAME_LABEL: NAME}}}
    cleanup = {"podSelector": {"matchLabels": {"app.kubernetes.io/created-by": "kuberay-operator"}}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": REDIS},
        "spec": {
            "podSelector": {"matchLabels": {NAME_LABEL: REDIS}},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [head, cleanup], "ports": _ports(REDIS_PORT)}],
        },
    }


def _pod_monitor() -> dict[str, Any]:
    endpoints = [{"port": "metrics"}, {"port": "api-metrics", "path": "/metrics"}]
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {"name": "ernie", "labels": {"release": "prometheus"}},
        "spec": {
            "selector": {"matchLabels": {NAME_LABEL: NAME}},
            "podTargetLabels": [*labels(HEAD), "ray.io/cluster"],
            "podMetricsEndpoints": endpoints,
        },
    }


def _redis() -> list[dict[str, Any]]:
    mine = {NAME_LABEL: REDIS}
    password = {"name": "REDIS_PASSWORD", "valueFrom": {"secretKeyRef": {"name": REDIS_SECRET, "key": "password"}}}
    command = 'exec redis-server --appendonly yes --dir /data --requirepass "$REDIS_PASSWORD"'
    container = {
        "name": "redis",
        "image": _REDIS_IMAGE,
        "command": ["sh", "-c", command],
        "env": [password],
        "ports": [{"name": "redis", "containerPort": REDIS_PORT}],
        "readinessProbe": {"tcpSocket": {"port": "redis"}, "periodSeconds": 5},
        "resources": {"requests": {"cpu": "250m", "memory": "512Mi"}, "limits": {"memory": "512Mi"}},
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    pod = {
        "securityContext": {"runAsNonRoot": True, "runAsUser": 999, "fsGroup": 999},
        "containers": [container],
    }
    claim = {
        "metadata": {"name": "data"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "10Gi"}}},
    }
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": REDIS},
            "spec": {"selector": mine, "ports": [{"name": "redis", "port": REDIS_PORT, "targetPort": "redis"}]},
        },
        {
            "apiVersion": "apps/v1",
            "kind": "StatefulSet",
            "metadata": {"name": REDIS},
            "spec": {
                "serviceName": REDIS,
                "replicas": 1,
                "selector": {"matchLabels": mine},
                "template": {"metadata": {"labels": mine}, "spec": pod},
                "volumeClaimTemplates": [claim],
            },
        },
    ]

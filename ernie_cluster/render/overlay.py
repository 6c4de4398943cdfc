"""One preset on Kubernetes: its RayService, its budgets, and where its checkpoints come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ernie_cluster.config.pool import Role
from ernie_cluster.policy.sizing.formats import FORMATS
from ernie_cluster.policy.sizing.weights import matrices
from ernie_cluster.render import ray_service
from ernie_cluster.render.groups import NodeGroup
from ernie_cluster.render.kube_base import budget
from ernie_cluster.render.options import Options
from ernie_cluster.render.pods import MODELS_CLAIM, NAME, NAME_LABEL
from ernie_cluster.render.setup import API, Setup
from ernie_cluster.render.text import Document

NAMESPACE = "ernie"

_WHOLE: tuple[Role, ...] = ("mixed", "vision")
"""Roles that hold all weights between them."""

_KUSTOMIZATION = (
    "Preset {name}: `kubectl apply -k k8s/overlays/{name}`.\n\nChange first:\n  namespace  where it shall live"
)
_BUDGETS = """\
How many replicas of each pool may be taken away at once, as when nodes are drained.

Change first:
  maxUnavailable 0  stands where a pool has one replica: its node is not drained before you raise num_replicas, or delete this"""
_CHECKPOINTS = """\
Where the checkpoints are, and a job that fetches them from the Hugging Face hub. Apply it by itself, and wait for the job:
an application that finds no checkpoint is not deployed.

Change first:
  storageClassName  a class whose volumes many nodes read at once (NFS, Lustre, CephFS); the cluster's own default may not
  storage           room for the checkpoints, with some to spare"""


def overlay_files(
    setup: Setup, groups: Sequence[NodeGroup], options: Options
) -> dict[str, tuple[str, Sequence[Document]]]:
    """File -> (header, documents), as they lie in k8s/overlays/<preset>."""
    service = f"ray-service.{setup.name}.yaml"
    files: dict[str, tuple[str, Sequence[Document]]] = {
        service: (ray_service.header(setup, groups, options), [ray_service.ray_service(setup, groups, options)]),
        "disruption.yaml": (
            _BUDGETS,
            [budget(g.name, 1 if g.num_replicas > 1 else 0) for g in groups if g.name != API],
        ),
    }
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": NAMESPACE,
        "resources": ["../../base", *files],
    }
    files["kustomization.yaml"] = (_KUSTOMIZATION.format(name=setup.name), [kustomization])
    if (
        setup.repositories
    ):  # beside the others: a job cannot be changed by the next `apply`, nor shall weights go by `delete`
        files["checkpoints.yaml"] = (_CHECKPOINTS, [_claim(setup), _fetch(setup, options)])
    return files


def _claim(setup: Setup) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": MODELS_CLAIM},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "storageClassName": "CHANGE-ME",
            "resources": {"requests": {"storage": f"{_checkpoint_gb(setup)}G"}},
        },
    }


def _checkpoint_gb(setup: Setup) -> int:
    """Of all checkpoints in bfloat16 and a tenth more, in tens."""
    form = FORMATS["bfloat16"]
    num_bytes = sum(m.num_bytes(form) for shape in setup.shapes.values() for r in _WHOLE for m in matrices(shape, r))
    return math.ceil(1.1 * num_bytes / 1e10) * 10


def _fetch(setup: Setup, options: Options) -> dict[str, Any]:
    """What is there is not fetched again; needs neither Ray nor a GPU."""
    commands = [f"hf download {name} --local-dir {path}" for path, name in setup.repositories.items()]
    container = {
        "name": "fetch",
        "image": options.image_for(gpus=True),
        "command": ["sh", "-ec", "\n".join([*commands, ""])],
        "env": [{"name": "HF_HOME", "value": "/tmp/hub"}],
        "resources": {"requests": {"cpu": "2", "memory": "4Gi"}, "limits": {"memory": "8Gi"}},
        "volumeMounts": [{"name": "models", "mountPath": options.models_folder}],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    spec = {
        "restartPolicy": "OnFailure",
        "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000},
        "containers": [container],
        "volumes": [{"name": "models", "persistentVolumeClaim": {"claimName": MODELS_CLAIM}}],
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": f"fetch-{setup.name}", "labels": {NAME_LABEL: f"{NAME}-fetch"}},
        "spec": {"backoffLimit": 10, "template": {"metadata": {}, "spec": spec}},
    }

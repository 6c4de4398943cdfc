"""What is rendered with: versions, names and places that no configuration knows."""

from __future__ import annotations

from dataclasses import dataclass

RAY_VERSION = "2.60.0"
"""The one that the package is pinned to."""
RAY_PORT = 6379
DASHBOARD_PORT = 8265
AGENT_PORT = 52365
"""Of the dashboard's agent on each node, which knows whether its raylet lives."""
METRICS_PORT = 8080
"""Of Ray's own metrics on each node."""
REPLICA_PORT = 30000
"""Where Serve's proxy finds the first API replica of a node, and Prometheus each one's own metrics."""


@dataclass(frozen=True, slots=True)
class Options:
    """The same for all targets."""

    version: str
    """Of this package."""
    image: str = ""
    """Container image; "" = `ernie-cluster:VERSION-cuda`, or `-cpu` where no pool has GPUs."""
    package: str = ""
    """What pip installs on machines without containers; "" = this version."""
    models_folder: str = "/models"
    """Where nodes have checkpoints."""
    rdma: str = ""
    """Kubernetes' name of the adapters' resource, as rdma/hca_shared_devices_a; "" = there are none."""

    def image_for(self, *, gpus: bool) -> str:
        return self.image or f"ernie-cluster:{self.version}-{'cuda' if gpus else 'cpu'}"

    def package_for(self, *, gpus: bool) -> str:
        return self.package or f"ernie-cluster{'[gpu]' if gpus else ''}=={self.version}"

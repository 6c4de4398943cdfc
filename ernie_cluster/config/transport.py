"""How KV and embeddings travel between replicas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ernie_cluster.config.checks import check_range
from ernie_cluster.config.units import MIB
from ernie_cluster.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TransportConfig:
    """How KV and embeddings travel between replicas."""

    kind: Literal["auto", "local", "ipc", "nccl", "shared_memory", "nixl", "object_store"] = "auto"
    """auto: between GPUs CUDA IPC inside a node and NCCL between nodes, where cupy is installed; else shared memory
    inside a node, and the object store, which always works. A named one is used where it can be. local: one process.
    nixl: the receiver reads from the sender's host memory; never chosen by auto, and to be installed on every node."""
    piece_bytes: int = 4 * MIB
    """Largest piece that is sent and checksummed at once, at least 1."""
    staging_bytes: int = 64 * MIB
    """Buffer per pair of replicas for what is on its way, at least `piece_bytes`; between GPUs at both ends, on them."""

    def __post_init__(self) -> None:
        check_range(self, 1, "piece_bytes")
        if self.staging_bytes < self.piece_bytes:
            raise ConfigError(
                f"staging_bytes = {self.staging_bytes} must be at least piece_bytes = {self.piece_bytes}: "
                "it has to hold one piece"
            )

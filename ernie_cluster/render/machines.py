"""Machines that can be had, and which of them a replica fits on.

Sources: AWS "Amazon EC2 instance types" (p5, p5en, m7i), Google Cloud "GPU machine types" (A3 High, A3 Ultra) and
"General-purpose machine family" (N2). Neither rents a single 141 GB GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ernie_cluster.config.units import GIB
from ernie_cluster.errors import ConfigError

Cloud = Literal["aws", "gcp", "on-prem"]


@dataclass(frozen=True, slots=True)
class Machine:
    """One kind of node."""

    name: str
    cpus: int
    memory_bytes: int
    gpus: int = 0
    gpu: str = ""
    """A name of `policy.sizing.gpus.GPUS`; "" without GPUs."""

    def __str__(self) -> str:
        return f"{self.name} ({self.gpus} x {self.gpu})" if self.gpus else self.name


MACHINES: Mapping[Cloud, Sequence[Machine]] = {
    "aws": (
        Machine("m7i.xlarge", 4, 16 * GIB),
        Machine("m7i.2xlarge", 8, 32 * GIB),
        Machine("m7i.8xlarge", 32, 128 * GIB),
        Machine("p5.4xlarge", 16, 256 * GIB, 1, "h100-80g"),
        Machine("p5.48xlarge", 192, 2048 * GIB, 8, "h100-80g"),
        Machine("p5en.48xlarge", 192, 2048 * GIB, 8, "h200-141g"),
    ),
    "gcp": (
        Machine("n2-standard-4", 4, 16 * GIB),
        Machine("n2-standard-8", 8, 32 * GIB),
        Machine("n2-standard-32", 32, 128 * GIB),
        Machine("a3-highgpu-1g", 26, 234 * GIB, 1, "h100-80g"),
        Machine("a3-highgpu-8g", 208, 1872 * GIB, 8, "h100-80g"),
        Machine("a3-ultragpu-8g", 224, 2952 * GIB, 8, "h200-141g"),
    ),
    "on-prem": (
        Machine("cpu", 16, 64 * GIB),
        Machine("cpu-large", 64, 256 * GIB),
        Machine("1x-h100-80g", 16, 192 * GIB, 1, "h100-80g"),
        Machine("8x-h100-80g", 96, 1024 * GIB, 8, "h100-80g"),
        Machine("8x-h200-141g", 96, 2048 * GIB, 8, "h200-141g"),
    ),
}
"""Smallest first; those of one's own are taken to be at least so large."""


def machines_of(cloud: Cloud, only: Sequence[str]) -> tuple[Machine, ...]:
    """Kinds with GPUs that are in `only`, where it names some, and all without; raises ConfigError for an unknown one."""
    known = MACHINES[cloud]
    for name in only:
        if name not in [m.name for m in known]:
            raise ConfigError(f"--machine {name}: known on {cloud} are {', '.join(m.name for m in known)}")
    with_gpus = [m for m in known if m.gpus and (not only or m.name in only)]
    return (*(m for m in known if not m.gpus), *with_gpus)

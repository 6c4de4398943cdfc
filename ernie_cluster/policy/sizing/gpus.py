"""What the makers say of their GPUs: memory, speed, and the way from one to the next.

Memory is what nvidia-smi reports as total. FLOPs are dense (makers print twice that "with sparsity") with float32
accumulation. Links are one direction of one GPU; NVLink is sold by the sum of both.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ernie_cluster.config.quantization import FIRST_WITH_FP8
from ernie_cluster.config.units import MIB
from ernie_cluster.errors import ConfigError

NETWORK_BYTES_PER_S = 50e9
"""Between nodes, per GPU: one adapter of 400 Gbit/s."""
GPUS_PER_NODE = 8


@dataclass(frozen=True, slots=True)
class Gpu:
    """One kind."""

    name: str
    title: str
    ray_type: str
    """Ray names the nodes' resource `accelerator_type:` so; kinds that differ in memory only may share it."""
    memory_bytes: int
    bandwidth: float
    """Bytes per second of its memory."""
    bf16_flops: float
    """Per second."""
    capability: tuple[int, int]
    """What CUDA calls compute capability."""
    link: float
    """Bytes per second to the others of its node, one direction."""

    @property
    def has_fp8(self) -> bool:
        """Whether fp8 weights are served on it; see `FIRST_WITH_FP8`."""
        return self.capability >= FIRST_WITH_FP8

    def link_of(self, ranks: int) -> float:
        """Bytes per second between so many neighbouring ranks: the network's, once they are more than a node holds."""
        return self.link if ranks <= GPUS_PER_NODE else min(self.link, NETWORK_BYTES_PER_S)


_PCIE_4 = 32e9  # 16 lanes of PCIe 4.0; these have no NVLink

GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        # Source: NVIDIA GeForce RTX 4090 page and Ada architecture whitepaper, appendix A (165.2 TFLOPS)
        Gpu("rtx4090-24g", "GeForce RTX 4090 24 GB", "GeForce-RTX-4090", 24_564 * MIB, 1.008e12, 165.2e12, (8, 9), _PCIE_4),
        # Source: NVIDIA A100 datasheet (40 GB: 1,555 GB/s; 80 GB SXM: 2,039 GB/s; NVLink 600 GB/s)
        Gpu("a100-40g", "A100 SXM 40 GB", "A100", 40_960 * MIB, 1.555e12, 312e12, (8, 0), 300e9),
        # Source: NVIDIA L40S datasheet (864 GB/s; 362.05 TFLOPS; PCIe only)
        Gpu("l40s-48g", "L40S 48 GB", "L40S", 46_068 * MIB, 0.864e12, 362.05e12, (8, 9), _PCIE_4),
        # Source: NVIDIA H100 datasheet, SXM (3.35 TB/s; 1,979 TFLOPS with sparsity; NVLink 900 GB/s)
        Gpu("h100-80g", "H100 SXM 80 GB", "H100", 81_559 * MIB, 3.35e12, 989.4e12, (9, 0), 450e9),
        # Source: as the a100-40g
        Gpu("a100-80g", "A100 SXM 80 GB", "A100", 81_920 * MIB, 2.039e12, 312e12, (8, 0), 300e9),
        # Source: NVIDIA H200 datasheet, SXM (4.8 TB/s; the H100's chip)
        Gpu("h200-141g", "H200 SXM 141 GB", "H200", 143_771 * MIB, 4.8e12, 989.4e12, (9, 0), 450e9),
        # Source: NVIDIA HGX B200 datasheet (180 GB, 7.7 TB/s; 4,500 TFLOPS with sparsity; NVLink 1,800 GB/s)
        Gpu("b200-180g", "B200 180 GB", "B200", 183_359 * MIB, 7.7e12, 2250e12, (10, 0), 900e9),
    )
}  # fmt: skip
"""By name, smallest memory first."""


def gpu(name: str) -> Gpu:
    """The kind of this name; its memory may be left out where one fits: h100. Raises ConfigError, with the known ones."""
    wanted = name.lower()
    found = [g for g in GPUS.values() if wanted in (g.name, g.name.rpartition("-")[0])]
    if len(found) == 1:
        return found[0]
    near = [g.name for g in found] or difflib.get_close_matches(wanted, GPUS, n=1, cutoff=0.6)
    remedy = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(GPUS)}"
    raise ConfigError(f"unknown GPU {name!r}; {remedy}")


def of_ray_types(types: Iterable[str]) -> list[Gpu]:
    """Kinds that nodes with these accelerator types may have; none when a type is unknown, as nothing can be said then."""
    wanted, known = set(types), {g.ray_type for g in GPUS.values()}
    return [g for g in GPUS.values() if g.ray_type in wanted] if wanted <= known else []

"""Ready-made configurations: functions that return a whole `ClusterConfig`; vary one with `dataclasses.replace`.

Sizes: bf16 weights are 58.8 GB (28B) and 847.2 GB (424B), KV is 57,344 and 221,184 bytes per token over all ranks,
ViT and resampler are 1.5 and 1.6 GB; computed from the published shapes. KV is sized for the fullest pool, prefill.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.deployment import ModelDeployment
from ernie_cluster.config.engine import GPU_BLOCK_TOKENS, EngineConfig
from ernie_cluster.config.pool import PoolConfig, Role
from ernie_cluster.config.units import GIB, MIB

_SMALL_ENGINE = EngineConfig(  # 26,000 tokens of pocket's bf16 KV, 1,280 bytes each; 16,000 of tiny's float32
    kv_cache_bytes=32 * MIB, max_batch_tokens=512, max_num_seqs=16, num_threads=1, max_model_len=4096
)
_SMALL_CPUS = 0.1  # of a core per replica: the demo's four processes share a laptop

POCKET = str(Path(__file__).parents[1] / "data" / "pocket")
"""Folder of the checkpoint that comes with this package."""

_28B_ENGINE = EngineConfig(  # 58.8 GB of weights + 12.9 GB of KV (224,000 tokens) on one 80 GB GPU
    block_size=GPU_BLOCK_TOKENS, kv_cache_bytes=12 * GIB, max_batch_tokens=4096, max_num_seqs=64
)
_424B_ENGINE = EngineConfig(  # per GPU of 8 x 141 GB: 106 GB of weights + 17.2 GB of KV (621,000 tokens)
    block_size=GPU_BLOCK_TOKENS, kv_cache_bytes=16 * GIB, max_batch_tokens=4096, max_num_seqs=32
)

_03B_ENGINE = EngineConfig(  # 0.7 GB of weights + 1.1 GB of KV (58,000 tokens) in memory
    kv_cache_bytes=1 * GIB, max_batch_tokens=512, max_num_seqs=16
)
_21B_ENGINE = EngineConfig(  # 43.7 GB of weights + 17.2 GB of KV (299,000 tokens) on one 80 GB GPU
    block_size=GPU_BLOCK_TOKENS, kv_cache_bytes=16 * GIB, max_batch_tokens=4096, max_num_seqs=64
)
_300B_ENGINE = EngineConfig(  # per GPU of 8 x 141 GB: 75 GB of weights + 34.4 GB of KV (1,243,000 tokens)
    block_size=GPU_BLOCK_TOKENS, kv_cache_bytes=32 * GIB, max_batch_tokens=4096, max_num_seqs=64
)


def tiny(path: str) -> ClusterConfig:
    """A toy checkpoint on CPU, as one vision, one prefill and one decode replica."""
    return _on_cpu("tiny", path, "vision", "prefill", "decode")


def tiny_mixed(path: str) -> ClusterConfig:
    """A toy checkpoint on CPU, where one replica does prefill and decode; the baseline to compare with."""
    return _on_cpu("tiny", path, "vision", "mixed")


def pocket(path: str = POCKET) -> ClusterConfig:
    """The packaged model on CPU, as one vision, one prefill and one decode replica."""
    return _on_cpu("ernie-pocket", path, "vision", "prefill", "decode")


def pocket_mixed(path: str = POCKET) -> ClusterConfig:
    """The packaged model on CPU, where one replica does prefill and decode."""
    return _on_cpu("ernie-pocket", path, "vision", "mixed")


def ernie_28b_a3b(path: str) -> ClusterConfig:
    """ERNIE-4.5-VL-28B-A3B in bf16 on three 80 GB GPUs, one per role."""
    return _serve(ModelDeployment("ernie-4.5-vl-28b-a3b", path, _gpu_pools(tp=1), _28B_ENGINE))


def ernie_28b_a3b_thinking(path: str) -> ClusterConfig:
    """ERNIE-4.5-VL-28B-A3B-Thinking in bf16 on three 80 GB GPUs, with the larger pictures that it is served with."""
    return _serve(
        ModelDeployment(
            "ernie-4.5-vl-28b-a3b-thinking",
            path,
            _gpu_pools(tp=1),
            _28B_ENGINE,
            image_max_pixels=12_845_056,  # Source: FastDeploy docs/get_started/ernie-4.5-vl-thinking.md
        )
    )


def ernie_424b_a47b(path: str) -> ClusterConfig:
    """ERNIE-4.5-VL-424B-A47B in bf16: prefill and decode on eight 141 GB GPUs each, vision on one more."""
    return _serve(ModelDeployment("ernie-4.5-vl-424b-a47b", path, _gpu_pools(tp=8), _424B_ENGINE))


def ernie_03b(path: str) -> ClusterConfig:
    """ERNIE-4.5-0.3B, which reads text only, in bf16 on CPU."""
    pools = (PoolConfig("prefill"), PoolConfig("decode"))
    return _serve(ModelDeployment("ernie-4.5-0.3b", path, pools, _03B_ENGINE))


def ernie_21b_a3b(path: str) -> ClusterConfig:
    """ERNIE-4.5-21B-A3B, which reads text only, in bf16 on two 80 GB GPUs, one per role."""
    return _serve(ModelDeployment("ernie-4.5-21b-a3b", path, _gpu_pools(tp=1)[1:], _21B_ENGINE))


def ernie_300b_a47b(path: str) -> ClusterConfig:
    """ERNIE-4.5-300B-A47B, which reads text only, in bf16: prefill and decode on eight 141 GB GPUs each."""
    return _serve(ModelDeployment("ernie-4.5-300b-a47b", path, _gpu_pools(tp=8)[1:], _300B_ENGINE))


PRESETS: Mapping[str, Callable[[str], ClusterConfig]] = {
    "tiny": tiny,
    "tiny-mixed": tiny_mixed,
    "pocket": pocket,
    "pocket-mixed": pocket_mixed,
    "28b": ernie_28b_a3b,
    "28b-thinking": ernie_28b_a3b_thinking,
    "424b": ernie_424b_a47b,
    "0.3b": ernie_03b,
    "21b": ernie_21b_a3b,
    "300b": ernie_300b_a47b,
}
"""What `preset:` of a model entry may say; each takes the checkpoint folder."""

PACKAGED: Mapping[str, str] = {"pocket": POCKET, "pocket-mixed": POCKET}
"""Presets that need no `path:`, and the folder that they serve without one."""


def _serve(deployment: ModelDeployment) -> ClusterConfig:
    return ClusterConfig(models=(deployment,))


def _on_cpu(name: str, path: str, *roles: Role) -> ClusterConfig:
    pools = tuple(PoolConfig(role, num_cpus=_SMALL_CPUS) for role in roles)
    return _serve(ModelDeployment(name, path, pools, _SMALL_ENGINE))


def _gpu_pools(tp: int) -> tuple[PoolConfig, ...]:
    return (
        PoolConfig("vision", num_cpus=4, num_gpus=1),
        PoolConfig("prefill", num_cpus=4, num_gpus=1, tp=tp),
        PoolConfig("decode", num_cpus=4, num_gpus=1, tp=tp),
    )

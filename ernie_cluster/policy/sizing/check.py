"""Whether a configuration can run on the machines that there are; asked before anything is started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ernie_cluster.config.cluster import ClusterConfig
from ernie_cluster.config.deployment import ModelDeployment
from ernie_cluster.config.model import ModelConfig
from ernie_cluster.config.pool import PoolConfig
from ernie_cluster.config.units import MIB
from ernie_cluster.errors import ConfigError
from ernie_cluster.policy.sizing import memory
from ernie_cluster.policy.sizing.formats import FORMATS
from ernie_cluster.policy.sizing.gpus import Gpu
from ernie_cluster.policy.sizing.pools import PoolSizing, Setting, gigabytes, size_pool


def setting_of(deployment: ModelDeployment, shape: ModelConfig, gpu: Gpu | None) -> Setting:
    """What the pools of a configured model have in common: weights and KV as the engine holds them."""
    dtype = deployment.engine.dtype_of(shape.dtype)
    method = deployment.method(shape.quantization)
    weights = FORMATS[dtype] if method is None else replace(FORMATS[method.name], plain_bits=FORMATS[dtype].plain_bits)
    pixels = deployment.image_max_pixels or memory.IMAGE_MAX_PIXELS
    kv = deployment.engine.kv_dtype_of(shape.dtype)
    return Setting(shape, deployment.engine, weights, kv, gpu, pixels, switch_roles=deployment.switch_roles)


def size_deployment(deployment: ModelDeployment, setting: Setting) -> tuple[PoolSizing, ...]:
    """All pools of a configured model; raises ConfigError as `size_pool` does."""
    return tuple(size_pool(setting, p) for p in pools_of(deployment))


def pools_of(deployment: ModelDeployment) -> tuple[PoolConfig, ...]:
    """Pools as they will compute: on CPU when `engine.device` says so, whatever GPUs they were given."""
    if deployment.engine.device != "cpu":
        return deployment.pools
    return tuple(replace(p, num_gpus=0) for p in deployment.pools)


def remedy(sizing: PoolSizing) -> str:
    """What to change in the configuration for a pool that does not fit."""
    room = (sizing.memory_bytes or 0) - sizing.heaviest.total
    if sizing.kv_layout is not None and room >= 2 * sizing.kv_layout.block_bytes:
        return f"set engine.kv_cache_bytes to at most {room // MIB}MiB"
    return "split it over more GPUs by tp, or give it larger ones"


def check_fit(
    config: ClusterConfig, shapes: Mapping[str, ModelConfig], gpus: Sequence[Gpu], host_bytes: int | None
) -> None:
    """Refuse what cannot work.

    Args:
        config: what shall be started.
        shapes: of each model, by its served name.
        gpus: kinds that the machines have, as far as known; pools with GPUs must fit one of them. None: not checked.
        host_bytes: memory of all machines; pools without GPUs must fit together. None: not checked.

    Raises:
        ConfigError: a pool does not fit; with the equation, its numbers, and what to change.
    """
    on_host = 0
    for deployment in config.models:
        shape = shapes[deployment.name]
        misfits = [_misfit(deployment, shape, gpu) for gpu in sorted(gpus, key=lambda g: g.memory_bytes)]
        if misfits and all(misfits):
            raise ConfigError(f"model {deployment.name!r} does not fit: {misfits[-1]}; see `ernie-cluster plan`")
        bare = setting_of(deployment, shape, None)
        for pool in (size_pool(bare, p) for p in pools_of(deployment) if not p.num_gpus):
            on_host += pool.num_replicas * sum(
                r.total + pool.kv_cache_bytes + pool.host_cache_bytes for r in pool.ranks
            )
    if host_bytes is not None and on_host > host_bytes:
        raise ConfigError(
            f"the pools without GPUs need {gigabytes(on_host)} for weights, activations and KV, these machines have "
            f"{gigabytes(host_bytes)} of memory; lower engine.kv_cache_bytes, engine.host_cache_bytes or num_replicas"
        )


def _misfit(deployment: ModelDeployment, shape: ModelConfig, gpu: Gpu) -> str:
    """Why one of the pools does not fit, and what to change; "" when all do."""
    for pool in size_deployment(deployment, setting_of(deployment, shape, gpu)):
        if pool.problem:
            return f"{pool.problem}; {remedy(pool)}"
    return ""

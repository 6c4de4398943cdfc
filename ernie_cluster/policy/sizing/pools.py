"""Whether a pool's ranks fit where they shall run, and how much KV is left: bytes, rank by rank.

A rank's memory is `num_gpus` of one GPU. On CPU it is the host's, of which nothing is known here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from ernie_cluster.config.engine import EngineConfig
from ernie_cluster.config.kv_layout import KVLayout
from ernie_cluster.config.model import ModelConfig
from ernie_cluster.config.parallel import ParallelDims
from ernie_cluster.config.pool import PoolConfig, Role, weights_role
from ernie_cluster.errors import ConfigError
from ernie_cluster.policy.sizing import memory
from ernie_cluster.policy.sizing.formats import WeightFormat
from ernie_cluster.policy.sizing.gpus import Gpu
from ernie_cluster.policy.sizing.weights import Part, rank_matrices


@dataclass(frozen=True, slots=True)
class Setting:
    """What all pools of a model have in common."""

    model: ModelConfig
    engine: EngineConfig
    weights: WeightFormat
    kv: str
    """One of `memory.KV_TYPES`."""
    gpu: Gpu | None
    """Of the pools that have GPUs; None when there are none."""
    image_max_pixels: int = memory.IMAGE_MAX_PIXELS
    video_frames: int = 0
    """Frames of the largest video, 0 for none: it is encoded whole."""
    fills_kv: bool = False
    """KV takes all that is left, and must hold one sequence of `max_model_len`; else `kv_cache_bytes` is KV's size."""
    switch_roles: bool = False
    """See `ModelDeployment`: decode replicas hold what prefill replicas do."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("image_max_pixels", self.image_max_pixels, 1),
            ("video_frames", self.video_frames, 0),
        ):
            if value < least:
                raise ConfigError(f"{name} = {value} must be at least {least}")
        if self.gpu is not None and self.weights.is_fp8 and not self.gpu.has_fp8:
            raise ConfigError(f"fp8 weights on {self.gpu.name}: they need a Hopper GPU or a newer one; use wint8")

    @property
    def max_model_len(self) -> int:
        return self.engine.max_model_len or self.model.text.max_position_embeddings


@dataclass(frozen=True, slots=True)
class RankSizing:
    """Bytes of one rank, without KV."""

    weights: Mapping[Part, int]
    """Values, without scales; only parts that it holds."""
    scales: int
    activations: int
    reserve: int
    """CUDA, NCCL and fragmentation; 0 on CPU."""

    @property
    def weight_bytes(self) -> int:
        """Scales included."""
        return sum(self.weights.values()) + self.scales

    @property
    def total(self) -> int:
        return self.weight_bytes + self.activations + self.reserve


@dataclass(frozen=True, slots=True)
class PoolSizing:
    """One pool: all replicas are alike."""

    role: Role
    num_replicas: int
    dims: ParallelDims
    share: float
    """Of a GPU per rank; 0 = on CPU."""
    ranks: tuple[RankSizing, ...]
    """Of one replica."""
    memory_bytes: int | None
    """That each rank may use; None on CPU."""
    kv_layout: KVLayout | None
    """Of each rank; None in vision pools."""
    kv_cache_bytes: int
    """Of each rank."""
    host_cache_bytes: int
    """Of each rank, for KV that its cache has no room for; on the host, always."""
    max_model_len: int
    host_bytes: int
    """Of each rank, `host_cache_bytes` among them; on CPU with all that it computes with."""
    problem: str
    """Why it does not fit, with the equation; "" when it does."""

    @property
    def num_gpus(self) -> float:
        """Of all replicas."""
        return self.num_replicas * self.dims.world * self.share

    @property
    def heaviest(self) -> RankSizing:
        return max(self.ranks, key=lambda r: r.total)

    @property
    def kv_tokens(self) -> int:
        """That one replica holds at once; its `dp` groups have their own. Block 0 of each is for padding."""
        if self.kv_layout is None:
            return 0
        blocks = self.kv_cache_bytes // self.kv_layout.block_bytes - 1
        return max(0, blocks) * self.kv_layout.block_size * self.dims.dp

    def concurrency(self, num_tokens: int) -> int:
        """Sequences of this length that one replica holds at once."""
        return self.kv_tokens // self.dims.dp // num_tokens * self.dims.dp


def size_pool(setting: Setting, pool: PoolConfig) -> PoolSizing:
    """Bytes of each rank, and whether they fit.

    Raises:
        ConfigError: `tp` or `dp` do not divide the model, a vision pool for a model without eyes, or no `gpu` was given
            for a pool that has some.
    """
    dims, model = pool.dims, setting.model
    dims.check(model)
    if pool.role == "vision" and model.vision is None:
        raise ConfigError("a text-only model has no vision encoder; remove the vision pool")
    if pool.num_gpus and setting.gpu is None:
        raise ConfigError(f"{pool.role} pool: num_gpus = {pool.num_gpus:g}, so name its kind of GPU")
    budget = int(setting.gpu.memory_bytes * pool.num_gpus) if pool.num_gpus and setting.gpu else None
    role = weights_role(pool.role, switch_roles=setting.switch_roles)
    activations = _activations(setting, pool, has_vision_experts=role != "decode")
    reserve = 0 if budget is None else memory.reserve_bytes(pool.role, dims.world, budget)
    ranks = tuple(
        RankSizing(weights, scales, activations, reserve)
        for weights, scales in _weights_of_ranks(model, setting.weights, role, dims)
    )
    largest = max(r.total for r in ranks)
    layout = None
    kv_cache_bytes = wanted = 0
    if pool.role != "vision":
        layout = memory.kv_layout(model, setting.engine.block_size, setting.kv, dims.tp)
        blocks_of_one = -(-setting.max_model_len // layout.block_size) + 1
        wanted = blocks_of_one * layout.block_bytes if setting.fills_kv else setting.engine.kv_cache_bytes
        kv_cache_bytes = max(0, budget - largest) if setting.fills_kv and budget is not None else wanted
    host_cache_bytes = setting.engine.host_cache_bytes if layout is not None else 0
    host = memory.host_bytes(model, role, setting.weights.plain_bytes, has_gpu=budget is not None)
    return PoolSizing(
        role=pool.role,
        num_replicas=pool.num_replicas,
        dims=dims,
        share=pool.num_gpus,
        ranks=ranks,
        memory_bytes=budget,
        kv_layout=layout,
        kv_cache_bytes=kv_cache_bytes,
        host_cache_bytes=host_cache_bytes,
        max_model_len=setting.max_model_len,
        host_bytes=host + host_cache_bytes + (largest + kv_cache_bytes if budget is None else 0),
        problem=_problem(setting, pool, ranks, budget, wanted),
    )


def gigabytes(num_bytes: float) -> str:
    """1.2 GB, of 10^9 bytes each, or MB where that would be nought."""
    return f"{num_bytes / 1e6:,.1f} MB" if 0 < num_bytes < 1e8 else f"{num_bytes / 1e9:,.1f} GB"


@functools.lru_cache(maxsize=256)  # a search for what fits asks again and again
def _weights_of_ranks(
    model: ModelConfig, form: WeightFormat, role: Role, dims: ParallelDims
) -> tuple[tuple[Mapping[Part, int], int], ...]:
    """(bytes of each part, bytes of all scales) of every rank."""
    ranks: list[tuple[Mapping[Part, int], int]] = []
    for rank in range(dims.world):
        held = rank_matrices(model, role, dims, rank)
        weights: dict[Part, int] = {}
        for matrix in held:
            weights[matrix.part] = weights.get(matrix.part, 0) + matrix.num_bytes(form)
        ranks.append((weights, sum(m.scale_bytes(form) for m in held)))
    return tuple(ranks)


def _activations(setting: Setting, pool: PoolConfig, *, has_vision_experts: bool) -> int:
    number_bytes, vision = setting.weights.plain_bytes, setting.model.vision
    if pool.role == "vision":
        assert vision is not None
        patches = memory.num_patches(vision, setting.image_max_pixels, setting.video_frames)
        return memory.vision_activation_bytes(vision, patches, number_bytes)
    sizes = (pool.dims, number_bytes)
    step = memory.decoder_activation_bytes(setting.model, setting.engine, *sizes, has_vision_experts=has_vision_experts)
    if not setting.weights.is_quantised:
        return step
    return step + memory.unpacked_bytes(setting.model, *sizes, has_vision_experts=has_vision_experts)


def _problem(
    setting: Setting, pool: PoolConfig, ranks: tuple[RankSizing, ...], budget: int | None, kv_bytes: int
) -> str:
    rank = max(range(len(ranks)), key=lambda r: ranks[r].total)
    r = ranks[rank]
    if budget is None or r.total + kv_bytes <= budget:
        return ""
    assert setting.gpu is not None
    terms = [("weights", r.weight_bytes), ("activations", r.activations), ("reserve", r.reserve)]
    if kv_bytes:
        what = f"KV of one sequence of {setting.max_model_len:,}" if setting.fills_kv else "KV"
        terms.append((what, kv_bytes))
    left = " + ".join(f"{name} {num / 1e9:,.1f}" for name, num in terms)
    memory_of = f"{setting.gpu.memory_bytes / 1e9:,.1f} GB of {setting.gpu.name}"
    share = "" if pool.num_gpus == 1 else f" = {pool.num_gpus:g} x {memory_of}"
    return (
        f"{pool.role} (tp {pool.tp} x dp {pool.dp}), rank {rank}: {left} = {gigabytes(r.total + kv_bytes)}, "
        f"more than {gigabytes(budget) + share if share else memory_of}"
    )

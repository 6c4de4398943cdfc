"""From so many GPUs of one kind to pools: how large a gang, how many of them, and where the vision encoder goes.

mixed    each gang does prefill and decode
split    one half of the GPUs prefills, the other decodes

Gangs are as small as the model allows, since each rank more is one more to talk to and to lose; replicas fill the GPUs. Hence
more GPUs never hold fewer tokens of KV. Vision takes a small share of the GPUs of prefill (or mixed), or one to itself where
it needs more than half.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from ernie_cluster.config.model import ModelConfig
from ernie_cluster.config.parallel import ParallelDims
from ernie_cluster.config.pool import PoolConfig, Role
from ernie_cluster.errors import ConfigError
from ernie_cluster.policy.sizing.formats import FORMATS
from ernie_cluster.policy.sizing.gpus import GPUS, Gpu
from ernie_cluster.policy.sizing.pools import PoolSizing, Setting, size_pool

Layout = Literal["mixed", "split"]

MOST_GPUS = 256
"""Nobody is told to buy more."""
_LARGEST_GANG = 64
_CPUS = 4.0


@dataclass(frozen=True, slots=True)
class Wish:
    """What shall be placed."""

    setting: Setting
    """With `fills_kv` and a `gpu`."""
    count: int
    """GPUs in all, at least 1."""
    layout: Layout = "mixed"
    dims: ParallelDims | None = None
    """Of each gang; None = the smallest that fits."""

    def __post_init__(self) -> None:
        least = 1 if self.layout == "mixed" else 2
        if not least <= self.count <= MOST_GPUS:
            raise ConfigError(f"{self.count} GPUs: layout {self.layout} takes {least} to {MOST_GPUS}")

    @property
    def gpu(self) -> Gpu:
        assert self.setting.gpu is not None
        return self.setting.gpu


@dataclass(frozen=True, slots=True)
class Placement:
    """Pools for a wish."""

    pools: tuple[PoolSizing, ...]
    configs: tuple[PoolConfig, ...]
    """The same, as a configuration says it."""
    num_idle: int
    """GPUs that make no whole gang."""

    @property
    def problem(self) -> str:
        """Why it does not fit; "" when it does."""
        return next((p.problem for p in self.pools if p.problem), "")

    @property
    def kv_tokens(self) -> int:
        """Of all replicas of the pool that decodes."""
        pool = self.pools[-1]
        return pool.num_replicas * pool.kv_tokens


def place(wish: Wish) -> Placement:
    """The first placement that fits, or else the one that lacks least.

    Raises:
        ConfigError: `dims` do not divide the model or are more than there are GPUs.
    """
    share, own = _vision_share(wish)
    rest = wish.count - own
    most = rest if wish.layout == "mixed" else rest // 2
    if wish.dims is not None:
        wish.dims.check(wish.setting.model)
        if wish.dims.world > max(most, 1):
            raise ConfigError(
                f"tp * dp = {wish.dims.tp} * {wish.dims.dp} = {wish.dims.world} ranks, more than the {most} GPUs that "
                f"{wish.count} GPUs give a {'gang' if wish.layout == 'mixed' else 'pool'}"
            )
    best: Placement | None = None
    for dims in [wish.dims] if wish.dims else gangs(wish.setting.model, max(most, 1)):
        found = _place(wish, dims, share, own)
        if not found.problem:
            return found
        if best is None or dims.world > best.pools[-1].dims.world:
            best = found
    assert best is not None, "a gang of one rank divides every model"
    return best


def gangs(model: ModelConfig, most: int) -> Iterator[ParallelDims]:
    """Sizes of gang that the model can be split into, up to `most` ranks, smallest first; each with the largest tp."""
    for world in range(1, min(most, _LARGEST_GANG) + 1):
        for tp in range(world, 0, -1):
            if world % tp == 0 and divides(model, dims := ParallelDims(tp, world // tp)):
                yield dims
                break


@functools.lru_cache(maxsize=4096)
def divides(model: ModelConfig, dims: ParallelDims) -> bool:
    """Whether these axes can split the model."""
    try:
        dims.check(model)
    except ConfigError:
        return False
    return True


def nearest(wish: Wish) -> list[tuple[str, str]]:
    """What would fit instead, one change each: (the change in words, the options of `ernie-cluster plan` that make it)."""
    found = [*_other_gang(wish), *_other_weights(wish), *_more_gpus(wish), *_other_gpu(wish), *_shorter(wish)]
    return found or [("nothing near: it takes fewer tokens per step, more GPUs and smaller weights together", "")]


def _place(wish: Wish, dims: ParallelDims, share: float, own: int) -> Placement:
    rest, main = wish.count - own, round(1 - (0 if own else share), 2)
    halves: dict[Role, int] = {"mixed": rest}
    if wish.layout == "split":
        halves = {"prefill": rest // 2, "decode": rest - rest // 2}
    configs, used = [], own
    for role, gpus in halves.items():
        replicas = max(1, gpus // dims.world)
        used += replicas * dims.world
        part = 1.0 if role == "decode" else main
        configs.append(PoolConfig(role, replicas, _CPUS, part, tp=dims.tp, dp=dims.dp))
    if share:
        configs.insert(0, PoolConfig("vision", 1 if own else configs[0].num_replicas, _CPUS, 1.0 if own else share))
    pools = tuple(size_pool(wish.setting, c) for c in configs)
    return Placement(pools, tuple(configs), max(0, wish.count - used))


def _vision_share(wish: Wish) -> tuple[float, int]:
    """Share of a GPU that a vision rank takes, in hundredths, and how many GPUs it has to itself. Without eyes (0, 0)."""
    if wish.setting.model.vision is None:
        return 0.0, 0
    share = next((n / 100 for n in range(1, 51) if _holds_vision(wish.setting, n / 100)), 0.5)
    has_room = wish.count > (1 if wish.layout == "mixed" else 2)
    return (1.0, 1) if has_room and not _holds_vision(wish.setting, share) else (share, 0)


@functools.lru_cache(maxsize=256)
def _holds_vision(setting: Setting, share: float) -> bool:
    """Whether a vision rank fits into this share of a GPU."""
    return not size_pool(setting, PoolConfig("vision", num_gpus=share)).problem


def _other_gang(wish: Wish) -> Iterator[tuple[str, str]]:
    if wish.dims is not None:
        found = place(replace(wish, dims=None))
        if not found.problem:
            dims = found.pools[-1].dims
            yield f"tp {dims.tp} x dp {dims.dp} on these GPUs", f"--tp {dims.tp} --dp {dims.dp}"


def _other_weights(wish: Wish) -> Iterator[tuple[str, str]]:
    """The first smaller format; fp8 only where the GPU has it."""
    smaller = list(FORMATS)[list(FORMATS).index(wish.setting.weights.name) + 1 :]
    for name in smaller:
        form = FORMATS[name]
        if form.is_fp8 and not wish.gpu.has_fp8:
            continue
        if not place(replace(wish, setting=replace(wish.setting, weights=form))).problem:
            yield f"{name} weights on these GPUs", f"--quantization {name}"
            return


def _more_gpus(wish: Wish) -> Iterator[tuple[str, str]]:
    """The smallest larger gang that does; larger numbers of gangs that do not fit would not help."""
    pools = 1 if wish.layout == "mixed" else 2
    own = _vision_share(replace(wish, count=MOST_GPUS))[1]
    for dims in [wish.dims] if wish.dims else gangs(wish.setting.model, _LARGEST_GANG):
        count = own + pools * dims.world
        if wish.count < count <= MOST_GPUS and not place(replace(wish, count=count)).problem:
            yield f"{count} x {wish.gpu.name}", f"--count {count}"
            return


def _other_gpu(wish: Wish) -> Iterator[tuple[str, str]]:
    """The smallest that does, of those with more memory."""
    for other in sorted(GPUS.values(), key=lambda g: g.memory_bytes):
        is_fit = other.has_fp8 or not wish.setting.weights.is_fp8
        if other.memory_bytes > wish.gpu.memory_bytes and is_fit:
            found = place(replace(wish, setting=replace(wish.setting, gpu=other)))
            if not found.problem:
                yield f"{wish.count} x {other.name}", f"--gpu {other.name}"
                return


def _shorter(wish: Wish) -> Iterator[tuple[str, str]]:
    """The longest sequence that these GPUs hold, in whole thousands."""
    length = _longest(place(wish)) // 1024 * 1024
    if 0 < length < wish.setting.max_model_len:
        yield f"sequences of {length:,} tokens at most", f"--max-model-len {length}"


def _longest(placement: Placement) -> int:
    return min(p.kv_tokens // p.dims.dp for p in placement.pools if p.kv_layout is not None)

"""How the ranks of one replica split a model, with the arithmetic that it must obey.

Attention is tensor-parallel over `tp` and data-parallel over `dp`; experts are spread whole over all `tp * dp` ranks.
Embedding, head, norms, routers, ViT and resampler are whole on every rank: split over tp they would save 3 GB of 106 per
rank of the 424B, for a collective at both ends of each step. Knows no process group and no device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ernie_cluster.config.kv_layout import kv_heads_of_rank
from ernie_cluster.config.model import ModelConfig
from ernie_cluster.config.quantization import Method
from ernie_cluster.errors import ConfigError


class Coordinates(NamedTuple):
    """Place of one rank on each axis."""

    dp_rank: int
    tp_rank: int
    ep_rank: int


@dataclass(frozen=True, slots=True)
class ParallelDims:
    """Sizes of the axes of one replica's ranks."""

    tp: int = 1
    """Ranks that share one token's attention heads and MLP columns; at least 1."""
    dp: int = 1
    """Groups of `tp` ranks, each with its own tokens; at least 1."""
    redundant_experts: int = 0
    """Slots of each rank and modality beyond its share of the experts, for copies of hot ones; at least 0."""

    def __post_init__(self) -> None:
        for name, size, least in (
            ("tp", self.tp, 1),
            ("dp", self.dp, 1),
            ("redundant_experts", self.redundant_experts, 0),
        ):
            if size < least:
                raise ConfigError(f"{name} = {size} must be at least {least}")

    @property
    def world(self) -> int:
        """Ranks of one replica, tp * dp."""
        return self.tp * self.dp

    @property
    def ep(self) -> int:
        """Ranks that share the experts: all of them."""
        return self.world

    def coordinates(self, rank: int) -> Coordinates:
        """Coordinates of a rank; neighbours in `rank` are neighbours in tp. tp 4, dp 2: rank 6 is (1, 2, 6)."""
        assert 0 <= rank < self.world, f"rank {rank} is outside [0, {self.world})"
        return Coordinates(dp_rank=rank // self.tp, tp_rank=rank % self.tp, ep_rank=rank)

    def rank(self, dp_rank: int, tp_rank: int) -> int:
        """Rank at these coordinates; the inverse of `coordinates`."""
        assert 0 <= dp_rank < self.dp, f"dp_rank {dp_rank} is outside [0, {self.dp})"
        assert 0 <= tp_rank < self.tp, f"tp_rank {tp_rank} is outside [0, {self.tp})"
        return dp_rank * self.tp + tp_rank

    def check(self, model: ModelConfig) -> None:
        """Hold every size of the model that is split against the axis that splits it.

        Raises:
            ConfigError: one does not divide; the message shows the equation with its numbers, and sizes that do.
        """
        for name, size, axis, parts in self._splits(model):
            if size % parts:
                raise ConfigError(
                    f"{name} % {axis} = {size} % {parts} = {size % parts}, must be 0 "
                    f"(tp = {self.tp}, dp = {self.dp}, ep = tp * dp = {self.ep}); "
                    f"{axis} can be {', '.join(map(str, _divisors(size)))}"
                )
            if axis == "ep" and size // parts + self.redundant_experts > size:
                raise ConfigError(
                    f"redundant_experts = {self.redundant_experts} must be at most {size - size // parts}: "
                    f"{name} / (tp * dp) = {size // parts} stand on each rank already, none of them twice"
                )

    def check_blocks(self, model: ModelConfig, method: Method) -> None:
        """Hold what is split, or laid together in one matrix, against the blocks that share a scale.

        With a scale per row nothing has to divide: a rank with some columns of a row has the whole row's scale.

        Raises:
            ConfigError: a block would lie in two ranks, or in two matrices; with the equation.
        """
        block = method.block[1]
        for name, size, tp in _blocked(model, self.tp) if block else ():
            if size // tp % block:
                over, sizes = (f"{name} / tp", f"{size} / {tp}") if tp > 1 else (name, str(size))
                raise ConfigError(
                    f"quantization {method.name}: {over} % {block} = {sizes} % {block} = {size // tp % block}, must be 0, "
                    f"as {block} x {block} numbers share a scale; choose wint8{' or a smaller tp' if tp > 1 else ''}"
                )

    def _splits(self, model: ModelConfig) -> Iterator[tuple[str, int, str, int]]:
        """(name, size, axis, parts) of everything that is split."""
        text = model.text
        yield "num_heads", text.num_heads, "tp", self.tp
        yield "num_kv_heads", text.num_kv_heads, "tp", self.tp
        yield "intermediate_size", text.intermediate_size, "tp", self.tp
        yield "shared_intermediate_size", text.shared_intermediate_size, "tp", self.tp
        for name, pool in (("text_experts", text.text_experts), ("vision_experts", text.vision_experts)):
            if pool is not None:
                yield f"{name}.num_experts", pool.num_experts, "ep", self.ep


def _blocked(model: ModelConfig, tp: int) -> Iterator[tuple[str, int, int]]:
    """(name, size, ranks that share it) of rows that are laid together in one matrix, and of columns that are split."""
    text = model.text
    yield "num_heads * head_dim", text.num_heads * text.head_dim, tp
    yield "num_kv_heads * head_dim", text.num_kv_heads * text.head_dim, tp
    if len(text.sparse_layers) < text.num_layers:
        yield "intermediate_size", text.intermediate_size, tp
    yield "shared_intermediate_size", text.shared_intermediate_size, tp
    for name, pool in (("text_experts", text.text_experts), ("vision_experts", text.vision_experts)):
        if pool is not None:
            yield f"{name}.intermediate_size", pool.intermediate_size, 1


def ep_rank_of(expert: int, num_experts: int, ep: int) -> int:
    """Rank that holds an expert: each modality's experts are dealt in equal runs, so all ranks have work in both.

    Args:
        expert: index in the joint table; text experts are 0 .. num_experts - 1, vision experts follow.
        num_experts: experts of one modality.
        ep: ranks; where it does not divide `num_experts`, some ranks hold one expert more than others.

    Returns:
        64 experts each, ep 8: experts 0..7 and 64..71 are on rank 0, 8..15 and 72..79 on rank 1, ...
    """
    return expert % num_experts * ep // num_experts


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part of a model; by default the whole model. Sizes that are split must have passed `dims.check`."""

    dims: ParallelDims = ParallelDims()
    rank: int = 0
    """In [0, dims.world)."""

    def __post_init__(self) -> None:
        self.dims.coordinates(self.rank)  # asserts that the rank is there

    @property
    def tp_rank(self) -> int:
        """Which of the `tp` equal parts of attention heads and MLP columns."""
        return self.dims.coordinates(self.rank).tp_rank

    @property
    def ep_rank(self) -> int:
        """Which of the `ep` parts of the experts."""
        return self.dims.coordinates(self.rank).ep_rank

    def slice_of(self, size: int) -> slice:
        """This rank's run of `size` things that are split over tp: query heads, or columns of an MLP.

        tp 4: of 20 heads, tp_rank 1 has slice(5, 10). The slices of all tp ranks in order are all things, once.
        """
        share = self.share_of(size)
        return slice(self.tp_rank * share, (self.tp_rank + 1) * share)

    def share_of(self, size: int) -> int:
        """Length of `slice_of`, the same on every rank."""
        assert size % self.dims.tp == 0, f"{size} is not split evenly over tp = {self.dims.tp}"
        return size // self.dims.tp

    def kv_heads(self, num_kv_heads: int) -> range:
        """KV heads of this rank, see `kv_heads_of_rank`."""
        return kv_heads_of_rank(num_kv_heads, self.dims.tp, self.tp_rank)

    def experts(self, num_experts: int) -> range:
        """Experts of this rank within one modality's `num_experts`: those that `ep_rank_of` puts here."""
        first, end = (-(-rank * num_experts // self.dims.ep) for rank in (self.ep_rank, self.ep_rank + 1))
        return range(first, end)

    def slots(self, num_experts: int) -> int:
        """Places for experts on this rank within one modality's `num_experts`, redundant ones included."""
        return len(self.experts(num_experts)) + self.dims.redundant_experts


WHOLE = Shard()
"""A model on one rank."""


def _divisors(size: int, limit: int = 64) -> list[int]:
    return [n for n in range(1, min(size, limit) + 1) if size % n == 0]

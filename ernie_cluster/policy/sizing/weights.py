"""Every matrix of a model, and what of it a rank holds.

Attention, MLPs, embedding and head are split over `tp` and repeated in each of the `dp` groups; experts stay whole and are
spread over all `ep = tp * dp` ranks, pool by pool, each rank with the redundant slots of its pool's configuration; norms,
routers, ViT and resampler are whole on each rank. A role decides which matrices there are, as in `model/build.py`; the tests
hold the two against each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

from ernie_cluster.config.model import ExpertPool, ModelConfig, TextConfig, VisionConfig
from ernie_cluster.config.parallel import ParallelDims
from ernie_cluster.config.pool import Role
from ernie_cluster.policy.sizing.formats import Kind, WeightFormat

Part = Literal[
    "attention", "dense_mlp", "shared_experts", "text_experts", "vision_experts", "routers", "norms", "embedding", "head",
    "vit", "resampler",
]  # fmt: skip
PARTS: tuple[Part, ...] = get_args(Part)

Split = Literal["rows", "columns", "experts", "whole"]
"""rows, columns: over tp; experts: over ep; whole: every rank has all."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """`layers` x `experts` equal matrices; a vector has one row."""

    part: Part
    rows: int
    """Outputs."""
    columns: int
    """Inputs."""
    kind: Kind = "plain"
    split: Split = "whole"
    layers: int = 1
    experts: int = 1

    @property
    def numbers(self) -> int:
        return self.layers * self.experts * self.rows * self.columns

    def on_rank(self, dims: ParallelDims, rank: int) -> Matrix:
        """What this rank holds of it."""
        place = dims.coordinates(rank)
        match self.split:
            case "rows":
                return replace(self, rows=_share(self.rows, dims.tp, place.tp_rank))
            case "columns":
                return replace(self, columns=_share(self.columns, dims.tp, place.tp_rank))
            case "experts":
                return replace(self, experts=_share(self.experts, dims.ep, place.ep_rank) + dims.redundant_experts)
            case "whole":
                return self

    def copies(self, dims: ParallelDims) -> int:
        """How often each of its numbers is held by the ranks of one replica, redundant slots for experts aside."""
        return {"rows": dims.dp, "columns": dims.dp, "experts": 1, "whole": dims.world}[self.split]

    def num_bytes(self, form: WeightFormat) -> int:
        """Values, without scales."""
        return self.layers * self.experts * form.num_bytes(self.kind, self.rows, self.columns)

    def scale_bytes(self, form: WeightFormat) -> int:
        return self.layers * self.experts * form.scale_bytes(self.kind, self.rows, self.columns)


def matrices(model: ModelConfig, role: Role) -> list[Matrix]:
    """All that a replica of this role holds. A vision role of a text-only model holds nothing."""
    if role == "vision":
        return [] if model.vision is None else list(_vision(model.vision, model.text.hidden_size))
    return list(_decoder(model.text, has_vision_experts=role != "decode"))


def rank_matrices(model: ModelConfig, role: Role, dims: ParallelDims, rank: int) -> list[Matrix]:
    """What one rank of such a replica holds."""
    return [m.on_rank(dims, rank) for m in matrices(model, role)]


def _decoder(text: TextConfig, *, has_vision_experts: bool) -> Iterator[Matrix]:
    hidden, layers, sparse = text.hidden_size, text.num_layers, len(text.sparse_layers)
    width, kv_width = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    yield Matrix("embedding", text.vocab_size, hidden, split="rows")
    if not text.tie_word_embeddings:
        yield Matrix("head", text.vocab_size, hidden, split="rows")
    yield Matrix("norms", 1, hidden, layers=2 * layers + 1)
    for rows in (width, kv_width, kv_width):
        yield Matrix("attention", rows, hidden, "linear", "rows", layers)
    yield Matrix("attention", hidden, width, "linear", "columns", layers)
    yield from _mlp("dense_mlp", hidden, text.intermediate_size, layers - sparse)
    yield from _mlp("shared_experts", hidden, text.shared_intermediate_size, sparse)
    if text.text_experts is not None:
        yield from _experts("text_experts", text.text_experts, hidden, sparse)
    if text.vision_experts is not None and has_vision_experts:
        yield from _experts("vision_experts", text.vision_experts, hidden, sparse)


def _mlp(part: Part, hidden: int, width: int, layers: int) -> Iterator[Matrix]:
    if layers and width:
        yield Matrix(part, width, hidden, "linear", "rows", 2 * layers)  # gate and up
        yield Matrix(part, hidden, width, "linear", "columns", layers)


def _experts(part: Part, pool: ExpertPool, hidden: int, layers: int) -> Iterator[Matrix]:
    yield Matrix(part, pool.intermediate_size, hidden, "expert", "experts", 2 * layers, pool.num_experts)
    yield Matrix(part, hidden, pool.intermediate_size, "expert", "experts", layers, pool.num_experts)
    yield Matrix("routers", pool.num_experts, hidden + 1, "float32", layers=layers)  # with the bias


def _vision(vision: VisionConfig, hidden: int) -> Iterator[Matrix]:
    size, width, depth, merged = vision.hidden_size, vision.intermediate_size, vision.depth, vision.merged_size
    yield Matrix("vit", size, vision.patch_dim)
    yield Matrix("vit", 2 * (2 * depth + 1), size)  # norms, each with weight and bias
    for rows, columns in ((3 * size, size), (size, size), (width, size), (size, width)):
        yield Matrix("vit", rows, columns + 1, layers=depth)  # a bias is one more column
    for inputs in (merged, merged * vision.temporal_merge_size):
        yield Matrix("resampler", merged, inputs + 1)
        yield Matrix("resampler", merged, merged + 1)
        yield Matrix("resampler", 2, merged)
    yield Matrix("resampler", hidden, merged + 1)
    yield Matrix("resampler", 1, hidden)


def _share(size: int, parts: int, index: int) -> int:
    """Of `size` things, those of part `index`; what does not divide is spread evenly, and all shares add up to `size`."""
    return (index + 1) * size // parts - index * size // parts

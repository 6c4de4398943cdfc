"""Which bytes travel together, and from which rank to which. Pure.

Layers, blocks and heads are numbered within the model and the sequence; where a block lies in a replica's cache is
known to that replica alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ernie_cluster.config.kv_layout import KVLayout
from ernie_cluster.errors import ConfigError


@dataclass(frozen=True, slots=True)
class PiecePlan:
    """A rectangle of layers x blocks that travels as one piece."""

    first_layer: int
    num_layers: int
    first_block: int
    """Logical index in the sequence."""
    num_blocks: int
    nbytes: int

    @property
    def detail(self) -> tuple[int, int, int, int]:
        """For `PieceHeader.detail`."""
        return self.first_layer, self.num_layers, self.first_block, self.num_blocks


def plan_pieces(
    layout: KVLayout, first_layer: int, num_layers: int, blocks: tuple[int, int], max_bytes: int
) -> list[PiecePlan]:
    """Cut layers x blocks into pieces of nearly equal size that cover everything exactly once.

    Args:
        layout: of the sending rank.
        first_layer, num_layers: layers that are ready.
        blocks: (first_block, num_blocks), logical indices in the sequence.
        max_bytes: bound of a piece; passed only by a single block of a single layer that is larger.

    Returns:
        Pieces with layers outermost; whole layers where one fits, else runs of blocks of one layer. With 100 bytes
        per block and layer, 2 layers of 5 blocks and at most 300 bytes give blocks [0, 3) and [3, 5) of each layer.
    """
    assert 0 <= first_layer <= first_layer + num_layers <= layout.num_layers
    first_block, num_blocks = blocks
    unit = layout.block_bytes_per_layer
    blocks_each = min(num_blocks, max(1, max_bytes // unit))
    layers_each = max(1, max_bytes // (unit * num_blocks)) if num_blocks else 1
    return [
        PiecePlan(layer, layer_count, block, block_count, layer_count * block_count * unit)
        for layer, layer_count in _spread(first_layer, num_layers, -(-num_layers // layers_each))
        for block, block_count in _spread(first_block, num_blocks, -(-num_blocks // blocks_each) if num_blocks else 0)
    ]


def layer_groups(num_layers: int, bytes_per_layer: int, target_bytes: int) -> list[tuple[int, int]]:
    """Layers to send at a time: each group reaches `target_bytes`, unless all layers together do not.

    Args:
        bytes_per_layer: KV of one layer for the tokens of this chunk.
        target_bytes: below this the fixed price of a piece counts.

    Returns:
        (first_layer, num_layers) of each group, ascending and nearly equal; 7 layers of 10 bytes with a target of 25
        give (0, 4) and (4, 3).
    """
    assert min(num_layers, bytes_per_layer) >= 1
    each = max(1, -(-target_bytes // bytes_per_layer))
    return _spread(0, num_layers, max(1, num_layers // each))


@dataclass(frozen=True, slots=True)
class HeadCopy:
    """A run of KV heads that goes from one rank to another."""

    src_rank: int
    dst_rank: int
    first_head: int
    """In the model's numbering."""
    num_heads: int
    src_head: int
    """Index of the first head within the source rank's slice."""
    dst_head: int
    """Index of the first head within the destination rank's slice."""


def copy_plan(src: Sequence[range], dst: Sequence[range]) -> list[HeadCopy]:
    """Which KV heads of a block go from which source rank to which destination rank.

    Args:
        src, dst: heads held by each tp rank, as `kv_heads_of_rank` gives them; heads may be held by several ranks.

    Returns:
        By destination rank, then head; every head of every destination exactly once, in the longest runs. Copies of a
        head are read in turns, so that replicated sources share the work.

    Raises:
        ConfigError: a destination wants a head that no source holds: the two sides run different models.
    """
    plan = []
    for dst_rank, wanted in enumerate(dst):
        head = wanted.start
        while head < wanted.stop:
            holders = [rank for rank, held in enumerate(src) if head in held]
            if not holders:
                raise ConfigError(
                    f"KV head {head} is wanted by decode rank {dst_rank} and held by none of {len(src)} prefill ranks; "
                    "both sides must serve the same model"
                )
            src_rank = holders[dst_rank % len(holders)]
            end = min(wanted.stop, src[src_rank].stop)
            plan.append(HeadCopy(src_rank, dst_rank, head, end - head, head - src[src_rank].start, head - wanted.start))
            head = end
    return plan


def plan_rank_pieces(
    layout: KVLayout,
    copies: Sequence[HeadCopy],
    first_layer: int,
    num_layers: int,
    blocks: tuple[int, int],
    max_bytes: int,
) -> list[tuple[HeadCopy, PiecePlan]]:
    """`plan_pieces` between gangs whose ranks hold different heads: what one rank sends, and to whom.

    Args:
        layout: of the sending rank.
        copies: those of `copy_plan` that begin at this rank.
        first_layer, num_layers, blocks, max_bytes: as of `plan_pieces`.

    Returns:
        Pieces with the copy that each belongs to: it holds `num_heads` heads of each token, from `src_head` on in this
        rank's cache and from `dst_head` on in the destination's.
    """
    return [
        (copy, piece)
        for copy in copies
        for piece in plan_pieces(
            replace(layout, num_kv_heads=copy.num_heads), first_layer, num_layers, blocks, max_bytes
        )
    ]


def _spread(first: int, count: int, parts: int) -> list[tuple[int, int]]:
    """`count` items from `first` on, in `parts` runs that differ by at most one; the longer ones first."""
    runs = []
    for part in range(parts):
        size = count // parts + (part < count % parts)
        runs.append((first, size))
        first += size
    return runs

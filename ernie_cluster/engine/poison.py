"""A debugging aid: blocks that nobody holds read as NaN, so that whoever reads them still gives itself away.

Every byte is 255, which is NaN in every type of K and V, and where those are 8 bits in the scale beside them. A block that
is handed out again is zero until it is written, for attention reads past the end of a context and weighs that with nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ernie_cluster.engine.block_pool import Eraser
from ernie_cluster.engine.followers import Followers


class Poison(Eraser):
    """What becomes of the blocks of one rank.

    Args:
        kv: [layers, 2, num_blocks, block_size, kv_heads, row], the rank's cache.
    """

    def __init__(self, kv: Tensor) -> None:
        self._bytes = kv.view(torch.uint8)

    def poison(self, blocks: Sequence[int]) -> None:
        """See `Eraser`."""
        self._bytes[:, :, list(blocks)] = 255

    def clean(self, blocks: Sequence[int]) -> None:
        """See `Eraser`."""
        self._bytes[:, :, list(blocks)] = 0


class LedPoison(Poison):
    """The leader's; followers do the same to their heads, before anything that comes later reads or writes there.

    Args:
        kv: see `Poison`.
        followers: the ranks that hold the other KV heads.
    """

    def __init__(self, kv: Tensor, followers: Followers) -> None:
        super().__init__(kv)
        self._followers = followers

    def poison(self, blocks: Sequence[int]) -> None:
        """See `Eraser`."""
        super().poison(blocks)
        self._followers.erase("poison", blocks)

    def clean(self, blocks: Sequence[int]) -> None:
        """See `Eraser`."""
        super().clean(blocks)
        self._followers.erase("clean", blocks)

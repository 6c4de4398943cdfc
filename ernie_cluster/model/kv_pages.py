"""How K and V lie in their pages: as they are, or in 8 bits with a scale for each token and head.

Pages are [blocks, block_size, G, row]. Shapes: T tokens, G kv heads, D numbers per head.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ernie_cluster.model.quant import Codec


class PlainPages:
    """Numbers in the model's type: a row is D of them."""

    def row(self, head_dim: int, dtype: torch.dtype) -> tuple[int, torch.dtype]:
        """Items of one row, and their type, for a model of this type."""
        return head_dim, dtype

    def write(self, pages: Tensor, slots_T: Tensor, rows_TGD: Tensor) -> None:
        """To their slots, block * block_size + offset."""
        pages.view(-1, *pages.shape[2:]).index_copy_(0, slots_T, rows_TGD)

    def read(self, pages: Tensor, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        """Some blocks, int64 of any shape -> numbers [..., block_size, G, D]."""
        return pages[blocks]


class EightBitPages(PlainPages):
    """A row is D codes and, in two more bytes, the bfloat16 scale that they share; so a page holds all that it needs, and
    whoever moves its bytes need not know.

    Args:
        codec: with one scale per row.
    """

    def __init__(self, codec: Codec) -> None:
        self._codec = codec

    def row(self, head_dim: int, dtype: torch.dtype) -> tuple[int, torch.dtype]:
        return head_dim + 2, torch.uint8

    def write(self, pages: Tensor, slots_T: Tensor, rows_TGD: Tensor) -> None:
        codes, scales = self._codec.quantise(rows_TGD.flatten(0, 1))
        parts = (codes.view(torch.uint8), scales.bfloat16().view(torch.uint8))
        super().write(pages, slots_T, torch.cat(parts, 1).view(*rows_TGD.shape[:2], -1))

    def read(self, pages: Tensor, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        rows = super().read(pages, blocks, dtype)
        numbers = rows[..., :-2].view(self._codec.dtype).to(dtype)
        return numbers.mul_(rows[..., -2:].contiguous().view(torch.bfloat16).to(dtype))


PAGES: Mapping[str, PlainPages] = {
    "int8": EightBitPages(Codec((1, 0), torch.int8, 127.0)),
    "fp8": EightBitPages(Codec((1, 0), torch.float8_e4m3fn, 448.0)),
}
"""By the name of their type, where it is not the model's own."""

PLAIN_PAGES = PlainPages()

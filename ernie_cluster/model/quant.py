"""Matrices in few bits: codes, and scales that blocks of them share. Pure functions of tensors; knows no model.

A number is code * scale. Codes are symmetric and rounded to nearest; a scale is the block's largest magnitude over the
largest code, rounded to bfloat16, so that multiplying in the model's type rounds once. Hence quantising what was
dequantised gives the very same codes and scales, and no number is off by more than half a scale (fp8: half a step of its
own binade). Shapes: R rows (outputs), C columns (inputs), blocks of r x c numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ernie_cluster.config.quantization import Method

_SMALLEST = 2.0**-100
"""A block of smaller numbers is stored as zeros: their scale would be no normal number."""


@dataclass(frozen=True, slots=True)
class Codec:
    """How codes are made, and how many share a scale."""

    block: tuple[int, int]
    """(r, c), 0 = all columns. The last block of a row or column may be smaller."""
    dtype: torch.dtype
    """Of what is stored: int8, uint8 with two codes in it, or float8_e4m3fn."""
    top: float
    """The largest code."""

    @property
    def per_item(self) -> int:
        """Codes in one stored number: 4-bit ones are two, the even column in the low half."""
        return 2 if self.dtype == torch.uint8 else 1

    def codes_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Of what is stored for an [R, C] matrix."""
        return rows, -(-columns // self.per_item)

    def scales_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Of its scales. 1536 x 2560: [1536, 1] per row, [12, 20] by blocks of 128 x 128."""
        return -(-rows // self.block[0]), -(-columns // self.block[1]) if self.block[1] else 1

    def codes_part(self, rows: slice, columns: slice) -> tuple[slice, slice]:
        """Where the codes of part of a matrix lie; the part begins with a stored number."""
        n = self.per_item
        assert columns.start % n == 0, f"column {columns.start} lies inside a stored number"
        return rows, slice(columns.start // n, -(-columns.stop // n))

    def scales_part(self, rows: slice, columns: slice) -> tuple[slice, slice]:
        """Where the scales of part of a matrix lie; the part begins with a block."""
        (r, c), every = self.block, slice(0, 1)
        assert rows.start % r == 0, f"row {rows.start} lies inside a block of {r}"
        assert not c or columns.start % c == 0, f"column {columns.start} lies inside a block of {c}"
        across = slice(columns.start // c, -(-columns.stop // c)) if c else every
        return slice(rows.start // r, -(-rows.stop // r)), across

    def quantise(self, numbers_RC: Tensor) -> tuple[Tensor, Tensor]:
        """(codes, scales float32) of a matrix of any float type; what is not finite gives scales that are not."""
        rows, columns = numbers_RC.shape
        r, c = self.block[0], self.block[1] or columns
        padded = numbers_RC.float()
        if columns % c or rows % r:
            padded = functional.pad(padded, (0, -columns % c, 0, -rows % r))
        blocks = padded.view(padded.shape[0] // r, r, padded.shape[1] // c, c)
        largest = torch.maximum(blocks.amax((1, 3), keepdim=True), -blocks.amin((1, 3), keepdim=True))
        scales = (largest / self.top).bfloat16().float()
        scales = torch.where(largest < _SMALLEST, 1.0, scales)
        codes = (blocks / scales).view(padded.shape)[:rows, :columns].clamp_(-self.top, self.top)
        return self._stored(codes), scales[:, 0, :, 0]

    def dequantise(self, codes: Tensor, scales: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        """The numbers.

        Args:
            codes: [..., R, C / `per_item`].
            scales: [..., R / r, C / c], rounded up.
            columns: C, which cannot be told from packed codes.
            dtype: of the result.
        """
        numbers, scales, (r, c) = self._codes(codes, columns, dtype), scales.to(dtype), self.block
        rows = numbers.shape[-2]
        if not c:
            return numbers.mul_(scales)
        if rows % r or columns % c:
            return numbers.mul_(scales.repeat_interleave(r, -2)[..., :rows, :].repeat_interleave(c, -1)[..., :columns])
        numbers.view(*numbers.shape[:-2], rows // r, r, columns // c, c).mul_(scales[..., :, None, :, None])
        return numbers

    def _stored(self, codes_RC: Tensor) -> Tensor:
        if self.dtype == torch.float8_e4m3fn:
            return codes_RC.to(self.dtype)
        whole = codes_RC.round_().to(torch.int8)
        if self.per_item == 1:
            return whole
        halves = functional.pad(whole + 8, (0, whole.shape[1] % 2)).to(torch.uint8)
        return halves[:, 0::2] | halves[:, 1::2] << 4

    def _codes(self, stored: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        """As numbers of their own, exact in every float type."""
        if self.per_item == 1:
            return stored.to(dtype)
        out = torch.empty(*stored.shape[:-1], 2 * stored.shape[-1], dtype=dtype, device=stored.device)
        out[..., 0::2], out[..., 1::2] = stored & 15, stored >> 4
        return out.sub_(8)[..., :columns]


def codec_of(method: Method, bits: int) -> Codec:
    """For `bits` of a number by a method."""
    if method.is_fp8:
        return Codec(method.block, torch.float8_e4m3fn, 448.0)
    return Codec(method.block, *{8: (torch.int8, 127.0), 4: (torch.uint8, 7.0)}[bits])

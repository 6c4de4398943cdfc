"""Products of many different numbers of tokens, on CPU in bfloat16, where torch compiles a kernel for each number it meets.

oneDNN keeps the last 1,024 of them, at a megabyte and up to a millisecond each: with prompts of all lengths, and experts that
get any number of tokens, a replica compiles for most of its time and grows by 900 MB. A few sizes, to which the rows are
filled up with zeros, end both. Rows do not know of each other, so the result is the same.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from ernie_cluster.model.ops import TorchOps
from ernie_cluster.model.storage import Weight

_STEP = 16
"""Rows that a kernel works on at once; between two sizes there are as many, or a sixteenth of the next power of two."""


def padded_size(num_rows: int) -> int:
    """The size to fill `num_rows` up to: at most an eighth more above 128, about 8 sizes per octave."""
    if num_rows == 0:
        return 0
    octave = 1 << (num_rows - 1).bit_length()
    if octave <= _STEP:
        return octave
    step = max(_STEP, octave // 16)
    return -(-num_rows // step) * step


class PaddedOps(TorchOps):
    """`TorchOps` with a few sizes of products."""

    def linear(self, x_TD: Tensor, weight_OD: Weight) -> Tensor:
        return self.dense(x_TD, weight_OD[...])

    def expert_linear(self, x_TD: Tensor, weight_EOD: Weight, expert: int) -> Tensor:
        return self.dense(x_TD, weight_EOD[expert])

    def dense(self, x_TD: Tensor, weight_OD: Tensor) -> Tensor:
        """x @ weight.T -> [T, O]."""
        return functional.linear(_filled(x_TD), weight_OD)[: x_TD.shape[0]]

    def weighted_sum(self, weights_TK: Tensor, x_TKD: Tensor) -> Tensor:
        return super().weighted_sum(_filled(weights_TK), _filled(x_TKD))[: x_TKD.shape[0]]


def _filled(x: Tensor) -> Tensor:
    """With rows of zeros up to the next size."""
    num_rows = x.shape[0]
    size = padded_size(num_rows)
    if size == num_rows:
        return x
    full = x.new_zeros(size, *x.shape[1:])
    full[:num_rows] = x
    return full

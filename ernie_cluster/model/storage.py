"""How a decoder's matrices are held: as numbers, or as codes and scales. What holds one gives numbers when indexed.

`Storage` says it for a whole model, and makes what will hold them. Shapes: E experts (none for other matrices), R rows
(outputs), C columns (inputs).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import EllipsisType
from typing import Protocol

import torch
from torch import Tensor, nn

from ernie_cluster.config.quantization import Method
from ernie_cluster.model.quant import Codec, codec_of


class Weight(Protocol):
    """A matrix, or one per expert; a tensor is one."""

    @property
    def shape(self) -> torch.Size:
        """[R, C] or [E, R, C]."""

    def __getitem__(self, index: int | EllipsisType | Tensor, /) -> Tensor:
        """All numbers (`...`), those of one expert, or of several (int64 [P]), in the model's type."""


def empty_weight(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """An uninitialised weight on the default device, to be filled from a checkpoint."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


class QuantisedWeight(nn.Module):
    """A `Weight` of codes and scales, uninitialised.

    Args:
        codec: made them, and reads them.
        shape: [R, C] or [E, R, C].
        dtype: of the numbers that it gives.
    """

    def __init__(self, codec: Codec, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.codec, self.shape, self.dtype = codec, torch.Size(shape), dtype
        *experts, rows, columns = shape
        self.codes = empty_weight(*experts, *codec.codes_shape(rows, columns), dtype=codec.dtype)
        self.scales = empty_weight(*experts, *codec.scales_shape(rows, columns), dtype=torch.float32)

    def fill(self, numbers: Callable[[int, int], Tensor]) -> None:
        """Hold these numbers, one matrix after the other; `numbers` is called with R and C."""
        codes, scales = (part.data.view(-1, *part.shape[-2:]) for part in (self.codes, self.scales))
        for i in range(len(codes)):
            codes[i], scales[i] = self.codec.quantise(numbers(self.shape[-2], self.shape[-1]))

    def __getitem__(self, index: int | EllipsisType | Tensor, /) -> Tensor:
        return self.codec.dequantise(self.codes[index], self.scales[index], self.shape[-1], self.dtype)


@dataclass(frozen=True, slots=True)
class Storage:
    """Of one model: its type, and how matrices of each kind are held."""

    dtype: torch.dtype
    method: Method | None = None

    def linear(self, *shape: int) -> nn.Parameter | QuantisedWeight:
        """For attention, dense MLPs and shared experts."""
        return self._held(shape, 0 if self.method is None else self.method.linear_bits)

    def expert(self, *shape: int) -> nn.Parameter | QuantisedWeight:
        """For experts."""
        return self._held(shape, 0 if self.method is None else self.method.expert_bits)

    def plain(self, *shape: int) -> nn.Parameter:
        """For everything else."""
        return empty_weight(*shape, dtype=self.dtype)

    def _held(self, shape: tuple[int, ...], bits: int) -> nn.Parameter | QuantisedWeight:
        if self.method is None:
            return self.plain(*shape)
        return QuantisedWeight(codec_of(self.method, bits), shape, self.dtype)

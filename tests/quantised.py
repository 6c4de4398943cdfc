"""Quantised weights of numbers at hand."""

from __future__ import annotations

import torch

from ernie_cluster.model.quant import Codec
from ernie_cluster.model.storage import QuantisedWeight


def quantised(numbers: torch.Tensor, codec: Codec) -> QuantisedWeight:
    """A weight that holds [R, C] or [E, R, C], and gives bfloat16."""
    weight = QuantisedWeight(codec, tuple(numbers.shape), torch.bfloat16)
    matrices = iter(numbers.view(-1, *numbers.shape[-2:]))
    weight.fill(lambda rows, columns: next(matrices))
    return weight

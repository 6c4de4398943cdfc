"""Quantised weights of numbers at hand."""

from __future__ import annotations

import torch

from ernie_cluster.model.quant import Codec
from ernie_cluster.model.storage import QuantisedWeight


def quantised(numbers: torch.Tensor, codec: Codec) -> QuantisedWeight:
    """A weight that holds [R, C] or [E, R, C], and gives bfloat16."""
    weight = QuantisedWeight(codec, tuple(numbers.shape), torch.bfloat16)
    for i, matrix in enumerate(numbers.view(-1, *numbers.shape[-2:])):
        codes, scales = codec.quantise(matrix)
        weight.codes.view(-1, *codes.shape)[i] = codes
        weight.scales.view(-1, *scales.shape)[i] = scales
    return weight

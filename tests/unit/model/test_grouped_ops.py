"""Experts as grouped products: the same sums as one product per expert, and no question to the device."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.model.grouped_ops import GroupedOps
from ernie_cluster.model.ops import ExpertWeights, TorchOps


def pools(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[ExpertWeights]:
    """Four text experts of width 16 and four vision experts of width 8, hidden 32."""
    generator = torch.Generator().manual_seed(0)
    return [
        ExpertWeights(
            torch.randn(4, 2 * width, 32, generator=generator).to(device, dtype) / 5,
            torch.randn(4, 32, width, generator=generator).to(device, dtype) / 3,
        )
        for width in (16, 8)
    ]


@settings(max_examples=60)
@given(st.lists(st.booleans(), min_size=1, max_size=24), st.integers(0, 1000))
def test_equals_one_product_per_expert(is_vision: list[bool], seed: int) -> None:
    """For any mix of the two modalities, none and all included."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(4, generator=generator)[:2] + 4 * v for v in is_vision])
    x = torch.randn(len(is_vision), 32, generator=generator)
    weights = torch.rand(len(is_vision), 2, generator=generator)
    got, expected = (ops.experts(x, pools(), ids, weights) for ops in (GroupedOps(), TorchOps()))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_a_device_without_data_can_run_it() -> None:
    """On the meta device there is nothing to ask: every shape follows from the number of tokens."""
    x = torch.empty(6, 32, device="meta", dtype=torch.bfloat16)
    ids, weights = torch.zeros(6, 2, device="meta", dtype=torch.long), torch.empty(6, 2, device="meta")
    out = GroupedOps().experts(x, pools("meta", torch.bfloat16), ids, weights)
    assert out.shape == (6, 32)
    with pytest.raises((NotImplementedError, RuntimeError)):  # the CPU form does ask
        TorchOps().experts(x, pools("meta", torch.bfloat16), ids, weights)

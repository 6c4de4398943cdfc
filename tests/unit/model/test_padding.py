"""Products with rows that are filled up."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from ernie_cluster.model.ops import TorchOps
from ernie_cluster.model.padding import PaddedOps, padded_size


@given(st.integers(1, 1 << 20))
def test_few_sizes_that_are_little_more(num_rows: int) -> None:
    size = padded_size(num_rows)
    assert num_rows <= size < max(2 * num_rows, num_rows + 1)
    assert padded_size(size) == size
    if num_rows > 128:
        assert size - num_rows < num_rows / 8


def test_there_are_few_sizes() -> None:
    assert len({padded_size(n) for n in range(1, 4097)}) <= 8 * 6 + 5


@given(st.integers(0, 150), st.integers(0, 2**32))
def test_the_rows_are_the_same(num_rows: int, seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(num_rows, 24, generator=chance), torch.randn(2, 8, 24, generator=chance)
    ops, plain = PaddedOps(), TorchOps()
    torch.testing.assert_close(ops.linear(x, weight[0]), plain.linear(x, weight[0]))
    torch.testing.assert_close(ops.expert_linear(x, weight, 1), plain.expert_linear(x, weight, 1))
    shares, of_each = torch.rand(num_rows, 3, generator=chance), torch.randn(num_rows, 3, 5, generator=chance)
    torch.testing.assert_close(ops.weighted_sum(shares, of_each), plain.weighted_sum(shares, of_each))

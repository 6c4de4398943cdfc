"""K and V in 8 bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.config.kv_layout import KVLayout
from ernie_cluster.model.kv_pages import PAGES, PLAIN_PAGES
from tests import tiny

NAMES = sorted(PAGES)


@settings(max_examples=30)
@given(st.sampled_from(["plain", *NAMES]), st.integers(0, 10**6), st.integers(1, 12), st.booleans())
def test_what_was_written_is_read_and_nothing_else_changes(name: str, seed: int, num: int, is_half: bool) -> None:
    dtype, kind = torch.bfloat16 if is_half else torch.float32, PAGES.get(name, PLAIN_PAGES)
    generator = torch.Generator().manual_seed(seed)
    row, stored = kind.row(6, dtype)
    heads = torch.zeros(5, 4, 3, row, dtype=stored)
    pages = heads[:, :, 1:]  # two heads of a cache that ranks share
    rows = (torch.randn(num, 2, 6, generator=generator) * 10 ** torch.randn(num, 2, 1, generator=generator)).to(dtype)
    slots = torch.randperm(16, generator=generator)[:num] + 4
    kind.write(pages, slots, rows)
    got = kind.read(pages, torch.arange(5), dtype).flatten(0, 1)
    bound = {"plain": 0.0, "int8": 0.5 / 127 + 2**-8, "fp8": 2**-4 + 2**-8}[name] * rows.float().abs().amax(
        -1, keepdim=True
    )
    assert ((got[slots].float() - rows.float()).abs() <= bound).all()
    others = torch.ones(20, dtype=torch.bool).index_fill_(0, slots, False)
    assert not got[others].any()
    assert not heads[:, :, 0].any()


@pytest.mark.parametrize("name", ["float32", *NAMES])
@pytest.mark.parametrize("tp", [1, 2])
def test_layout_and_cache_agree_on_bytes(name: str, tp: int) -> None:
    config = tiny.tiny_config()
    layout = KVLayout.from_model(config, tiny.BLOCK_SIZE, name, tp)
    row, dtype = PAGES.get(name, PLAIN_PAGES).row(config.text.head_dim, torch.float32)
    assert (
        layout.bytes_per_token == config.text.num_layers * 2 * (config.text.num_kv_heads // tp) * row * dtype.itemsize
    )

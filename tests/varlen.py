"""`torch.nn.attention.varlen.varlen_attn` in plain torch: what its documentation says, one query at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
    num_splits: int | None,
) -> Tensor:
    """-> [T, H, D]; pages are [num, size, G, D]. Looks at the values, which a GPU's kernel does on the device."""
    assert enable_gqa
    assert all(t.dtype == torch.int32 for t in (cu_seq_q, seqused_k, block_table))
    assert cu_seq_k is None or torch.equal(cu_seq_k.diff(), seqused_k)
    assert max_q >= cu_seq_q.diff().max()
    assert max_k >= seqused_k.max()
    out = torch.full(query.shape, torch.nan, dtype=query.dtype)
    group = query.shape[1] // key.shape[2]
    for i in range(len(seqused_k)):
        start, end, num_keys = int(cu_seq_q[i]), int(cu_seq_q[i + 1]), int(seqused_k[i])
        k, v = (pages[block_table[i].long()].flatten(0, 1)[:num_keys].float() for pages in (key, value))
        for row in range(start, end):
            last = num_keys if window_size[1] < 0 else num_keys - (end - 1 - row)  # the last query sees all keys
            for head in range(query.shape[1]):
                scores = k[:last, head // group] @ query[row, head].float() * query.shape[2] ** -0.5
                out[row, head] = scores.softmax(0) @ v[:last, head // group]
    return out

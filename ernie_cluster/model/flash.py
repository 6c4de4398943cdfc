"""Paged attention by torch's `varlen_attn`, which needs no question to the device.

Decode rows and prefill chunks go into one call. torch brings FlashAttention 2; where FlashAttention 3 is installed on
Hopper GPUs, it is used. The two differ in what they take, and that is all this file knows.

Source of the rules: torch 2.13 `torch/nn/attention/varlen.py` and `test/test_varlen_attention.py`; flash-attention
`csrc/flash_attn/flash_api.cpp` (pages) and `hopper/flash_api.cpp`; pytorch issue 194167 (splits).
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ernie_cluster.config.engine import GPU_BLOCK_TOKENS
from ernie_cluster.errors import ConfigError
from ernie_cluster.model.kv_pages import PlainPages
from ernie_cluster.model.step import StepInput

log = logging.getLogger(__name__)

PAGE_TOKENS = GPU_BLOCK_TOKENS
"""FlashAttention 2 takes pages of a multiple of so many tokens."""

Kernel = Callable[..., Any]
"""Signature of `torch.nn.attention.varlen.varlen_attn`. Not of `varlen_attn_out`: FlashAttention 2 turns a decoding query's
heads around, and what it then returns need not be the memory that it was given."""


class FlashAttention:
    """Causal attention of every query over its sequence's paged K and V, on one kernel.

    Args:
        kernel: see there.
        page_tokens: block sizes must be a multiple of it.
        has_key_starts: the kernel wants `cu_seq_k` beside the block table (FlashAttention 2), or refuses it (3).
        splits: parts into which the keys of a sequence are divided in steps with prompts; None: the kernel decides.
        decode_splits: the same for steps that only decode.
    """

    def __init__(
        self,
        kernel: Kernel,
        *,
        page_tokens: int = PAGE_TOKENS,
        has_key_starts: bool = True,
        splits: int | None = 1,
        decode_splits: int | None = 1,
    ) -> None:
        self._kernel, self._page_tokens, self._has_key_starts = kernel, page_tokens, has_key_starts
        self._splits, self._decode_splits = splits, decode_splits

    def __call__(self, q_THD: Tensor, pages: tuple[Tensor, Tensor], step: StepInput) -> Tensor:
        """-> [T, H * head_dim]; see `TorchOps.attention`."""
        if not step.query_lens:  # a rank without tokens, whose peers have some
            return q_THD.flatten(1)
        block_size, longest = pages[0].shape[1], max(step.query_lens)
        out: Tensor = self._kernel(
            q_THD,
            *pages,
            step.query_starts,
            step.key_starts if self._has_key_starts else None,
            longest,
            # a bound that follows from shapes alone: a captured step is replayed with longer sequences
            step.block_tables_BM.shape[1] * block_size,
            # a single query sees all keys; said so, the kernel reads them once for all heads of a group
            window_size=(-1, -1) if longest == 1 else (-1, 0),
            enable_gqa=True,
            seqused_k=step.seq_lens_B,
            block_table=step.block_tables_BM,
            num_splits=self._decode_splits if longest == 1 else self._splits,
        )
        return out.flatten(1)

    def check(self, block_size: int) -> None:
        """ConfigError when the kernel cannot take blocks of this size."""
        if block_size % self._page_tokens:
            raise ConfigError(
                f"block_size = {block_size}: attention on this GPU takes a multiple of {self._page_tokens}; "
                f"set engine.block_size to {self._page_tokens}"
            )


class UnpackedAttention:
    """The same over pages of 8 bits: those of the step are unpacked into pages of their own, which the kernel then reads.

    What it takes of memory and time follows from the block tables' shape alone, so it can be captured, too.

    Args:
        attend: reads plain pages.
        pages: how K and V lie in the cache.
    """

    def __init__(self, attend: FlashAttention, pages: PlainPages) -> None:
        self._attend, self._pages = attend, pages

    def __call__(self, q_THD: Tensor, pages: tuple[Tensor, Tensor], step: StepInput) -> Tensor:
        """See `FlashAttention`."""
        tables = step.block_tables_BM
        k, v = (self._pages.read(p, tables.flatten().long(), q_THD.dtype) for p in pages)
        own = torch.arange(tables.numel(), dtype=tables.dtype, device=tables.device).view_as(tables)
        return self._attend(q_THD, (k, v), replace(step, block_tables_BM=own))

    def check(self, block_size: int) -> None:
        """See `FlashAttention`."""
        self._attend.check(block_size)


def choose_flash(device: torch.device) -> FlashAttention:
    """The best there is for a GPU: FlashAttention 3 where it is installed and can run, else torch's own."""
    from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl
    from torch.nn.attention.varlen import varlen_attn

    is_hopper = torch.cuda.get_device_capability(device)[0] == 9
    if is_hopper and current_flash_attention_impl() is None and importlib.util.find_spec("flash_attn_interface"):
        activate_flash_attention_impl("FA3")
    if (active := current_flash_attention_impl()) is not None:
        log.info("attention: %s", active)
        return FlashAttention(varlen_attn, page_tokens=1, has_key_starts=False, splits=None, decode_splits=None)
    splits = None if splits_are_right(varlen_attn, device) else 1
    log.info("attention: FlashAttention 2, %s", "one part per sequence" if splits else "long sequences in parts")
    return FlashAttention(varlen_attn, decode_splits=splits)


@torch.inference_mode()
def splits_are_right(kernel: Kernel, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether the kernel may divide the keys of decoding sequences, which makes small batches much faster.

    Versions of FlashAttention 2 leave rows unwritten when they do (pytorch issue 194167). Asked of the kernel itself, as
    the number of a version does not tell: two sequences of 4,096 tokens, one with and one without parts.
    """
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu").to(device, dtype)

    per_sequence = 16
    q, k, v = random(2, 8, 128), *(random(2 * per_sequence, PAGE_TOKENS, 2, 128) for _ in range(2))
    lens = torch.full((2,), per_sequence * PAGE_TOKENS, dtype=torch.int32, device=device)
    starts = torch.arange(3, dtype=torch.int32, device=device)
    tables = torch.arange(2 * per_sequence, dtype=torch.int32, device=device).view(2, per_sequence)
    whole, divided = (
        kernel(
            q, k, v, starts, starts * lens[0], 1, per_sequence * PAGE_TOKENS, window_size=(-1, -1), enable_gqa=True,
            seqused_k=lens, block_table=tables, num_splits=splits,
        )
        for splits in (1, None)
    )  # fmt: skip
    return bool(torch.allclose(whole, divided, rtol=2**-6, atol=2**-8))

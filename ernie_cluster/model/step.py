"""What one run of the decoder is given: the tokens of many sequences laid side by side.

T = tokens in the step, B = sequences, M = blocks in the longest block table. Rows of sequences that decode (one
token each) come first, then the chunks of sequences that prefill. Knows no scheduler and no request.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepShape:
    """Counts that say where each number of a step stands in its memory: see `packing`."""

    num_tokens: int
    num_sequences: int
    width: int
    """Columns of the block tables."""
    num_decode: int
    num_logits: int
    num_media: int
    """Rows whose embedding comes from a picture."""

    @property
    def is_decode(self) -> bool:
        """One token of each sequence, and nothing else."""
        return self.num_tokens == self.num_sequences == self.num_decode == self.num_logits and not self.num_media


@dataclass(frozen=True, slots=True, eq=False)
class StepMemory:
    """The numbers of a step, all in one piece: what is copied to a device or announced to other ranks at once."""

    shape: StepShape
    host: Tensor
    """uint8 [n] in host memory; pinned if the step is a GPU's."""
    device: Tensor
    """The same bytes where the model is; on CPU `host` itself."""


@dataclass(frozen=True, slots=True, eq=False)
class StepInput:
    """One step, made by `packing.make_step`. Counts are host integers, so that no layer has to ask the device for one."""

    token_ids_T: Tensor
    """int64 [T]."""
    positions_3T: Tensor
    """int64 [3, T]: time, height, width."""
    slots_T: Tensor
    """int64 [T]: where each token's K and V go, block_id * block_size + offset."""
    is_vision_T: Tensor
    """bool [T]: tokens of the vision expert pool."""
    block_tables_BM: Tensor
    """int32 [B, M], padded with block 0."""
    seq_lens_B: Tensor
    """int32 [B]: tokens with valid K and V after this step."""
    query_starts: Tensor
    """int32 [B + 1]: first row of each sequence, and behind the last one T."""
    key_starts: Tensor
    """int32 [B + 1]: the same of `seq_lens_B`."""
    query_lens: tuple[int, ...]
    """[B] tokens of each sequence in this step; the first `num_decode` are 1."""
    context_lens: tuple[int, ...]
    """[B] the same numbers as `seq_lens_B`, on the host."""
    num_decode: int
    logits_rows: Tensor
    """int64 [R]: rows whose logits are wanted."""
    media_rows: Tensor
    """int64 [E]: rows whose embedding comes from a picture; may be empty."""
    media_embeds: Tensor | None
    """model dtype [E, hidden], in the order of `media_rows`; None when E = 0."""
    memory: StepMemory
    """What all tensors above but the embeddings are views of."""

    @property
    def num_tokens(self) -> int:
        return self.token_ids_T.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class KVCache:
    """K and V of all layers in fixed blocks.

    `data` is [layers, 2, num_blocks, block_size, kv_heads, row]; what a row is, `kv_pages` knows. Block 0 is never given to a sequence: padding
    points there. Ranks of one host share the memory; each computes on the `heads` that are its own.
    """

    data: Tensor
    heads: slice = field(default_factory=lambda: slice(None))
    _layers: tuple[tuple[Tensor, Tensor], ...] = field(init=False)

    def __post_init__(self) -> None:
        # made once: views cost microseconds, and kernels may know them again
        object.__setattr__(self, "_layers", tuple((k[:, :, self.heads], v[:, :, self.heads]) for k, v in self.data))

    @classmethod
    def allocate(
        cls,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        row: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVCache:
        return cls(torch.zeros(num_layers, 2, num_blocks, block_size, num_kv_heads, row, dtype=dtype, device=device))

    @property
    def block_size(self) -> int:
        return self.data.shape[3]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """K and V pages of one layer, each [num_blocks, block_size, kv_heads, row]."""
        return self._layers[index]

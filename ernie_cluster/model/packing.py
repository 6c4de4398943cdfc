"""The numbers of a step in one piece of memory, so that one copy brings them to a device and one message to a rank.

Every field begins at a multiple of 16 bytes; where it begins follows from the step's `StepShape` alone. A step of the
same shape can therefore be copied over an older one's memory, which is how CUDA graphs get their inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, DTypeLike
from torch import Tensor

from ernie_cluster.model.step import StepInput, StepMemory, StepShape

_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class _Place:
    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    offset: int

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape) * self.dtype.itemsize

    def of(self, memory: Tensor) -> Tensor:
        """The field as a view of `memory`, uint8 [n]."""
        dtype = torch.from_numpy(np.empty(0, self.dtype)).dtype
        return memory[self.offset : self.end].view(dtype).view(self.shape)


def _places(s: StepShape) -> Iterator[_Place]:
    fields: tuple[tuple[str, DTypeLike, tuple[int, ...]], ...] = (
        ("token_ids_T", np.int64, (s.num_tokens,)),
        ("positions_3T", np.int64, (3, s.num_tokens)),
        ("slots_T", np.int64, (s.num_tokens,)),
        ("logits_rows", np.int64, (s.num_logits,)),
        ("media_rows", np.int64, (s.num_media,)),
        ("block_tables_BM", np.int32, (s.num_sequences, s.width)),
        ("seq_lens_B", np.int32, (s.num_sequences,)),
        ("query_starts", np.int32, (s.num_sequences + 1,)),
        ("key_starts", np.int32, (s.num_sequences + 1,)),
        ("is_vision_T", np.bool_, (s.num_tokens,)),
    )
    offset = 0
    for name, dtype, shape in fields:
        place = _Place(name, np.dtype(dtype), shape, offset)
        yield place
        offset = -(-place.end // _ALIGNMENT) * _ALIGNMENT


def packed_bytes(shape: StepShape) -> int:
    """Bytes of a step's memory."""
    return max(place.end for place in _places(shape))


def make_step(
    *,
    token_ids: ArrayLike,
    positions: ArrayLike,
    slots: ArrayLike,
    block_tables: np.ndarray,
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    num_decode: int,
    logits_rows: Sequence[int],
    is_vision: ArrayLike = False,
    media_rows: Sequence[int] = (),
    media_embeds: Tensor | None = None,
    device: torch.device,
) -> StepInput:
    """One step on a device; see `StepInput` for the fields. Does not wait for the copy."""
    num_tokens, (num_sequences, width) = len(np.asarray(token_ids)), block_tables.shape
    shape = StepShape(num_tokens, num_sequences, width, num_decode, len(logits_rows), len(media_rows))
    values = {
        "token_ids_T": token_ids,
        "positions_3T": positions,
        "slots_T": slots,
        "logits_rows": logits_rows,
        "media_rows": media_rows,
        "block_tables_BM": block_tables,
        "seq_lens_B": context_lens,
        "query_starts": np.cumsum([0, *query_lens]),
        "key_starts": np.cumsum([0, *context_lens]),
        "is_vision_T": is_vision,
    }
    # pinned memory comes from torch's cache, which keeps it until the copy is done
    host = torch.zeros(packed_bytes(shape), dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
    for place in _places(shape):
        place.of(host).numpy()[...] = values[place.name]
    embeds = None if media_embeds is None else media_embeds.to(device, non_blocking=True)
    return open_step(StepMemory(shape, host, host.to(device, non_blocking=True)), embeds)


def open_step(memory: StepMemory, media_embeds: Tensor | None = None) -> StepInput:
    """The step that lies in `memory`, which stays its tensors' own."""
    host = {place.name: place.of(memory.host) for place in _places(memory.shape)}
    device = {place.name: place.of(memory.device) for place in _places(memory.shape)}
    return StepInput(
        **device,
        query_lens=tuple(np.diff(host["query_starts"].numpy()).tolist()),
        context_lens=tuple(host["seq_lens_B"].tolist()),
        num_decode=memory.shape.num_decode,
        media_embeds=media_embeds,
        memory=memory,
    )

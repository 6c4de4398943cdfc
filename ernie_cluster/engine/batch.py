"""Scheduled sequences -> the tensors of one step."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ernie_cluster.engine.buckets import DecodeBuckets
from ernie_cluster.engine.scheduler import Schedule
from ernie_cluster.engine.sequence import Sequence
from ernie_cluster.model.packing import make_step
from ernie_cluster.model.step import StepInput


def slots(block_table: list[int], start: int, end: int, block_size: int) -> NDArray[np.int64]:
    """Slots of token positions [start, end) of one sequence.

    Args:
        block_table: block ids in logical order; covers at least `end` tokens.
        start, end: token positions, 0-based, end exclusive.
        block_size: tokens per block.

    Returns:
        int64 [end - start], block_id * block_size + offset each.
        Blocks [7, 2], block_size 4, positions [3, 6) give [31, 8, 9].

    Raises:
        IndexError: `end` lies beyond the table (a bug of the caller).
    """
    positions = np.arange(start, end)
    return np.asarray(block_table, dtype=np.int64)[positions // block_size] * block_size + positions % block_size


def positions_of(sequence: Sequence, start: int, end: int) -> NDArray[np.int64]:
    """int64 [3, end - start]: the prompt's own positions, then index plus the prompt's offset."""
    prompt = sequence.request.positions[:, start : min(end, sequence.num_prompt)].astype(np.int64)
    if end <= sequence.num_prompt:
        return prompt
    after = np.arange(max(start, sequence.num_prompt), end) + sequence.request.position_delta
    return np.concatenate([prompt, np.broadcast_to(after, (3, len(after)))], 1)


class BatchBuilder:
    """Builds `StepInput`s.

    Args:
        block_size: tokens per block.
        vision_ids: token ids of the vision expert pool; empty for text-only models.
        device: where the tensors go.
        buckets: sizes to which steps that only decode are padded; None: they are not.
    """

    def __init__(
        self,
        block_size: int,
        vision_ids: frozenset[int],
        device: torch.device,
        buckets: DecodeBuckets | None = None,
    ) -> None:
        self._block_size, self._device, self._buckets = block_size, device, buckets
        self._vision_ids = np.array(sorted(vision_ids), dtype=np.int64)

    def build(self, schedule: Schedule) -> StepInput:
        """One step. Sequences whose last token is in it get a row of logits, in the schedule's order.

        Rows that pad it come last and get logits, too, which nobody wants.
        """
        parts = [(s, s.num_computed, s.num_computed + 1) for s in schedule.decodes]
        parts += [(s, s.num_computed, s.num_computed + n) for s, n in schedule.chunks]
        ids: list[int] = []
        logits_rows: list[int] = []
        media_rows: list[int] = []
        embeds: list[torch.Tensor] = []
        for sequence, start, end in parts:
            first_row = len(ids)
            ids.extend(sequence.tokens[start:end])
            if end == len(sequence.tokens):
                logits_rows.append(len(ids) - 1)
            if sequence.request.media:
                rows, tensors = sequence.media_slice(start, end)
                media_rows.extend(first_row + row - start for row in rows)
                embeds.extend(tensors)
        token_ids = np.array(ids, dtype=np.int64)
        # a generated token is text, whatever its id
        has_media = any(s.request.media for s, _ in schedule.chunks) and len(self._vision_ids) > 0
        is_vision = np.zeros(len(ids), bool)
        if has_media:
            is_prompt = np.concatenate([np.arange(a, b) < s.num_prompt for s, a, b in parts])
            is_vision = np.isin(token_ids, self._vision_ids) & is_prompt
        widest = max(len(s.blocks) for s, _, _ in parts)
        num_rows = len(parts)
        if self._buckets is not None and not schedule.chunks:
            size = self._buckets.fit(len(parts), widest)
            if size is not None:
                num_rows, widest = size, self._buckets.width
        padding = num_rows - len(parts)
        tables = np.zeros((num_rows, widest), dtype=np.int32)
        for i, (sequence, _, _) in enumerate(parts):
            tables[i, : len(sequence.blocks)] = sequence.blocks
        block_size = self._block_size
        # a padding row is the first token of a sequence whose only block is block 0, which is nobody's: it writes there
        # and reads what it wrote
        return make_step(
            token_ids=np.pad(token_ids, (0, padding)),
            positions=np.pad(np.concatenate([positions_of(*p) for p in parts], 1), ((0, 0), (0, padding))),
            slots=np.pad(np.concatenate([slots(s.blocks, a, b, block_size) for s, a, b in parts]), (0, padding)),
            is_vision=np.pad(is_vision, (0, padding)),
            block_tables=tables,
            query_lens=[b - a for _, a, b in parts] + [1] * padding,
            context_lens=[end for _, _, end in parts] + [1] * padding,
            num_decode=len(schedule.decodes) + padding,
            logits_rows=[*logits_rows, *range(len(ids), len(ids) + padding)],
            media_rows=media_rows,
            media_embeds=torch.cat(embeds) if embeds else None,
            device=self._device,
        )

"""Sending side of a hand-over: the KV of a prompt follows the layers, chunk by chunk, into a decode replica's lease.

While a chunk runs, every finished group of layers is pushed for the blocks that the chunk completes. After the first
token is chosen a commit closes the hand-over; it stays behind the pushes on the same channel. The blocks here are
pinned until the commit is answered. Runs on the engine's thread, but for `pack` and the answers (channel threads).
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from ernie_cluster.config.kv_layout import KVLayout
from ernie_cluster.engine.engine import PrefillHooks
from ernie_cluster.engine.sequence import Sequence
from ernie_cluster.errors import TransferFailed
from ernie_cluster.model.decoder import no_hook
from ernie_cluster.model.step import KVCache
from ernie_cluster.transport.base import Channel, Message, PieceHeader
from ernie_cluster.transport.plan import PiecePlan, layer_groups, plan_pieces

KV_PIECE, EMBED_PIECE = 0, 1
"""First number of a piece's detail: what the payload is."""

_TARGET_GROUP_BYTES = 1 << 20
"""Layers are sent in groups of at least this size: a piece has a fixed price of about 100 us."""


@dataclass(slots=True, eq=False)
class _HandOver:
    sequence: Sequence
    channel: Channel
    next_block: int
    """Logical index of the first block that has not been pushed in all layers."""
    next_piece: int = 0


class KVSender(PrefillHooks):
    """Owns the hand-overs that leave one engine.

    Args:
        kv: the engine's cache.
        layout: of this rank.
        piece_bytes: bound of a piece.
        commit_timeout_s: longest wait for the decode side's confirmation.
        done: called once per hand-over, on a channel's thread, with the error or None; frees the blocks.
    """

    def __init__(
        self,
        kv: KVCache,
        layout: KVLayout,
        *,
        piece_bytes: int,
        commit_timeout_s: float,
        done: Callable[[Sequence, Exception | None], None],
    ) -> None:
        self._kv, self._layout = kv, layout
        self._piece_bytes, self._commit_timeout_s, self._done = piece_bytes, commit_timeout_s, done
        self._active: dict[Sequence, _HandOver] = {}
        self.bytes_sent = 0

    def begin(self, sequence: Sequence, channel: Channel, first_block: int) -> None:
        """Hand `sequence` over once its prompt is done; blocks before `first_block` are there already."""
        sequence.is_prefill_only = True
        self._active[sequence] = _HandOver(sequence, channel, first_block)

    def layer_hook(self, chunks: Seq[tuple[Sequence, int]]) -> Callable[[int], None]:
        """See `PrefillHooks`. Pushes the blocks that this step completes, a group of layers at a time."""
        ranges: list[tuple[_HandOver, int, int]] = []
        for sequence, count in chunks:
            transfer = self._active.get(sequence)
            if transfer is not None:
                end = sequence.num_computed + count
                is_last = end == len(sequence.tokens)
                last_block = -(-end // self._layout.block_size) if is_last else end // self._layout.block_size
                if last_block > transfer.next_block:
                    ranges.append((transfer, transfer.next_block, last_block - transfer.next_block))
                    transfer.next_block = last_block
        if not ranges:
            return no_hook
        layer_bytes = self._layout.block_bytes_per_layer * sum(n for _, _, n in ranges)
        groups = layer_groups(self._layout.num_layers, layer_bytes, _TARGET_GROUP_BYTES)
        group_ending_at = {first + num - 1: (first, num) for first, num in groups}

        def hook(layer: int) -> None:
            group = group_ending_at.get(layer)
            if group is not None:
                for transfer, first_block, num_blocks in ranges:
                    for piece in plan_pieces(self._layout, *group, (first_block, num_blocks), self._piece_bytes):
                        self._push(transfer, piece)

        return hook

    def prompt_done(self, sequence: Sequence) -> None:
        """See `PrefillHooks`. Closes the hand-over with the tokens so far."""
        transfer = self._active.pop(sequence)
        commit: Message = {
            "type": "commit",
            "request_id": sequence.request_id,
            "epoch": sequence.epoch,
            "num_pieces": transfer.next_piece,
            "output": list(sequence.tokens[sequence.num_prompt :]),
        }
        answer = transfer.channel.call(commit, self._commit_timeout_s)
        answer.add_done_callback(lambda f: self._done(sequence, _error_of(f)))

    def ended(self, sequence: Sequence) -> None:
        """See `PrefillHooks`. Without a commit, what was pushed is swept with the lease over there."""
        self._active.pop(sequence, None)

    def _push(self, transfer: _HandOver, piece: PiecePlan) -> None:
        sequence = transfer.sequence
        blocks = torch.tensor(sequence.blocks[piece.first_block : piece.first_block + piece.num_blocks])
        source = self._kv.data[piece.first_layer : piece.first_layer + piece.num_layers]
        header = PieceHeader(
            sequence.request_id, sequence.epoch, transfer.next_piece, piece.nbytes, (KV_PIECE, *piece.detail)
        )
        transfer.next_piece += 1
        self.bytes_sent += piece.nbytes
        written = torch.cuda.current_stream(source.device).record_event() if source.is_cuda else None

        def pack(out: object) -> None:
            if written is not None:  # a GPU is still busy with the layer when it was launched
                torch.cuda.current_stream(source.device).wait_event(written)
            target = torch.as_tensor(out).view(source.dtype).view(*source.shape[:2], len(blocks), *source.shape[3:])
            gather_blocks(source, blocks, target)

        # a piece that fails fails the commit, which counts the pieces
        transfer.channel.push(header, pack)


def gather_blocks(source: torch.Tensor, blocks: torch.Tensor, target: torch.Tensor) -> None:
    """target[l, kv, i] = source[l, kv, blocks[i]]; [layers, 2, blocks, ...]. One copy on one device, by way of another two."""
    if source.device == target.device:
        torch.index_select(source, 2, blocks.to(source.device), out=target)
    else:
        target.copy_(source.index_select(2, blocks.to(source.device)))


def scatter_blocks(source: torch.Tensor, blocks: torch.Tensor, target: torch.Tensor) -> None:
    """target[l, kv, blocks[i]] = source[l, kv, i]; the reverse of `gather_blocks`."""
    target.index_copy_(2, blocks.to(target.device), source.to(target.device))


def _error_of(answer: Future[Message]) -> Exception | None:
    if answer.cancelled():
        return TransferFailed("the hand-over was cancelled")
    error = answer.exception()
    return error if error is None or isinstance(error, Exception) else TransferFailed(repr(error))

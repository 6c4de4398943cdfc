"""The KV of one rank as pieces: out of its blocks to other ranks, and from them into its blocks.

A rank holds all KV heads or some; `transport.plan.copy_plan` says which go to which rank of the other side. A piece
names its heads in the destination's numbering. Knows no engine and no sequence.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ernie_cluster.config.kv_layout import KVLayout, kv_heads_of_rank
from ernie_cluster.engine.block_pool import Hold
from ernie_cluster.engine.leases import Lease
from ernie_cluster.errors import TransferFailed
from ernie_cluster.model.decoder import no_hook
from ernie_cluster.model.step import KVCache
from ernie_cluster.transport.base import Channel, Payload, PieceHeader
from ernie_cluster.transport.plan import HeadCopy, PiecePlan, copy_plan, layer_groups, plan_rank_pieces

KV_PIECE, EMBED_PIECE = 0, 1
"""First number of a piece's detail: what the payload is."""

_TARGET_GROUP_BYTES = 1 << 20
"""Layers are sent in groups of at least this size: a piece has a fixed price of about 100 us."""

# payloads are read-only views, and are only read
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


@dataclass(frozen=True, slots=True)
class SliceOf:
    """Which KV heads of a model one rank holds."""

    num_kv_heads: int
    """Of the model."""
    rank: int = 0
    """In [0, num_ranks)."""
    num_ranks: int = 1
    """Ranks that hold the heads together."""

    def copies_to(self, num_ranks: int) -> list[HeadCopy]:
        """What this rank sends to a replica whose KV is spread over `num_ranks`; the same plan on every rank."""
        src, dst = (
            [kv_heads_of_rank(self.num_kv_heads, count, rank) for rank in range(count)]
            for count in (self.num_ranks, num_ranks)
        )
        return [copy for copy in copy_plan(src, dst) if copy.src_rank == self.rank]


class Outgoing:
    """One rank's part in one hand-over. Pushed on the engine's thread, answered on channels' threads.

    Args:
        request_id, epoch: of the attempt.
        part: what this rank holds.
        ways: what goes from here, and the channel that it goes by.
    """

    def __init__(self, request_id: str, epoch: int, part: SliceOf, ways: Seq[tuple[HeadCopy, Channel]]) -> None:
        self.request_id, self.epoch, self.part, self.ways = request_id, epoch, part, ways
        self.next_piece = 0
        self.num_pieces = 0
        """Those that went to rank 0 of the other side."""
        self._lock = threading.Lock()
        self._accepted_bytes = 0
        self._error: Exception | None = None
        self._is_given_up = False
        self._settled: tuple[int, Callable[[Exception | None], None]] | None = None

    def settle(self, nbytes: int, done: Callable[[Exception | None], None]) -> None:
        """Call `done` once `nbytes` were accepted, or with the error of the first piece that was not. At most once."""
        with self._lock:
            self._settled = nbytes, done
        self._look()

    def fail(self, error: Exception) -> None:
        """Nothing more will come of it: what has not been read yet never will be."""
        with self._lock:
            self._error = self._error or error
            self._is_given_up = True
        self._look()

    def check(self) -> None:
        """Raises TransferFailed when it was given up: the blocks may be others' by now."""
        if self._is_given_up:
            raise TransferFailed(f"request {self.request_id}: attempt {self.epoch} was given up: {self._error}")

    def pushed(self, nbytes: int, answer: Future[None]) -> None:
        """A piece is on its way."""
        answer.add_done_callback(partial(self._answered, nbytes))

    def _answered(self, nbytes: int, answer: Future[None]) -> None:
        error = failure_of(answer)
        with self._lock:
            self._error = self._error or error
            self._accepted_bytes += 0 if error else nbytes
        self._look()

    def _look(self) -> None:
        with self._lock:
            if self._settled is None or not (self._error or self._accepted_bytes >= self._settled[0]):
                return
            (_, done), self._settled = self._settled, None
        done(self._error)


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Blocks of one hand-over that a step completes."""

    outgoing: Outgoing
    first_block: int
    """Logical index in the sequence."""
    blocks: list[int]
    """Their ids in this cache."""
    hold: Hold | None = None
    """That they are kept until they are read; None on a rank that has no pool, where the leader says what it gives up."""

    def check(self) -> None:
        """Raises TransferFailed when what was read up to now may have been another's."""
        self.outgoing.check()
        if self.hold is not None and not self.hold.is_valid:
            raise TransferFailed(
                f"request {self.outgoing.request_id}: blocks of attempt {self.outgoing.epoch} changed hands before they were sent"
            )


class SliceSender:
    """Reads the KV of one rank.

    Args:
        kv: its cache.
        layout: of this rank.
        piece_bytes: bound of a piece.
    """

    def __init__(self, kv: KVCache, layout: KVLayout, piece_bytes: int) -> None:
        self._kv, self._layout, self._piece_bytes = kv, layout, piece_bytes
        self.bytes_sent = 0

    def nbytes(self, outgoing: Outgoing, num_blocks: int) -> int:
        """What so many blocks come to on the ways from this rank."""
        per_head = self._layout.block_bytes // self._layout.num_kv_heads
        return num_blocks * per_head * sum(copy.num_heads for copy, _ in outgoing.ways)

    def hook(self, runs: Seq[Run]) -> Callable[[int], None]:
        """To be called after each layer of a step: pushes what it completes, a group of layers at a time."""
        if not runs:
            return no_hook
        layer_bytes = self._layout.block_bytes_per_layer * sum(len(run.blocks) for run in runs)
        groups = layer_groups(self._layout.num_layers, layer_bytes, _TARGET_GROUP_BYTES)
        group_ending_at = {first + num - 1: (first, num) for first, num in groups}

        def hook(layer: int) -> None:
            group = group_ending_at.get(layer)
            if group is not None:
                for run in runs:
                    self._push_group(run, *group)

        return hook

    def _push_group(self, run: Run, first_layer: int, num_layers: int) -> None:
        blocks = (run.first_block, len(run.blocks))
        for copy, channel in run.outgoing.ways:
            for _, piece in plan_rank_pieces(self._layout, [copy], first_layer, num_layers, blocks, self._piece_bytes):
                self._push(run, copy, channel, piece)

    def _push(self, run: Run, copy: HeadCopy, channel: Channel, piece: PiecePlan) -> None:
        first, outgoing = piece.first_block - run.first_block, run.outgoing
        blocks = torch.tensor(run.blocks[first : first + piece.num_blocks])
        layers = slice(piece.first_layer, piece.first_layer + piece.num_layers)
        source = self._kv.data[layers, ..., copy.src_head : copy.src_head + copy.num_heads, :]
        # several ranks may send to one: their numbers must differ
        number = outgoing.next_piece * outgoing.part.num_ranks + outgoing.part.rank
        detail = (KV_PIECE, *piece.detail, copy.dst_head, copy.num_heads)
        header = PieceHeader(outgoing.request_id, outgoing.epoch, number, piece.nbytes, detail)
        outgoing.next_piece += 1
        outgoing.num_pieces += copy.dst_rank == 0
        self.bytes_sent += piece.nbytes
        written = torch.cuda.current_stream(source.device).record_event() if source.is_cuda else None

        def pack(out: object) -> None:
            if written is not None:  # a GPU is still busy with the layer when it was launched
                torch.cuda.current_stream(source.device).wait_event(written)
            target = torch.as_tensor(out).view(source.dtype).view(*source.shape[:2], len(blocks), *source.shape[3:])
            gather_blocks(source, blocks, target)
            run.check()  # not before, for they may change hands meanwhile

        outgoing.pushed(piece.nbytes, channel.push(header, pack))


def write_piece(kv: KVCache, layout: KVLayout, lease: Lease, header: PieceHeader, payload: Payload) -> None:
    """Copy a piece of KV into the blocks of its lease; TransferFailed when it does not belong there.

    Args:
        kv, layout: of the receiving rank.
        payload: as `Sink.accept` gets it.
    """
    _, first_layer, num_layers, first, count, *heads = header.detail
    first_head, num_heads = heads or (0, layout.num_kv_heads)
    if header.piece in lease.pieces:
        raise TransferFailed(f"request {header.request_id}: piece {header.piece} came twice")
    is_inside = (
        0 <= first_layer < first_layer + num_layers <= layout.num_layers
        and lease.owns(first, count)
        and 0 <= first_head < first_head + num_heads <= layout.num_kv_heads
        and header.nbytes == num_layers * count * num_heads * (layout.block_bytes_per_layer // layout.num_kv_heads)
    )
    if not is_inside:
        raise TransferFailed(f"request {header.request_id}: piece {header.detail} does not fit the lease")
    target = kv.data[first_layer : first_layer + num_layers, ..., first_head : first_head + num_heads, :]
    source = torch.as_tensor(payload).view(target.dtype).view(num_layers, 2, count, *target.shape[3:])
    scatter_blocks(source, torch.tensor(lease.blocks[first : first + count]), target)
    lease.pieces.add(header.piece)
    lease.bytes_received += header.nbytes


def check_counted(lease: Lease, num_pieces: int) -> None:
    """Whether so many pieces have come to this rank; TransferFailed if not."""
    missing = num_pieces - len(lease.pieces)
    if missing:
        raise TransferFailed(f"request {lease.request_id}: {missing} of {num_pieces} pieces did not arrive")


def check_filled(lease: Lease, layout: KVLayout, num_tokens: int) -> None:
    """Whether pieces have filled the blocks of so many tokens on this rank; TransferFailed if not."""
    num_blocks = -(-num_tokens // layout.block_size) - lease.num_shared
    if lease.bytes_received != num_blocks * layout.block_bytes:
        raise TransferFailed(
            f"request {lease.request_id}: {lease.bytes_received} bytes arrived, "
            f"{num_tokens} tokens have {num_blocks * layout.block_bytes}"
        )


def gather_blocks(source: torch.Tensor, blocks: torch.Tensor, target: torch.Tensor) -> None:
    """target[l, kv, i] = source[l, kv, blocks[i]]; [layers, 2, blocks, ...]. One copy on one device, by way of another two."""
    if source.device == target.device:
        torch.index_select(source, 2, blocks.to(source.device), out=target)
    else:
        target.copy_(source.index_select(2, blocks.to(source.device)))


def scatter_blocks(source: torch.Tensor, blocks: torch.Tensor, target: torch.Tensor) -> None:
    """target[l, kv, blocks[i]] = source[l, kv, i]; the reverse of `gather_blocks`."""
    target.index_copy_(2, blocks.to(target.device), source.to(target.device))


def failure_of(answer: Future[Any]) -> Exception | None:
    """How a future ended that is done; None = well."""
    if answer.cancelled():
        return TransferFailed("the hand-over was cancelled")
    error = answer.exception()
    return error if error is None or isinstance(error, Exception) else TransferFailed(repr(error))

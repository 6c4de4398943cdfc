"""Sending side of a hand-over: the KV of a prompt follows the layers, chunk by chunk, into a decode replica's lease.

While a chunk runs, every finished group of layers is pushed for the blocks that the chunk completes. After the first
token is chosen a commit closes the hand-over. The blocks here are pinned until the commit is answered. Runs on the
engine's thread, but for `pack` and the answers (channel threads).

From one rank to one rank the commit stays behind the pushes on the same channel. Where the KV heads of either side are
spread over ranks, each of ours pushes what it holds to those that want it, at the same layers of the same step, and the
commit waits until all of ours have settled: everything was accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import dataclass, field

from ernie_cluster.config.kv_layout import KVLayout
from ernie_cluster.engine.block_pool import BlockPool
from ernie_cluster.engine.engine import PrefillHooks
from ernie_cluster.engine.followers import Followers
from ernie_cluster.engine.sequence import Sequence
from ernie_cluster.engine.slices import Outgoing, Run, SliceOf, SliceSender, failure_of
from ernie_cluster.errors import TransferFailed
from ernie_cluster.model.step import KVCache
from ernie_cluster.transport.base import Channel, Message
from ernie_cluster.transport.choose import Endpoint


@dataclass(frozen=True, slots=True, eq=False)
class Peers:
    """The ranks that a decode replica's KV heads are spread over."""

    endpoints: tuple[Endpoint, ...] = ()
    """All of them, the leading one first; may be left out where one rank sends and one receives."""
    channels: Mapping[int, Channel] = field(default_factory=dict)
    """By number, to those beside the first that KV goes to from this rank."""


NO_PEERS = Peers()


@dataclass(frozen=True, slots=True, eq=False)
class Destination:
    """A decode replica, as the leading rank of a prefill replica reaches it."""

    channel: Channel
    """To the rank that leads."""
    peers: Peers = NO_PEERS

    @property
    def num_ranks(self) -> int:
        """Ranks that KV goes to."""
        return max(1, len(self.peers.endpoints))

    def to(self, rank: int) -> Channel:
        """The channel to one of its ranks."""
        return self.channel if rank == 0 else self.peers.channels[rank]


@dataclass(slots=True, eq=False)
class _HandOver:
    sequence: Sequence
    destination: Destination
    outgoing: Outgoing
    first_block: int
    next_block: int
    """Logical index of the first block that has not been pushed in all layers."""


class KVSender(PrefillHooks):
    """Owns the hand-overs that leave one engine.

    Args:
        kv: the engine's cache.
        pool: of its blocks.
        layout: of this rank.
        num_kv_heads: of the model.
        followers: the other ranks that hold KV heads.
        piece_bytes: bound of a piece.
        commit_timeout_s: longest wait for the decode side's confirmation.
        done: called once per hand-over, on a channel's thread, with the error or None; frees the blocks.
    """

    def __init__(
        self,
        kv: KVCache,
        pool: BlockPool,
        layout: KVLayout,
        num_kv_heads: int,
        followers: Followers,
        *,
        piece_bytes: int,
        commit_timeout_s: float,
        done: Callable[[Sequence, Exception | None], None],
    ) -> None:
        self._pool, self._layout, self._num_kv_heads, self._followers = pool, layout, num_kv_heads, followers
        self._commit_timeout_s, self._done = commit_timeout_s, done
        self._slices = SliceSender(kv, layout, piece_bytes)
        self._active: dict[Sequence, _HandOver] = {}

    @property
    def part(self) -> SliceOf:
        """The heads of this rank, which is the first; all where nobody follows."""
        num_kv_heads = self._num_kv_heads if self._followers else self._layout.num_kv_heads
        return SliceOf(num_kv_heads, 0, 1 + len(self._followers))

    def targets(self, num_ranks: int) -> list[int]:
        """To which ranks of a replica of so many KV goes from this one, beside the first."""
        return sorted({copy.dst_rank for copy in self.part.copies_to(num_ranks)} - {0})

    @property
    def bytes_sent(self) -> int:
        """KV that was pushed from this rank."""
        return self._slices.bytes_sent

    def begin(self, sequence: Sequence, destination: Destination, first_block: int) -> None:
        """Hand `sequence` over once its prompt is done; blocks before `first_block` are there already."""
        sequence.is_prefill_only = True
        part = self.part
        ways = [(copy, destination.to(copy.dst_rank)) for copy in part.copies_to(destination.num_ranks)]
        outgoing = Outgoing(sequence.request_id, sequence.epoch, part, ways)
        self._active[sequence] = _HandOver(sequence, destination, outgoing, first_block, first_block)

    def layer_hook(self, chunks: Seq[tuple[Sequence, int]]) -> Callable[[int], None]:
        """See `PrefillHooks`. Pushes the blocks that this step completes, a group of layers at a time."""
        runs: list[Run] = []
        for sequence, count in chunks:
            transfer = self._active.get(sequence)
            if transfer is not None:
                end = sequence.num_computed + count
                is_last = end == len(sequence.tokens)
                last_block = -(-end // self._layout.block_size) if is_last else end // self._layout.block_size
                if last_block > transfer.next_block:
                    blocks = sequence.blocks[transfer.next_block : last_block]
                    runs.append(Run(transfer.outgoing, transfer.next_block, blocks, self._pool.hold(blocks)))
                    transfer.next_block = last_block
        for run in runs:
            self._followers.push(run)
        return self._slices.hook(runs)

    def prompt_done(self, sequence: Sequence) -> None:
        """See `PrefillHooks`. Closes the hand-over with the tokens so far."""
        transfer = self._active.pop(sequence)
        if len(self._followers) == 0 and transfer.destination.num_ranks == 1:
            self._commit(transfer, transfer.outgoing.num_pieces)
            return
        num_blocks = transfer.next_block - transfer.first_block
        others = self._followers.settle(sequence.request_id, sequence.epoch, num_blocks)

        def others_settled() -> None:
            error = failure_of(others)
            if error is not None:
                self._give_up(transfer, error)
                return
            num_pieces = sum(int(str(answer["num_pieces"])) for answer in others.result())
            nbytes = self._slices.nbytes(transfer.outgoing, num_blocks)
            transfer.outgoing.settle(nbytes, lambda error: self._settled(transfer, num_pieces, error))

        others.add_done_callback(lambda _: others_settled())

    def ended(self, sequence: Sequence) -> None:
        """See `PrefillHooks`. Without a commit, what was pushed is swept with the lease over there."""
        transfer = self._active.pop(sequence, None)
        if transfer is not None:
            self._followers.drop(sequence.request_id, sequence.epoch)
            transfer.outgoing.fail(TransferFailed(f"request {sequence.request_id} ended before its prompt was done"))

    def _settled(self, transfer: _HandOver, num_pieces: int, error: Exception | None) -> None:
        """All ranks have; the others with so many pieces to the rank that leads over there."""
        if error is None:
            self._commit(transfer, transfer.outgoing.num_pieces + num_pieces)
        else:
            self._give_up(transfer, error)

    def _give_up(self, transfer: _HandOver, error: Exception) -> None:
        self._followers.drop(transfer.sequence.request_id, transfer.sequence.epoch)
        self._end(transfer, error)

    def _commit(self, transfer: _HandOver, num_pieces: int) -> None:
        sequence = transfer.sequence
        commit: Message = {
            "type": "commit",
            "request_id": sequence.request_id,
            "epoch": sequence.epoch,
            "num_pieces": num_pieces,
            "output": list(sequence.tokens[sequence.num_prompt :]),
        }
        answer = transfer.destination.channel.call(commit, self._commit_timeout_s)
        answer.add_done_callback(lambda _: self._end(transfer, _refusal_of(answer)))

    def _end(self, transfer: _HandOver, error: Exception | None) -> None:
        """Nothing is read any more, and the blocks are free."""
        if error is not None:
            transfer.outgoing.fail(error)
        self._done(transfer.sequence, error)


def _refusal_of(answer: Future[Message]) -> Exception | None:
    """Why a commit was not taken; a piece that failed fails the commit, which counts the pieces."""
    error = failure_of(answer)
    if error is None and "error" in answer.result():
        return TransferFailed(str(answer.result()["error"]))
    return error

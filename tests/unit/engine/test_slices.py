"""KV between replicas of any two sizes, by the code that sends and the code that writes: every byte once, at its place."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_cluster.config.kv_layout import KVLayout, kv_heads_of_rank
from ernie_cluster.engine.leases import Lease
from ernie_cluster.engine.slices import Outgoing, Run, SliceOf, SliceSender, check_filled, write_piece
from ernie_cluster.errors import ReplicaLost, TransferFailed
from ernie_cluster.model.step import KVCache
from ernie_cluster.transport.base import Message, Pack, PieceHeader
from ernie_cluster.transport.plan import HeadCopy

LAYERS, BLOCK_SIZE, HEAD_DIM, CACHE_BLOCKS = 3, 2, 3, 8


class Rank:
    """Of a decode replica: what is pushed to it is written at once."""

    max_piece_bytes = 1 << 20

    def __init__(self, heads: range, blocks: list[int], num_shared: int) -> None:
        self.heads = heads
        self.kv = KVCache(torch.full((LAYERS, 2, CACHE_BLOCKS, BLOCK_SIZE, len(heads), HEAD_DIM), -1.0))
        self.layout = KVLayout.of_cache(self.kv.data.shape, 4)
        self.lease = Lease("a", 0, blocks, num_shared, float("inf"))

    def push(self, header: PieceHeader, pack: Pack) -> Future[None]:
        payload = np.zeros(header.nbytes, np.uint8)
        pack(payload)
        future: Future[None] = Future()
        write_piece(self.kv, self.layout, self.lease, header, payload)
        future.set_result(None)
        return future

    def call(self, message: Message, timeout_s: float) -> Future[Message]:
        raise AssertionError("nothing is asked here")

    def close(self) -> None:
        """Nothing to give back."""


@settings(max_examples=50, deadline=None)
@given(
    num_heads=st.sampled_from([2, 4]),
    src_tp=st.sampled_from([1, 2, 4, 8]),
    dst_tp=st.sampled_from([1, 2, 4, 8]),
    num_tokens=st.integers(1, 10),
    num_shared=st.integers(0, 2),
    cuts=st.sets(st.integers(1, 4)),
    piece_bytes=st.integers(1, 2000),
    seed=st.integers(0, 2**32),
)
def test_every_rank_gets_its_heads_of_every_token(
    num_heads: int,
    src_tp: int,
    dst_tp: int,
    num_tokens: int,
    num_shared: int,
    cuts: set[int],
    piece_bytes: int,
    seed: int,
) -> None:
    chance = torch.Generator().manual_seed(seed)
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    num_shared = min(num_shared, num_blocks)
    whole = torch.rand(LAYERS, 2, num_blocks, BLOCK_SIZE, num_heads, HEAD_DIM, generator=chance)
    src_blocks, dst_blocks = (torch.randperm(CACHE_BLOCKS, generator=chance)[:num_blocks].tolist() for _ in range(2))
    ranks = [Rank(kv_heads_of_rank(num_heads, dst_tp, r), dst_blocks, num_shared) for r in range(dst_tp)]
    ends = sorted({*(num_shared + cut for cut in cuts if num_shared + cut < num_blocks), num_blocks})
    for number in range(src_tp):
        heads = kv_heads_of_rank(num_heads, src_tp, number)
        kv = KVCache(torch.zeros(LAYERS, 2, CACHE_BLOCKS, BLOCK_SIZE, len(heads), HEAD_DIM))
        kv.data[:, :, src_blocks] = whole[..., heads.start : heads.stop, :]
        part = SliceOf(num_heads, number, src_tp)
        sender = SliceSender(kv, KVLayout.of_cache(kv.data.shape, 4), piece_bytes)
        outgoing = Outgoing("a", 0, part, [(copy, ranks[copy.dst_rank]) for copy in part.copies_to(dst_tp)])
        first = num_shared
        for end in ends:  # as many steps
            hook = sender.hook([Run(outgoing, first, src_blocks[first:end])] if end > first else [])
            for layer in range(LAYERS):
                hook(layer)
            first = end
        settled: list[Exception | None] = []
        outgoing.settle(sender.nbytes(outgoing, num_blocks - num_shared), settled.append)
        assert settled == [None]
        assert sender.bytes_sent == sender.nbytes(outgoing, num_blocks - num_shared)
    for rank in ranks:  # a piece that came twice would have been refused
        check_filled(rank.lease, rank.layout, num_tokens)
        expected = torch.full_like(rank.kv.data, -1.0)
        written = dst_blocks[num_shared:]
        expected[:, :, written] = whole[:, :, num_shared:, :, rank.heads.start : rank.heads.stop]
        assert torch.equal(rank.kv.data, expected)


@pytest.mark.parametrize(("heads", "size"), [((0, 3), 3), ((1, 2), 2), ((-1, 1), 1), ((0, 0), 0), ((0, 1), 2)], ids=str)
def test_heads_that_are_not_of_this_rank_are_refused(heads: tuple[int, int], size: int) -> None:
    rank = Rank(range(2, 4), [5], 0)
    nbytes = size * 2 * BLOCK_SIZE * HEAD_DIM * 4
    header = PieceHeader("a", 0, 0, nbytes, (0, 0, 1, 0, 1, *heads))
    with pytest.raises(TransferFailed, match="does not fit the lease"):
        write_piece(rank.kv, rank.layout, rank.lease, header, np.zeros(nbytes, np.uint8))
    assert (rank.kv.data == -1).all()


def outgoing_of(*answers: Future[None]) -> Outgoing:
    outgoing = Outgoing("a", 0, SliceOf(1), [(HeadCopy(0, 0, 0, 1, 0, 0), Rank(range(1), [1], 0))])
    for answer in answers:
        outgoing.pushed(10, answer)
    return outgoing


def test_a_hand_over_settles_when_all_is_accepted() -> None:
    answers: list[Future[None]] = [Future(), Future()]
    settled: list[Exception | None] = []
    outgoing = outgoing_of(*answers)
    outgoing.settle(20, settled.append)
    answers[1].set_result(None)
    assert settled == []
    answers[0].set_result(None)
    assert settled == [None]


def test_a_hand_over_settles_at_the_first_failure_whenever_it_is_asked() -> None:
    answers: list[Future[None]] = [Future(), Future()]
    settled: list[Exception | None] = []
    outgoing = outgoing_of(*answers)
    error = ReplicaLost("gone")
    answers[0].set_exception(error)
    outgoing.settle(20, settled.append)
    answers[1].set_exception(TransferFailed("too"))
    outgoing.fail(TransferFailed("and this"))
    assert settled == [error]

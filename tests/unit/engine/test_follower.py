"""What a following rank takes from its leader and from others, and what it refuses; what the leader makes of it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import pytest
import torch

from ernie_cluster.engine.follower import Follower
from ernie_cluster.engine.followers import Followers
from ernie_cluster.engine.host_tier import HostMemory
from ernie_cluster.engine.leases import Lease
from ernie_cluster.engine.slices import EMBED_PIECE, KV_PIECE, SliceOf
from ernie_cluster.errors import EngineFailed, PeerSilent, ReplicaLost, TransferFailed
from ernie_cluster.model.step import KVCache
from ernie_cluster.transport.base import Message, PieceHeader
from ernie_cluster.transport.choose import Endpoint
from tests.unit.engine.toy import ManualChannel

LAYERS, BLOCK_SIZE = 2, 4
BLOCK_BYTES = LAYERS * 2 * BLOCK_SIZE * 4
DECODE = [Endpoint("here", None, f"decode/{rank}") for rank in range(2)]
TIMEOUT_S = 10.0


class Rank:
    """The second of two ranks with a KV head each, its leader's line to it, and the way from it."""

    def __init__(self) -> None:
        self.kv = KVCache(torch.zeros(LAYERS, 2, 8, BLOCK_SIZE, 1, 1))
        memory = HostMemory(self.kv.data, 2)
        self.follower = Follower(self.kv, SliceOf(2, 1, 2), 1 << 20, self._connect, memory)
        self.orders, self.way = ManualChannel(self.follower), ManualChannel(self.follower)
        self.notes: list[Message] = []
        self.broken: list[EngineFailed] = []
        self.leader = Followers(self.notes.append, TIMEOUT_S, self.broken.append)
        self.leader.channels = [self.orders]
        self.reached: list[str] = []
        self.error: Exception | None = None

    def reach(self, epoch: int = 0) -> Future[list[Message]]:
        answer = self.leader.reach("a", epoch, DECODE)
        self.orders.deliver()
        return answer

    def step(self) -> None:
        """With all that the leader has noted since the last one."""
        hook = self.follower.noted(self.notes)
        self.notes.clear()
        for layer in range(LAYERS):
            hook(layer)

    def accept(self, epoch: int, piece: int, first: int, count: int, kind: int = KV_PIECE) -> None:
        header = PieceHeader("a", epoch, piece, count * BLOCK_BYTES, (kind, 0, LAYERS, first, count, 0, 1))
        self.follower.accept(header, np.full(header.nbytes, 1 + piece, np.uint8))

    def _connect(self, peer: Endpoint) -> ManualChannel:
        if self.error is not None:
            raise self.error
        self.reached.append(peer.actor_name)
        return self.way


def lease(epoch: int = 0) -> Lease:
    """Three blocks, the first of them cached."""
    return Lease("a", epoch, [5, 2, 7], 1, 0.0)


# ---- receiving


def test_pieces_are_written_under_the_leases_that_the_leader_expects() -> None:
    rank = Rank()
    with pytest.raises(TransferFailed, match="attempt 0 has no lease"):
        rank.accept(0, 0, 1, 2)
    told = rank.leader.expect(lease())
    assert not told.done()
    rank.orders.deliver()
    assert told.done()
    rank.accept(0, 0, 1, 1)
    with pytest.raises(TransferFailed, match="came twice"):
        rank.accept(0, 0, 2, 1)
    with pytest.raises(TransferFailed, match="does not fit"):
        rank.accept(0, 1, 0, 1)  # the cached prefix, which others read
    with pytest.raises(TransferFailed, match="attempt 1 has no lease"):
        rank.accept(1, 1, 2, 1)
    with pytest.raises(TransferFailed, match="embeddings go to the rank that leads"):
        rank.accept(0, 1, 2, 1, EMBED_PIECE)
    used = [block for block in range(8) if rank.kv.data[:, :, block].any()]
    assert used == [2]


def test_a_lease_that_is_forgotten_is_written_no_more() -> None:
    rank = Rank()
    rank.leader.expect(lease())
    rank.orders.deliver()
    done = rank.leader.forget(lease())
    rank.accept(0, 0, 1, 1)
    rank.orders.deliver()
    assert done.done()
    with pytest.raises(TransferFailed, match="attempt 0 has no lease"):
        rank.accept(0, 1, 2, 1)
    assert rank.follower.is_idle


@pytest.mark.parametrize(("count", "said"), [(1, "64 bytes arrived, 9 tokens have 128"), (2, "")])
def test_a_lease_is_complete_when_its_blocks_are_filled(count: int, said: str) -> None:
    rank = Rank()
    rank.leader.expect(lease())
    rank.orders.deliver()
    rank.accept(0, 0, 1, count)
    done = rank.leader.complete(lease(), 9)
    rank.orders.deliver()
    assert said in str(done.exception())
    assert rank.follower.is_idle is (not said)
    assert not rank.broken


def test_a_rank_that_cannot_be_told_of_a_lease_ends_the_gang() -> None:
    rank = Rank()
    told = rank.leader.expect(lease())
    rank.orders.fail(ReplicaLost("gone"))
    assert isinstance(told.exception(), EngineFailed)
    assert ["gone" in str(failure) for failure in rank.broken] == [True]


def test_a_lease_waits_until_what_its_blocks_held_is_copied() -> None:
    rank = Rank()
    rank.kv.data[:, :, 2] = 3.0
    rank.leader.copy("offload", [(1, 2)])
    told = rank.leader.expect(lease())
    rank.orders.deliver()
    assert not told.done()
    assert not rank.follower.is_idle
    with pytest.raises(TransferFailed, match="attempt 0 has no lease"):
        rank.accept(0, 0, 1, 1)
    rank.leader.copy("restore", [(1, 6)])  # of another request, which the lease need not wait for
    rank.step()
    assert told.done()
    rank.accept(0, 0, 1, 1)
    rank.step()
    assert (rank.kv.data[:, :, 6] == 3.0).all()
    assert not (rank.kv.data[:, :, 2] == 3.0).any()


# ---- sending


def test_what_is_noted_for_a_step_is_pushed_to_the_ranks_that_were_reached() -> None:
    rank = Rank()
    assert rank.reach().result(TIMEOUT_S) == [{}]
    assert rank.reached == ["decode/1"]
    rank.notes.append({"push": ["a", 0, 4, [3, 6]]})
    rank.step()
    headers = [job.header for job in rank.way.jobs]
    assert [header.detail for header in headers if header is not None] == [(KV_PIECE, 0, LAYERS, 4, 2, 0, 1)]
    settled = rank.leader.settle("a", 0, 2)
    rank.orders.deliver()
    assert not settled.done()
    rank.way.jobs.popleft().future.set_result(None)
    assert settled.result(TIMEOUT_S) == [{"num_pieces": 0}]  # to the rank that leads over there
    assert rank.follower.is_idle


def test_a_hand_over_may_be_asked_to_settle_before_its_last_step_has_run() -> None:
    rank = Rank()
    rank.reach().result(TIMEOUT_S)
    settled = rank.leader.settle("a", 0, 1)
    rank.orders.deliver()
    rank.notes.append({"push": ["a", 0, 0, [3]]})
    rank.step()
    assert not settled.done()
    rank.way.jobs.popleft().future.set_result(None)
    assert settled.done()


@pytest.mark.parametrize("error", [ReplicaLost("decode/1 is gone"), PeerSilent("no reply"), TransferFailed("refused")])
def test_a_hand_over_whose_piece_fails_settles_with_its_error(error: TransferFailed | ReplicaLost) -> None:
    rank = Rank()
    rank.reach().result(TIMEOUT_S)
    rank.notes.append({"push": ["a", 0, 0, [3]]})
    rank.step()
    rank.way.fail(error)
    settled = rank.leader.settle("a", 0, 1)
    rank.orders.deliver()
    assert repr(settled.exception()) == repr(error)
    assert not rank.broken
    assert rank.follower.is_idle


def test_a_hand_over_that_is_dropped_pushes_no_more() -> None:
    rank = Rank()
    rank.reach().result(TIMEOUT_S)
    settled = rank.leader.settle("a", 0, 1)
    rank.orders.deliver()
    rank.leader.drop("a", 0)
    rank.notes.append({"push": ["a", 0, 0, [3]]})
    rank.step()
    assert not rank.way.jobs
    assert "attempt 0 was given up" in str(settled.exception())
    assert rank.follower.is_idle


def test_a_newer_attempt_takes_the_place_of_an_older_one_and_not_the_reverse() -> None:
    rank = Rank()
    for epoch in (1, 2, 0):
        rank.reach(epoch).result(TIMEOUT_S)
    rank.leader.drop("a", 1)
    rank.notes += [{"push": ["a", epoch, 0, [3]]} for epoch in (0, 1, 2)]
    rank.step()
    assert [job.header.epoch for job in rank.way.jobs if job.header is not None] == [2]
    settled = rank.leader.settle("a", 1, 1)
    rank.orders.deliver()
    assert "attempt 1 is not under way here" in str(settled.exception())


@pytest.mark.parametrize("error", [ReplicaLost("no road"), KeyError("a fault of ours")])
def test_a_rank_that_is_out_of_reach_is_told(error: Exception) -> None:
    rank = Rank()
    rank.error = error
    found = rank.reach().exception(TIMEOUT_S)
    assert str(error.args[0]) in str(found)
    assert isinstance(found, ReplicaLost) is isinstance(error, ReplicaLost)
    assert rank.follower.is_idle


def test_a_hand_over_that_is_dropped_while_the_other_side_is_being_reached_leaves_nothing() -> None:
    """One rank could not reach its like, and the leader has given up before the others have."""
    rank, calls = Rank(), list[Callable[[], None]]()
    rank.follower._spawn = calls.append
    reached = rank.reach()
    rank.leader.drop("a", 0)
    rank.step()
    (reach,) = calls
    reach()
    assert reached.result(TIMEOUT_S) == [{}]
    assert rank.follower.is_idle


def test_what_was_given_up_is_not_read_any_more() -> None:
    """Its blocks are the next one's; pieces that wait for their turn are not sent."""
    rank = Rank()
    rank.reach().result(TIMEOUT_S)
    rank.notes.append({"push": ["a", 0, 0, [3]]})
    rank.step()
    pushed = [job.future for job in rank.way.jobs]
    rank.leader.drop("a", 0)
    rank.step()
    rank.way.deliver_all()
    assert pushed
    assert all("attempt 0 was given up" in str(future.exception()) for future in pushed)


def test_blocks_are_erased_in_the_order_in_which_the_leader_does_so() -> None:
    """A lease waits for what is to become of its blocks first: else what has come for it would be erased."""
    rank = Rank()
    rank.leader.erase("poison", [2])
    rank.leader.erase("clean", [2])
    told = rank.leader.expect(lease())
    rank.orders.deliver()
    assert not told.done()
    rank.step()
    assert told.done()
    assert not rank.kv.data[:, :, 2].any()
    rank.leader.erase("poison", [2])
    rank.step()
    assert rank.kv.data[:, :, 2].isnan().all()


def test_an_order_that_is_not_understood_is_refused() -> None:
    with pytest.raises(TransferFailed, match="unknown message 'dance'"):
        Rank().follower.handle({"type": "dance", "request_id": "a", "epoch": 0}, lambda reply: None)


# ---- the leader


def test_one_answer_comes_of_all_the_followers() -> None:
    channels = [ManualChannel(Rank().follower) for _ in range(3)]
    broken: list[EngineFailed] = []
    leader = Followers(lambda note: None, TIMEOUT_S, broken.append)
    assert leader.expect(lease()).result(0) == []
    leader.channels = channels
    good, bad = leader.expect(lease()), leader.forget(lease())
    for channel in channels[:2]:
        channel.deliver()
    assert not good.done()
    channels[2].deliver()
    assert good.result(0) == [{}, {}, {}]
    channels[1].fail(TransferFailed("first"))
    channels[0].fail(TransferFailed("second"))
    channels[2].deliver()
    assert str(bad.exception(0)) == "first"
    assert len(broken) == 1

"""Leases: never more blocks than there are, one attempt at a time, and an end for all that nobody keeps alive."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ernie_cluster.engine.block_pool import BlockPool
from ernie_cluster.engine.leases import Lease, LeaseTable
from ernie_cluster.errors import ContextTooLong, Overloaded, TransferFailed

BLOCK_SIZE = 4
TIMEOUT_S = 10.0


def make_table(num_blocks: int = 9) -> LeaseTable:
    return LeaseTable(BlockPool(num_blocks, BLOCK_SIZE), TIMEOUT_S)


class LeaseMachine(RuleBasedStateMachine):
    """Grants, renewals, sweeps and takers against plain dictionaries."""

    @initialize(num_blocks=st.integers(2, 12))
    def start(self, num_blocks: int) -> None:
        self.table = make_table(num_blocks)
        self.capacity = num_blocks - 1
        self.now = 0.0
        self.live: dict[str, Lease] = {}
        self.deadlines: dict[str, float] = {}
        self.taken: list[list[int]] = []

    @rule(
        request_id=st.sampled_from("abc"),
        epoch=st.integers(0, 3),
        num_tokens=st.integers(1, 20),
        reserve=st.integers(0, 8),
        keep_free=st.integers(0, 3),
        within_s=st.sampled_from([3.0, 17.0, float("inf")]),
    )
    def grant(
        self, request_id: str, epoch: int, num_tokens: int, reserve: int, keep_free: int, within_s: float
    ) -> None:
        old, until_s = self.live.get(request_id), self.now + within_s

        def ask() -> Lease:
            return self.table.grant(request_id, epoch, num_tokens, [], reserve, self.now, keep_free, until_s)

        if -(-num_tokens // BLOCK_SIZE) > self.capacity:
            with pytest.raises(ContextTooLong):
                ask()
            return
        if old is not None and old.epoch >= epoch:
            with pytest.raises(TransferFailed, match=f"attempt {epoch} came after attempt {old.epoch}"):
                ask()
            return
        self.live.pop(request_id, None)
        self.deadlines.pop(request_id, None)
        used = sum(map(len, self.taken)) + sum(len(lease.blocks) for lease in self.live.values())
        wanted = min(-(-(num_tokens + reserve) // BLOCK_SIZE), self.capacity)
        if wanted + keep_free > self.capacity - used:
            with pytest.raises(Overloaded, match="KV cache is full"):
                ask()
            return
        lease = ask()
        assert (lease.epoch, len(lease.blocks), lease.num_shared) == (epoch, wanted, 0)
        self.live[request_id], self.deadlines[request_id] = lease, min(self.now + TIMEOUT_S, until_s)

    @rule(request_id=st.sampled_from("abc"), epoch=st.integers(0, 3))
    def find(self, request_id: str, epoch: int) -> None:
        lease = self.live.get(request_id)
        if lease is not None and lease.epoch == epoch:
            assert self.table.find(request_id, epoch) is lease
        else:
            with pytest.raises(TransferFailed):
                self.table.find(request_id, epoch)

    @rule(request_id=st.sampled_from("abc"), epoch=st.integers(0, 3))
    def take(self, request_id: str, epoch: int) -> None:
        lease = self.live.get(request_id)
        if lease is None or lease.epoch != epoch:
            with pytest.raises(TransferFailed):
                self.table.take(request_id, epoch)
            return
        self.taken.append(self.table.take(request_id, epoch).blocks)
        del self.live[request_id], self.deadlines[request_id]

    @precondition(lambda self: self.taken)
    @rule()
    def give_back(self) -> None:
        self.table.pool.free(self.taken.pop())

    @rule(request_id=st.sampled_from("abc"), epoch=st.none() | st.integers(0, 3))
    def end(self, request_id: str, epoch: int | None) -> None:
        lease = self.live.get(request_id)
        expected = lease is not None and epoch in (None, lease.epoch)
        assert self.table.end(request_id, epoch) == expected
        if expected:
            del self.live[request_id], self.deadlines[request_id]

    @rule(request_id=st.sampled_from("abc"))
    def renew(self, request_id: str) -> None:
        self.table.renew(request_id, self.now)
        if request_id in self.live:
            self.deadlines[request_id] = min(self.now + TIMEOUT_S, self.live[request_id].until_s)

    @rule(seconds=st.sampled_from([1.0, 4.0, 10.0]))
    def pass_time_and_sweep(self, seconds: float) -> None:
        self.now += seconds
        late = {r for r, deadline in self.deadlines.items() if deadline <= self.now}
        assert set(self.table.sweep(self.now)) == late
        for request_id in late:
            del self.live[request_id], self.deadlines[request_id]

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "table"):
            return
        assert self.table.pool.check()
        assert len(self.table) == len(self.live)
        owners = [
            block for blocks in (*self.taken, *(lease.blocks for lease in self.live.values())) for block in blocks
        ]
        assert len(set(owners)) == len(owners) == self.table.pool.num_used
        assert self.table.num_blocks == sum(len(lease.blocks) for lease in self.live.values())


TestLeases = LeaseMachine.TestCase
TestLeases.settings = settings(max_examples=150, stateful_step_count=30)


def test_a_grant_shares_the_cached_prefix_but_never_the_last_token() -> None:
    table = make_table()
    blocks = table.pool.allocate(2)
    for block, digest in zip(blocks, (b"1", b"2"), strict=True):
        table.pool.publish(block, digest)
    table.pool.free(blocks)
    whole = table.grant("a", 0, 8, [b"1", b"2"], 0, 0.0)
    assert (whole.num_shared, len(whole.blocks)) == (1, 2)
    longer = table.grant("b", 0, 9, [b"1", b"2"], 0, 0.0)
    assert (longer.num_shared, len(longer.blocks)) == (2, 3)
    assert longer.blocks[:2] == blocks


def test_a_refused_grant_gives_the_shared_prefix_back() -> None:
    table = make_table(4)
    blocks = table.pool.allocate(1)
    table.pool.publish(blocks[0], b"1")
    table.pool.free(blocks)
    table.grant("a", 0, 8, [], 0, 0.0)
    with pytest.raises(Overloaded):
        table.grant("b", 0, 12, [b"1"], 0, 0.0)
    assert table.pool.num_used == 2
    assert table.pool.match([b"1"]) == 1


def test_a_new_attempt_fences_off_the_old_one() -> None:
    table = make_table()
    table.grant("a", 0, 8, [], 0, 0.0)
    table.grant("a", 1, 8, [], 0, 0.0)
    with pytest.raises(TransferFailed, match="attempt 0 is fenced off, attempt 1 holds the lease"):
        table.find("a", 0)
    assert table.num_blocks == 2


def test_a_prompt_larger_than_the_cache_is_the_clients_fault_not_a_matter_of_waiting() -> None:
    with pytest.raises(ContextTooLong, match="33 tokens need 9 KV blocks of 4, this replica has 8"):
        make_table().grant("a", 0, 33, [], 0, 0.0)


def test_the_reserve_never_asks_for_more_than_there_is() -> None:
    assert len(make_table().grant("a", 0, 30, [], 100, 0.0).blocks) == 8


def test_a_lease_that_is_kept_alive_for_ever_ends_with_its_request() -> None:
    """Whoever should have ended it has forgotten to, and renews it with the others."""
    table = make_table()
    table.grant("a", 0, 8, [], 0, 0.0, until_s=25.0)
    for now in range(0, 25, 5):
        table.renew("a", float(now))
        assert table.sweep(float(now)) == []
    table.renew("a", 24.0)
    assert table.sweep(25.0) == ["a"]
    assert table.pool.num_used == 0


def test_blocks_that_other_ranks_write_into_are_free_when_those_have_forgotten_the_lease() -> None:
    table, recalled = make_table(), list[Lease]()
    table.recall = recalled.append
    lease = table.grant("a", 0, 5, [], 0, 0.0)
    lease.told = Future()
    assert table.end("a")
    assert not table.end("a")
    assert recalled == [lease]
    assert len(table) == 0
    assert table.blocks() == lease.blocks
    assert table.pool.num_used == 2
    table.give_back(lease)
    assert table.blocks() == []
    assert table.pool.num_used == 0


def test_an_attempt_gets_no_second_lease_while_other_ranks_may_write_under_its_first() -> None:
    table = make_table()
    table.recall = lambda lease: None
    first = table.grant("a", 1, 5, [], 0, 0.0)
    first.told = Future()
    table.end("a")
    for late in (0, 1):
        with pytest.raises(TransferFailed, match=f"attempt {late} has ended here"):
            table.grant("a", late, 5, [], 0, 0.0)
    assert table.grant("a", 2, 5, [], 0, 0.0).epoch == 2
    table.end("a")
    table.give_back(first)
    assert table.grant("b", 1, 5, [], 0, 0.0).epoch == 1

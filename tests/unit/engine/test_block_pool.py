"""The block pool against a naive one: who holds a block, which content can be found, and what is forgotten first."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ernie_cluster.deltas import short_hash
from ernie_cluster.engine.block_pool import BlockPool, OutOfBlocks


def chain(letters: str) -> list[bytes]:
    """Hash chain of a prompt whose blocks are letters: each hash covers all before it."""
    return [part.encode() for part in itertools.accumulate(letters)]


class PoolMachine(RuleBasedStateMachine):
    """Holders take and give back runs of blocks, as sequences and leases do."""

    @initialize(num_blocks=st.integers(2, 9), has_cache=st.booleans())
    def start(self, num_blocks: int, has_cache: bool) -> None:
        self.pool = BlockPool(num_blocks, 4, enable_prefix_cache=has_cache)
        self.has_cache = has_cache
        self.held: list[list[int]] = []
        self.content: dict[int, bytes] = {}
        """Every block's findable content."""
        self.free_order: list[int] = list(range(1, num_blocks))
        """The order in which free blocks are handed out."""

    def references(self, block: int) -> int:
        return sum(blocks.count(block) for blocks in self.held)

    @rule(count=st.integers(0, 5))
    def allocate(self, count: int) -> None:
        if count > len(self.free_order):
            with pytest.raises(OutOfBlocks, match=f"{count} KV blocks wanted, {len(self.free_order)} of"):
                self.pool.allocate(count)
            return
        blocks = self.pool.allocate(count)
        assert blocks == self.free_order[:count]
        del self.free_order[:count]
        for block in blocks:
            self.content.pop(block, None)
        self.held.append(blocks)

    @rule(letters=st.text("ab", min_size=1, max_size=4))
    def share(self, letters: str) -> None:
        found = {digest: block for block, digest in self.content.items()}
        expected = [found[d] for d in itertools.takewhile(found.__contains__, chain(letters))]
        assert self.pool.match(chain(letters)) == len(expected)
        assert self.pool.share(chain(letters)) == expected
        self.free_order = [b for b in self.free_order if b not in expected]
        self.held.append(expected)

    @precondition(lambda self: any(self.held))
    @rule(data=st.data(), letters=st.text("ab", min_size=1, max_size=4))
    def publish(self, data: st.DataObject, letters: str) -> None:
        """A prompt is computed into blocks of one holder, the first one's content first."""
        blocks = data.draw(st.sampled_from([h for h in self.held if h]))
        for block, digest in zip(blocks, chain(letters), strict=False):
            self.pool.publish(block, digest)
            if self.has_cache and block not in self.content and digest not in self.content.values():
                self.content[block] = digest

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        blocks = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.free(blocks)
        for block in reversed(blocks):
            if not self.references(block):
                # nothing to lose goes first, else the longest free goes first
                self.free_order.insert(len(self.free_order) if block in self.content else 0, block)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "pool"):
            return
        assert self.pool.check()
        assert self.pool.num_free == len(self.free_order)
        assert self.pool.num_used == self.pool.num_blocks - 1 - len(self.free_order)
        assert self.pool.num_cached == len(self.content)
        for block in range(1, self.pool.num_blocks):
            assert (self.references(block) > 0) != (block in self.free_order)

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for blocks in self.held:
                self.pool.free(blocks)
            assert self.pool.num_used == 0
            assert self.pool.check()


TestBlockPool = PoolMachine.TestCase
TestBlockPool.settings = settings(max_examples=150, stateful_step_count=30)


def test_a_prefix_loses_its_tail_before_its_head() -> None:
    pool = BlockPool(5, 4)
    blocks = pool.allocate(4)
    for block, digest in zip(blocks, chain("abcd"), strict=True):
        pool.publish(block, digest)
    pool.free(blocks)
    for left in (3, 2, 1, 0):
        pool.allocate(1)
        assert pool.match(chain("abcd")) == left


def test_unfinished_blocks_are_handed_out_before_cached_ones() -> None:
    pool = BlockPool(4, 4)
    blocks = pool.allocate(3)
    pool.publish(blocks[0], b"a")
    pool.free(blocks)
    assert pool.allocate(2) == blocks[1:]
    assert pool.match([b"a"]) == 1


def test_a_failed_allocation_takes_nothing() -> None:
    pool = BlockPool(4, 4)
    pool.allocate(1)
    with pytest.raises(OutOfBlocks):
        pool.allocate(3)
    assert pool.num_free == 2
    assert pool.check()


def test_the_first_block_of_a_content_stays_the_one() -> None:
    pool = BlockPool(4, 4)
    first, second = pool.allocate(2)
    pool.publish(first, b"a")
    pool.publish(second, b"a")
    pool.publish(first, b"b")
    assert pool.share([b"a"]) == [first]
    assert pool.match([b"b"]) == 0


def test_freeing_twice_is_a_bug_that_shows() -> None:
    pool = BlockPool(4, 4)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(blocks)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_blocks_for_tokens(tokens: int, blocks: int) -> None:
    assert BlockPool(2, 4).num_blocks_for(tokens) == blocks


def test_the_log_tells_what_came_and_went() -> None:
    pool = BlockPool(4, 4)
    (block,) = pool.allocate(1)
    pool.publish(block, b"a" * 32)
    told = pool.log.since(0)
    assert told.added_items == [short_hash(b"a" * 32)]
    pool.free([block])
    pool.allocate(3)
    assert pool.log.since(told.version).removed_items == told.added_items


def test_a_hold_is_void_once_a_block_of_it_was_given_up() -> None:
    """And stays so whoever has the block then; who shares it may give up his share."""
    pool = BlockPool(4, 4)
    blocks = pool.allocate(2)
    hold = pool.hold(blocks)
    pool.publish(blocks[0], b"shared")
    pool.share([b"shared"])
    pool.free(blocks[:1])
    assert hold.is_valid, "somebody holds it still, and nobody may write to it"
    pool.free(blocks[:1])
    assert not hold.is_valid
    pool.share([b"shared"])
    assert not hold.is_valid
    assert pool.hold(blocks).is_valid

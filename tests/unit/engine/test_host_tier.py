"""The pool with memory of the host behind it: what comes back is what went there, nothing is lost for lack of care, and
answers are those of an engine that needs none of it.
"""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections.abc import Mapping, Set

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ernie_cluster.deltas import short_hash
from ernie_cluster.engine.block_pool import BlockPool, OutOfBlocks, Tier
from ernie_cluster.engine.host_tier import HostMemory, HostTier
from ernie_cluster.engine.worker import Worker
from ernie_cluster.request import GenerationRequest, block_hashes
from tests import tiny
from tests.tiny import Outcomes, make_image, make_request, make_worker, run_mixed
from tests.unit.engine.test_block_pool import chain
from tests.unit.engine.toy import answer, toy_worker

SHAPE = 2, 2, 3, 1, 2
"""Of a block: layers, K and V, tokens, heads, row."""


def numbers(digest: bytes) -> torch.Tensor:
    """What a block holds that a digest stands for."""
    chance = torch.Generator().manual_seed(zlib.crc32(digest))
    return torch.randint(1 << 40, SHAPE, generator=chance)


class TierMachine(RuleBasedStateMachine):
    """Prompts take blocks, compute what is not known, and give them back; beside the tier a naive one keeps whole contents."""

    @initialize(num_blocks=st.integers(2, 8), num_slots=st.integers(1, 8))
    def start(self, num_blocks: int, num_slots: int) -> None:
        self.kv = torch.zeros(2, 2, num_blocks, *SHAPE[2:], dtype=torch.int64)
        self.tier = HostTier(HostMemory(self.kv, num_slots))
        self.pool = BlockPool(num_blocks, 3, tier=self.tier)
        self.num_slots = num_slots
        self.held: list[tuple[list[int], list[bytes]]] = []
        """Blocks of a prompt, and what its first ones hold."""
        self.in_pool: dict[int, bytes] = {}
        self.in_tier: list[bytes] = []
        """Least recently used first."""
        self.noise = 0

    def find(self, digest: bytes) -> bool:
        return digest in self.in_pool.values() or digest in self.in_tier

    @rule(letters=st.text("abc", max_size=5), more=st.integers(0, 2), keep_free=st.integers(0, 2))
    def ask(self, letters: str, more: int, keep_free: int) -> None:
        hashes = chain(letters)
        known = list(itertools.takewhile(self.find, hashes))
        assert self.pool.match(hashes) == len(known)
        here = {block for block, digest in self.in_pool.items() if digest in known}
        num_free = self.pool.num_free - sum(not any(block in blocks for blocks, _ in self.held) for block in here)
        if len(hashes) + more - len(here) + keep_free > num_free:
            before = self.kv.clone()
            with pytest.raises(OutOfBlocks, match=f"{keep_free} of them spoken for"):
                self.pool.acquire(hashes, len(hashes) + more, keep_free)
            assert torch.equal(self.kv, before)
            assert self.pool.match(hashes) == len(known)
            return
        order = [
            block for block in self.pool._free if block not in here
        ]  # who is handed out first, the pool's own tests say
        blocks, num_known = self.pool.acquire(hashes, len(hashes) + more, keep_free)
        assert num_known == len(known)
        assert len(blocks) == len(hashes) + more
        for block, digest in zip(blocks, known, strict=False):
            assert torch.equal(self.kv[:, :, block], numbers(digest)), "a block holds other content than its hash says"
        self.evict([block for block in order if block in blocks], [d for d in known if d not in self.in_pool.values()])
        self.in_pool |= dict(zip(blocks, known, strict=False))
        for block in blocks[num_known:]:  # whoever owns a block writes what it likes
            self.noise -= 1
            self.kv[:, :, block] = self.noise
        self.held.append((blocks, hashes))
        for i in range(num_known, len(hashes)):
            self.kv[:, :, blocks[i]] = numbers(hashes[i])
            self.pool.publish(blocks[i], hashes[i])
            if hashes[i] not in self.in_pool.values():
                self.in_pool[blocks[i]] = hashes[i]

    def evict(self, blocks: list[int], restored: list[bytes]) -> None:
        """As a naive tier would have it."""
        gone = [self.in_pool.pop(block) for block in blocks if block in self.in_pool]
        for digest in gone:
            if digest in self.in_tier:
                self.in_tier.remove(digest)
            elif len(self.in_tier) == self.num_slots:
                others = [d for d in self.in_tier if d not in restored]
                if not others:
                    continue
                self.in_tier.remove(others[0])
            self.in_tier.append(digest)
        for digest in reversed(restored):
            self.in_tier.remove(digest)
            self.in_tier.append(digest)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        blocks, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.free(blocks)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "pool"):
            return
        assert self.pool.check([block for blocks, _ in self.held for block in blocks])
        assert set(self.tier) == set(self.in_tier)
        assert self.tier.use.num_held <= self.num_slots
        assert {short_hash(d) for d in (*self.in_pool.values(), *self.in_tier)} == set(self.pool.log)
        for block, digest in self.in_pool.items():
            assert torch.equal(self.kv[:, :, block], numbers(digest)), "somebody wrote over a block that can be found"


TestHostTier = TierMachine.TestCase
TestHostTier.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


class Books:
    """A pool of `num_blocks` that may be used, with `num_slots` behind it."""

    def __init__(self, num_blocks: int, num_slots: int) -> None:
        self.kv = torch.zeros(2, 2, num_blocks + 1, *SHAPE[2:], dtype=torch.int64)
        self.tier = HostTier(HostMemory(self.kv, num_slots))
        self.pool = BlockPool(num_blocks + 1, 3, tier=self.tier)

    def compute(self, letters: str) -> int:
        """A prompt comes and goes; how many of its blocks were known."""
        hashes = chain(letters)
        blocks, num_known = self.pool.acquire(hashes, len(hashes))
        for block, digest in zip(blocks, hashes, strict=True):
            if digest not in hashes[:num_known]:
                self.kv[:, :, block] = numbers(digest)
                self.pool.publish(block, digest)
            assert torch.equal(self.kv[:, :, block], numbers(digest))
        self.pool.free(blocks)
        assert self.pool.check([])
        return num_known


def test_bytes_are_bounded() -> None:
    books = Books(4, 3)
    for letters in ("abcd", "efgh", "ijkl", "abcd"):
        books.compute(letters)
    use = books.tier.use
    assert (use.num_slots, use.num_held, use.block_bytes) == (3, 3, 2 * 2 * 3 * 1 * 2 * 8)


def test_what_is_forgotten_again_is_not_copied_again() -> None:
    books = Books(4, 12)
    assert [books.compute(letters) for letters in ("abcd", "efgh", "abcd", "efgh", "abcd")] == [0, 0, 4, 4, 4]
    use = books.tier.use
    assert (use.offloaded, use.restored, use.dropped) == (8, 12, 0)


def test_what_is_about_to_be_restored_makes_no_room_for_what_it_displaces() -> None:
    books = Books(4, 4)
    books.compute("abcd")
    books.compute("efgh")  # abcd is in the tier, which is full
    assert books.compute("abcd") == 4
    assert books.tier.use.dropped == 4
    assert books.pool.match(chain("efgh")) == 0


def test_readers_are_told_when_both_have_lost_it() -> None:
    books = Books(4, 4)
    books.compute("abcd")
    told = books.pool.log.since(None)
    books.compute("efgh")
    delta = books.pool.log.since(told.version)
    assert (len(delta.added_items), delta.removed_items) == (4, [])
    books.compute("ijkl")
    assert set(books.pool.log.since(told.version).removed_items) == {short_hash(d) for d in chain("abcd")}


def test_what_makes_room_and_comes_back_at_once_is_not_lost() -> None:
    books = Books(2, 1)
    for letters in ("a", "b", "c", "a"):  # a is in the pool again, and in the tier still
        books.compute(letters)
    told = books.pool.log.since(None)
    assert b"a" in books.tier
    books.compute("de")  # c takes the slot of a, and a that of c
    assert books.pool.match([b"a"]) == 1
    assert set(books.pool.log.since(told.version).removed_items) == {short_hash(b"c")}


def test_a_gap_is_filled_and_what_lies_behind_it_is_shared() -> None:
    books = Books(6, 6)
    for letters in ("ab", "cdefgh"):
        books.compute(letters)
    first, *_ = books.pool.allocate(2)  # of what is behind a, b is computed again, and stays
    books.pool.publish(first, chain("ab")[1])
    assert chain("ab")[0] in books.tier
    assert books.pool.match(chain("ab")) == 2
    blocks, num_known = books.pool.acquire(chain("ab"), 2)
    assert (num_known, blocks[1]) == (2, first)
    assert torch.equal(books.kv[:, :, blocks[0]], numbers(chain("ab")[0]))


def test_a_slot_is_never_read_for_other_content_than_it_was_written_for() -> None:
    books = Books(4, 8)
    books.compute("abcd")
    books.compute("efgh")
    slots, (a, b) = books.tier._slot_of, chain("ab")
    slots[a], slots[b] = slots[b], slots[a]
    with pytest.raises(AssertionError, match="was written for other content"):
        books.pool.check()
    with pytest.raises(AssertionError, match="was written for other content"):
        books.compute("abcd")


def test_a_tier_that_takes_nothing_has_nothing_to_give() -> None:
    with pytest.raises(AssertionError, match="from nowhere"):
        Tier().restore({b"a": 1})


# ---- engines

PROMPTS = [list(range(first, first + 40)) for first in (100, 200, 300, 400)]
"""Ten blocks each."""
SMALL = 2 + 16
"""Blocks for one of them and its answer."""


def ask(worker: Worker, outcomes: Outcomes, requests: list[GenerationRequest]) -> tuple[list[list[int]], int]:
    """Answers of requests that come one after the other, and prompt tokens that were computed for them."""
    before = worker.engine.counters.prompt_tokens
    for request in requests:
        run_mixed(worker, [request])
    outcomes.drain()
    assert not outcomes.errors
    assert worker.pool.num_used == 0
    return [outcomes.tokens[r.request_id] for r in requests], worker.engine.counters.prompt_tokens - before


def rounds(num: int, **request: object) -> list[GenerationRequest]:
    """All prompts in turn, again and again."""
    return [make_request(p, f"{i}-{p[0]}", **{"max_tokens": 3, **request}) for i in range(num) for p in PROMPTS]


@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "fp8"])
def test_only_the_tail_of_a_prompt_that_was_evicted_is_computed_again(kv_dtype: str) -> None:
    small, outcomes = make_worker(num_blocks=SMALL, host_blocks=60, kv_dtype=kv_dtype)
    said, num_computed = ask(small, outcomes, rounds(2))
    assert num_computed == 4 * 40 + 4 * 4  # the last block of each is computed for its logits
    use = small.snapshot().host_tier
    assert use is not None
    assert use.restored > 0
    assert said[:4] == said[4:]
    assert said == ask(*make_worker(num_blocks=256, kv_dtype=kv_dtype), rounds(2))[0]
    cacheless, num_all = ask(*make_worker(enable_prefix_cache=False, kv_dtype=kv_dtype), rounds(2))
    assert (said, num_all) == (cacheless, 8 * 40)


def test_without_a_tier_all_of_it_is_computed_again() -> None:
    worker, outcomes = make_worker(num_blocks=SMALL)
    assert ask(worker, outcomes, rounds(2))[1] == 8 * 40
    assert worker.snapshot().host_tier is None


def test_restored_tokens_are_told_as_cached_ones() -> None:
    worker, outcomes = make_worker(num_blocks=SMALL, host_blocks=60)
    ask(worker, outcomes, rounds(1))
    again = rounds(1)[0]
    worker.open_prefill(again, 0, None)
    assert worker.engine.sequences[again.request_id].num_cached == 36
    told = set(worker.cached(None).added_items)
    assert {short_hash(digest) for p in PROMPTS for digest in digests(p)} <= told


def digests(prompt: list[int]) -> list[bytes]:
    request = make_request(prompt)
    return block_hashes(request.prompt_token_ids, (), tiny.BLOCK_SIZE, request.cache_salt)


def test_pictures_come_back_too() -> None:
    def pictures(num: int) -> list[GenerationRequest]:
        return [make_request([50, make_image(s, (1, 6, 8)), 70, 80], f"{i}-{s}") for i in range(num) for s in (1, 2, 3)]

    worker, outcomes = make_worker(num_blocks=10, host_blocks=30)
    said, num_computed = ask(worker, outcomes, pictures(2))
    expected, num_all = ask(*make_worker(enable_prefix_cache=False), pictures(2))
    assert said == expected
    assert num_computed < num_all * 2 / 3


class Wrong(HostMemory):
    """Reads the neighbour of the slot that it was told to."""

    def restore(self, copies: object) -> None:
        super().restore([((slot + 1) % self.num_slots, block) for slot, block in copies])  # type: ignore[attr-defined]


@pytest.mark.parametrize("is_wrong", [False, True])
def test_a_slot_that_is_read_for_another_shows_in_the_answer(is_wrong: bool) -> None:
    worker, outcomes = toy_worker(18, 4, host_blocks=60)
    assert worker.host_tier is not None
    if is_wrong:
        worker.host_tier._memory.__class__ = Wrong
    requests = rounds(2, max_tokens=2)
    said, _ = ask(worker, outcomes, requests)
    assert (said == [answer(r) for r in requests]) is not is_wrong


class Late(HostTier):
    """Copies what is evicted once it is too late."""

    def __init__(self, memory: HostMemory) -> None:
        super().__init__(memory)
        self._late: list[Mapping[bytes, int]] = []

    def offload(self, evicted: Mapping[bytes, int], keep: Set[bytes] = frozenset()) -> set[bytes]:
        self._late.append(evicted)
        return super().offload(self._late.pop(0), keep) if len(self._late) > 1 else set()


def test_a_block_that_is_copied_after_it_was_written_again_shows_in_the_answer() -> None:
    worker, outcomes = toy_worker(18, 4, host_blocks=60)
    assert worker.host_tier is not None
    worker.pool._tier = Late(worker.host_tier._memory)
    requests = rounds(3, max_tokens=2)
    assert run_without_check(worker, outcomes, requests) != [answer(r) for r in requests]


def run_without_check(worker: Worker, outcomes: Outcomes, requests: list[GenerationRequest]) -> list[list[int]]:
    for request in requests:
        worker.open_prefill(request, 0, None)
        while worker.engine.step():
            pass
    outcomes.drain()
    return [outcomes.tokens[r.request_id] for r in requests]


def test_another_tenants_prompt_is_not_restored() -> None:
    worker, outcomes = make_worker(num_blocks=SMALL, host_blocks=60)
    ask(worker, outcomes, rounds(1))
    other = dataclasses.replace(rounds(1)[0], request_id="other", cache_salt=b"another tenant")
    worker.open_prefill(other, 0, None)
    assert worker.engine.sequences["other"].num_cached == 0

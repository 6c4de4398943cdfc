"""KV blocks: allocate, share through the prefix cache, free, check.

A block is in exactly one state:

    used        referenced by one or more sequences or leases
    free        referenced by nobody; when it carries a content hash it can be used again by a matching prompt,
                until it is handed out for other content (least recently freed first)

Block 0 belongs to nobody: padding points there. What a free block held goes to a `Tier` when it is handed out, and comes
back from there into a block of its own. Knows no tensor and no request.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import takewhile

from ernie_cluster.deltas import DeltaLog, short_hash


class OutOfBlocks(Exception):
    """Fewer blocks are free than were asked for; the caller preempts or refuses."""


class Tier:
    """Where content goes that the pool forgets; here nowhere."""

    def __contains__(self, digest: object) -> bool:
        return False

    def __iter__(self) -> Iterator[bytes]:
        """The content that can be restored."""
        return iter(())

    def offload(self, evicted: Mapping[bytes, int], keep: Set[bytes] = frozenset()) -> Iterable[bytes]:
        """Take the content of blocks, first the one that is worth least; they may be written once this returns.

        Args:
            evicted: content hash -> block.
            keep: content that is here and must stay.

        Returns:
            What is not here afterwards: of those given, and of those that made room for them.
        """
        return evicted

    def restore(self, wanted: Mapping[bytes, int]) -> None:
        """Write content that is here, by its hash, into blocks; whatever reads them from now on finds it."""
        assert not wanted, "nothing can be restored from nowhere"

    def check(self) -> bool:
        """All invariants; raises AssertionError that names the broken one."""
        return True


class Eraser:
    """What is done to blocks whose content is no more; here nothing."""

    def poison(self, blocks: Sequence[int]) -> None:
        """Nobody holds these, and nothing of them can be found."""

    def clean(self, blocks: Sequence[int]) -> None:
        """These are about to be written by whoever has them now."""


@dataclass(frozen=True, slots=True, eq=False)
class Hold:
    """Blocks that somebody reads outside the engine's lock, relying on others to keep them: this tells whether they did."""

    pool: BlockPool
    blocks: tuple[int, ...]
    generations: tuple[int, ...]
    """Of each when the hold began."""

    @property
    def is_valid(self) -> bool:
        """Nobody has given up any of the blocks since. What was read before one asks is what they held; from any thread."""
        return self.pool.generations(self.blocks) == self.generations


class BlockPool:
    """Owns all KV blocks of one engine.

    Args:
        num_blocks: all blocks, including block 0.
        block_size: tokens per block.
        enable_prefix_cache: keep the content hash of freed blocks for re-use.
        tier: where their content goes when they are used for other content; None = it is lost.
        eraser: what is done to them then.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_cache: bool = True,
        tier: Tier | None = None,
        eraser: Eraser | None = None,
    ) -> None:
        assert num_blocks >= 2
        self.num_blocks, self.block_size = num_blocks, block_size
        self._tier, self._eraser = tier or Tier(), eraser or Eraser()
        self.is_caching = enable_prefix_cache
        """Whether content is found again."""
        self._references = [0] * num_blocks
        self._generations = [0] * num_blocks
        """How often each block has lost its last holder."""
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self.log = DeltaLog()
        """Whose content can be found, here or in the tier, for those who send prompts where they were before."""

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated, cached content included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - 1 - len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks whose content can be found by its hash; not those of the tier."""
        return len(self._block_of)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks with one reference each; their old content is forgotten.

        Raises:
            OutOfBlocks: fewer are free; nothing was taken.
        """
        if count > len(self._free):
            raise OutOfBlocks(f"{count} KV blocks wanted, {len(self._free)} of {self.num_blocks - 1} free")
        return self._take(count)

    def acquire(self, hashes: Sequence[bytes], count: int, keep_free: int = 0) -> tuple[list[int], int]:
        """Take `count` blocks with one reference each for a prompt, what is known of it in place.

        Args:
            hashes: chain of the prompt's full blocks, as far as they may be shared; at most `count`.
            keep_free: blocks that must stay free.

        Returns:
            The blocks in order, and how many of them hold the longest prefix of the chain that is known: shared where the
            pool has it, restored where the tier has.

        Raises:
            OutOfBlocks: fewer are free; nothing was taken.
        """
        known = hashes[: self.match(hashes)]
        here = [digest for digest in known if digest in self._block_of]
        away = [digest for digest in known if digest not in self._block_of]
        shared = self.share(here)
        needed, free = count - len(shared), len(self._free)
        if needed + keep_free > free:
            self.free(shared)
            raise OutOfBlocks(
                f"{needed} blocks wanted, {free} of {self.num_blocks - 1} free, {keep_free} of them spoken for"
            )
        own = self._take(needed, keep=frozenset(away))
        restored = dict(zip(away, own, strict=False))
        self._tier.restore(restored)
        for digest, block in restored.items():
            self.publish(block, digest)
        block_of = {**dict(zip(here, shared, strict=True)), **restored}
        return [block_of[digest] for digest in known] + own[len(away) :], len(known)

    def match(self, hashes: Sequence[bytes]) -> int:
        """How many leading blocks of a hash chain are known, here or in the tier."""
        return len(list(takewhile(lambda digest: digest in self._block_of or digest in self._tier, hashes)))

    def share(self, hashes: Sequence[bytes]) -> list[int]:
        """One reference to each leading block of the chain that is cached here; the blocks in order."""
        blocks = []
        for digest in hashes:
            block = self._block_of.get(digest)
            if block is None:
                break
            self._references[block] += 1
            self._free.pop(block, None)
            blocks.append(block)
        return blocks

    def publish(self, block: int, digest: bytes) -> None:
        """The block's content is complete and is what `digest` stands for. The first block of a hash stays the one."""
        assert self._references[block] > 0
        if self.is_caching and digest not in self._block_of and block not in self._hash_of:
            self._block_of[digest] = block
            self._hash_of[block] = digest
            self.log.add(short_hash(digest))

    def generations(self, blocks: Sequence[int]) -> tuple[int, ...]:
        """A number for each block that rises when nobody holds it any more."""
        return tuple([self._generations[block] for block in blocks])

    def hold(self, blocks: Sequence[int]) -> Hold:
        """What readers outside the lock take with them; takes no reference."""
        return Hold(self, tuple(blocks), self.generations(blocks))

    def free(self, blocks: Sequence[int]) -> None:
        """Give back one reference to each. The tail of a prefix is handed out again before its head."""
        forgotten: list[int] = []
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} freed twice"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._generations[block] += 1
                self._free[block] = None
                if block not in self._hash_of:  # nothing to lose: hand it out first
                    self._free.move_to_end(block, last=False)
                    forgotten.append(block)
        if forgotten:
            self._eraser.poison(forgotten)

    def check(self, held: Iterable[int] | None = None) -> bool:
        """All invariants; raises AssertionError that names the broken one.

        Args:
            held: every block as often as somebody known holds it; None where not all holders are known.
        """
        if held is not None:
            holds = Counter(held)
            for block, count in enumerate(self._references):
                assert holds[block] == count, f"block {block} has {count} references, {holds[block]} of them known"
        assert self._references[0] == 0, "block 0 is in use"
        assert 0 not in self._free, "block 0 is free"
        for block in range(1, self.num_blocks):
            assert self._references[block] >= 0, f"block {block} has {self._references[block]} references"
            assert (self._references[block] == 0) == (block in self._free), f"block {block} is neither used nor free"
        assert len(self._block_of) == len(self._hash_of), "hash tables differ in size"
        known = {*self._block_of, *self._tier}
        assert set(self.log) == {short_hash(digest) for digest in known}, "the log tells of other blocks"
        for digest, block in self._block_of.items():
            assert self._hash_of.get(block) == digest, f"block {block} and its hash disagree"
        return self._tier.check()

    def _take(self, count: int, keep: Set[bytes] = frozenset()) -> list[int]:
        """Blocks that are free, with one reference each; what they held is the tier's, which keeps what it must."""
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        evicted: dict[bytes, int] = {}
        for block in blocks:
            self._references[block] = 1
            digest = self._hash_of.pop(block, None)
            if digest is not None:
                del self._block_of[digest]
                evicted[digest] = block
        for digest in self._tier.offload(evicted, keep) if evicted else ():
            if digest not in self._block_of:
                self.log.remove(short_hash(digest))
        if blocks:
            self._eraser.clean(blocks)
        return blocks

"""KV blocks: allocate, share through the prefix cache, free, check.

A block is in exactly one state:

    used        referenced by one or more sequences or leases
    free        referenced by nobody; when it carries a content hash it can be used again by a matching prompt,
                until it is handed out for other content (least recently freed first)

Block 0 belongs to nobody: padding points there. Knows no tensor and no request.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from ernie_cluster.deltas import DeltaLog, short_hash


class OutOfBlocks(Exception):
    """Fewer blocks are free than were asked for; the caller preempts or refuses."""


class BlockPool:
    """Owns all KV blocks of one engine.

    Args:
        num_blocks: all blocks, including block 0.
        block_size: tokens per block.
        enable_prefix_cache: keep the content hash of freed blocks for re-use.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_cache: bool = True) -> None:
        assert num_blocks >= 2
        self.num_blocks, self.block_size = num_blocks, block_size
        self._enable_prefix_cache = enable_prefix_cache
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self.log = DeltaLog()
        """Whose content can be found, for those who send prompts where they were before."""

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated, cached content included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - 1 - len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks whose content can be found by its hash."""
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
        blocks = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def match(self, hashes: Sequence[bytes]) -> int:
        """How many leading blocks of a hash chain are cached."""
        count = 0
        for digest in hashes:
            if digest not in self._block_of:
                break
            count += 1
        return count

    def share(self, hashes: Sequence[bytes]) -> list[int]:
        """One reference to each leading block of the chain that is cached; the blocks in order."""
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
        if self._enable_prefix_cache and digest not in self._block_of and block not in self._hash_of:
            self._block_of[digest] = block
            self._hash_of[block] = digest
            self.log.add(short_hash(digest))

    def free(self, blocks: Sequence[int]) -> None:
        """Give back one reference to each. The tail of a prefix is handed out again before its head."""
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} freed twice"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if block not in self._hash_of:  # nothing to lose: hand it out first
                    self._free.move_to_end(block, last=False)

    def check(self, held: Iterable[int] | None = None) -> bool:
        """All invariants; raises AssertionError that names the broken one.

        Args:
            held: every block as often as somebody known holds it; None where not all holders are known.
        """
        if held is not None:
            known = Counter(held)
            for block, count in enumerate(self._references):
                assert known[block] == count, f"block {block} has {count} references, {known[block]} of them known"
        assert self._references[0] == 0, "block 0 is in use"
        assert 0 not in self._free, "block 0 is free"
        for block in range(1, self.num_blocks):
            assert self._references[block] >= 0, f"block {block} has {self._references[block]} references"
            assert (self._references[block] == 0) == (block in self._free), f"block {block} is neither used nor free"
        assert len(self._block_of) == len(self._hash_of), "hash tables differ in size"
        assert set(self.log) == {short_hash(digest) for digest in self._block_of}, "the log tells of other blocks"
        for digest, block in self._block_of.items():
            assert self._hash_of.get(block) == digest, f"block {block} and its hash disagree"
        return True

    def _forget(self, block: int) -> None:
        digest = self._hash_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]
            self.log.remove(short_hash(digest))

"""Host memory behind the KV cache: content that the pool has to forget goes there, and comes back when it is wanted.

A slot holds one block, K and V of all its layers side by side: pinned memory where the cache is a GPU's, else ordinary
memory. On CPU a copy is over when the call is. On a GPU it is launched on the stream that the model runs on, so it lies
behind the steps that wrote what it reads and before those that write over it or read what it brings, and the host waits
for nothing; a stream of its own would let copies overlap with steps, for an event between the two on each side.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from ernie_cluster.engine.block_pool import Tier

Copies = list[tuple[int, int]]
"""(slot, block)."""


@dataclass(frozen=True, slots=True)
class TierUse:
    """What a tier holds, in blocks, and what it has done since the start."""

    num_slots: int
    num_held: int
    block_bytes: int
    """Of one block, as it is copied."""
    offloaded: int
    """Copied from the cache; content that is here already is not copied again."""
    restored: int
    """Copied back."""
    dropped: int
    """Forgotten for others, or never taken since there was no room."""


class HostMemory:
    """Owns the slots of one rank, and knows nothing of what is in them.

    All of it is claimed here: pinned at once for a GPU, on CPU page by page as it is first written.

    Args:
        kv: [layers, 2, num_blocks, block_size, kv_heads, row], the rank's cache.
        num_slots: blocks that it holds, at least 1.
    """

    def __init__(self, kv: Tensor, num_slots: int) -> None:
        self._blocks = kv.movedim(2, 0)
        self._slots = torch.empty((num_slots, *self._blocks.shape[1:]), dtype=kv.dtype, device="cpu")
        self.num_slots, self.block_bytes = num_slots, self._slots[0].nbytes
        if kv.is_cuda:  # registered, since torch's own pinned memory comes in powers of two
            register = torch.cuda.cudart().cudaHostRegister  # type: ignore[no-untyped-call]
            torch.cuda.check_error(register(self._slots.data_ptr(), self._slots.nbytes, 0))

    # one copy for each block, all layers at once: near the speed of memory, where gathering many and then laying them out
    # anew was measured at a third of it

    def offload(self, copies: Copies) -> None:
        """Blocks to slots."""
        for slot, block in copies:
            self._slots[slot].copy_(self._blocks[block], non_blocking=True)

    def restore(self, copies: Copies) -> None:
        """Slots to blocks."""
        for slot, block in copies:
            self._blocks[block].copy_(self._slots[slot], non_blocking=True)


class HostTier(Tier):
    """Owns the books of which content lies in which slot; the least recently used makes room. Called under the engine's lock.

    What is restored stays, so that the pool may forget it again without a second copy.

    Args:
        memory: the slots.
    """

    def __init__(self, memory: HostMemory) -> None:
        self._memory = memory
        self._slot_of: OrderedDict[bytes, int] = OrderedDict()
        self._written: list[bytes | None] = [None] * memory.num_slots
        """The content that each slot was last written for."""
        self._empty = list(reversed(range(memory.num_slots)))
        self._offloaded = self._restored = self._dropped = 0

    @property
    def use(self) -> TierUse:
        counts = self._offloaded, self._restored, self._dropped
        return TierUse(self._memory.num_slots, len(self._slot_of), self._memory.block_bytes, *counts)

    def __contains__(self, digest: object) -> bool:
        return digest in self._slot_of

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._slot_of)

    def offload(self, evicted: Mapping[bytes, int], keep: Set[bytes] = frozenset()) -> set[bytes]:
        """See `Tier`."""
        for digest in keep:
            self._slot_of.move_to_end(digest)
        lost: set[bytes] = set()
        sources: dict[int, int] = {}  # slot -> block; who comes too many takes the slot of one that came before it
        for digest, block in evicted.items():
            if digest in self._slot_of:
                self._slot_of.move_to_end(digest)
                continue
            slot = self._make_room(keep, lost)
            if slot is None:
                lost.add(digest)
                continue
            self._slot_of[digest] = slot
            self._written[slot] = digest
            sources[slot] = block
        if sources:
            self._memory.offload(list(sources.items()))
        self._offloaded += len(sources)
        lost -= self._slot_of.keys()  # what made room and came back at once
        self._dropped += len(lost)
        return lost

    def restore(self, wanted: Mapping[bytes, int]) -> None:
        """See `Tier`."""
        copies: Copies = []
        for digest, block in wanted.items():
            slot = self._slot_of[digest]
            assert self._written[slot] == digest, f"slot {slot} was written for other content"
            copies.append((slot, block))
        if copies:
            self._memory.restore(copies)
        for digest in reversed(list(wanted)):  # as in the pool: the tail of a prefix is forgotten before its head
            self._slot_of.move_to_end(digest)
        self._restored += len(copies)

    def check(self) -> bool:
        """See `Tier`."""
        taken = list(self._slot_of.values())
        assert sorted([*taken, *self._empty]) == list(range(len(self._written))), "a slot is lost, or has two owners"
        for digest, slot in self._slot_of.items():
            assert self._written[slot] == digest, f"slot {slot} was written for other content"
        return True

    def _make_room(self, keep: Set[bytes], lost: set[bytes]) -> int | None:
        """A slot to write to, whoever had it is lost; None where all are to be kept."""
        if self._empty:
            return self._empty.pop()
        oldest = next((digest for digest in self._slot_of if digest not in keep), None)
        if oldest is None:
            return None
        lost.add(oldest)
        return self._slot_of.pop(oldest)

"""Which replicas hold what in their caches, asked by item: a number's bits say which replicas.

Knows slots and items, no replica and no request. A slot is a replica's bit; an item is a `short_hash`, of a KV block with
all that stands before it, or of a picture.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from ernie_cluster.deltas import Delta


class Holders:
    """The caches of all replicas as they told, and what they are about to get."""

    def __init__(self) -> None:
        self._masks: dict[int, int] = {}
        self._held: dict[int, dict[int, None]] = {}  # by slot
        self._versions: dict[int, int] = {}
        self._coming: defaultdict[int, dict[int, int]] = defaultdict(dict)  # by slot: how often an item is expected
        self._coming_masks: dict[int, int] = {}

    def version(self, slot: int) -> int | None:
        """Up to where the copy of this slot's cache goes; None = there is none."""
        return self._versions.get(slot)

    def apply(self, slot: int, delta: Delta) -> None:
        """Take in what a replica told of its cache; one that does not go on from here changes nothing."""
        if delta.base is None:
            self.forget(slot)
        elif delta.base != self._versions.get(slot):
            return
        held, masks, bit = self._held.setdefault(slot, {}), self._masks, 1 << slot
        for item in delta.removed_items:
            if item in held:
                del held[item]
                self._clear(masks, item, bit)
        for item in delta.added_items:
            held[item] = None
            others = masks.get(item)
            masks[item] = bit if others is None else others | bit  # one object for most of them
        self._versions[slot] = delta.version

    def forget(self, slot: int) -> None:
        """A replica is gone, or its cache is another one; what it is about to get stays."""
        bit = 1 << slot
        for item in self._held.pop(slot, ()):
            self._clear(self._masks, item, bit)
        self._versions.pop(slot, None)

    def expect(self, slot: int, items: Iterable[int]) -> None:
        """A replica is about to get these; until `unexpect`, as often as this was called."""
        bit, counts, masks = 1 << slot, self._coming[slot], self._coming_masks
        for item in items:
            count = counts.get(item, 0)
            counts[item] = count + 1
            if not count:
                masks[item] = masks.get(item, 0) | bit

    def unexpect(self, slot: int, items: Iterable[int]) -> None:
        """One call of `expect` is over."""
        bit, counts = 1 << slot, self._coming[slot]
        for item in items:
            counts[item] -= 1
            if not counts[item]:
                del counts[item]
                self._clear(self._coming_masks, item, bit)

    def of(self, item: int) -> int:
        """Who has it, or is about to."""
        return self._masks.get(item, 0) | self._coming_masks.get(item, 0)

    def levels(self, chain: Sequence[int], among: int, limit: int) -> Iterator[tuple[int, int]]:
        """Who has most of a chain from its start.

        Takes for granted that who has a link has all before it, which is how engines give blocks back.

        Args:
            chain: items in order.
            among: the replicas that count.
            limit: most levels.

        Yields:
            (number of leading items, who has just so many), most items first; at least 1 item each.
        """
        end = len(chain)
        for _ in range(limit):
            end = self._last(chain, end, among)
            if not end:
                return
            mask = self.of(chain[end - 1]) & among
            yield end, mask
            among &= ~mask
            end -= 1

    def depth(self, chain: Sequence[int], slot: int) -> int:
        """How many leading items of a chain this replica has."""
        return self._last(chain, len(chain), 1 << slot)

    def _last(self, chain: Sequence[int], end: int, among: int) -> int:
        """How many of the first `end` items anybody of `among` has."""
        held, coming = self._masks.get, self._coming_masks.get
        if not end or not (held(chain[0], 0) | coming(chain[0], 0)) & among:
            return 0
        low = 1
        while low < end:
            middle = (low + end + 1) // 2
            item = chain[middle - 1]
            if (held(item, 0) | coming(item, 0)) & among:
                low = middle
            else:
                end = middle - 1
        return low

    def check(self) -> None:
        """Assert that both sides of the index agree."""
        masks: dict[int, int] = {}
        for slot, held in self._held.items():
            for item in held:
                masks[item] = masks.get(item, 0) | 1 << slot
        assert masks == self._masks, "the index of cached items differs from its replicas"
        coming: dict[int, int] = {}
        for slot, counts in self._coming.items():
            for item, count in counts.items():
                assert count > 0, f"item {item} is expected {count} times"
                coming[item] = coming.get(item, 0) | 1 << slot
        assert coming == self._coming_masks, "the index of expected items differs from its replicas"

    @staticmethod
    def _clear(masks: dict[int, int], item: int, bit: int) -> None:
        rest = masks[item] & ~bit
        if rest:
            masks[item] = rest
        else:
            del masks[item]

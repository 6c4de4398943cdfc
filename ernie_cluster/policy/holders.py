"""Which replicas hold what in their caches, asked by item: a number's bits say which replicas.

Knows slots and items, no replica and no request. A slot is a replica's bit; an item is a `short_hash`, of a KV block with
all that stands before it, or of a picture.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

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
            if item in counts:
                counts[item] += 1
            else:
                counts[item] = 1
                masks[item] = masks[item] | bit if item in masks else bit

    def unexpect(self, slot: int, items: Iterable[int]) -> None:
        """One call of `expect` is over."""
        bit, counts, masks = 1 << slot, self._coming[slot], self._coming_masks
        for item in items:
            if counts[item] > 1:
                counts[item] -= 1
                continue
            del counts[item]
            if masks[item] == bit:
                del masks[item]
            else:
                masks[item] ^= bit

    def of(self, item: int) -> int:
        """Who has it, or is about to."""
        return self._masks.get(item, 0) | self._coming_masks.get(item, 0)

    def trail(self, chain: Sequence[int]) -> Trail:
        """Who has how much of a chain; good until anything changes here."""
        return Trail(self._masks, self._coming_masks, chain)

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


_TOP = 3
"""Levels that are looked for among everybody, so that those who ask about some of them seldom have to search."""


class Trail:
    """Who has how much of one chain from its start. Remembers what it has looked up: many ask about the same links.

    Takes for granted that who has a link has all before it, which is how engines give blocks back.

    Args:
        held, coming: who has an item, or is about to.
        chain: items in order.
    """

    def __init__(self, held: Mapping[int, int], coming: Mapping[int, int], chain: Sequence[int]) -> None:
        self._held, self._coming, self._chain = held, coming, chain
        self._seen: dict[int, int] = {}  # by number of leading items: who has so many
        if chain:
            self._look_up(1)
        self._top = list(self._search(len(chain), -1, _TOP))
        self._below = self._top[-1][0] - 1 if len(self._top) == _TOP else 0  # leading items that others may have

    def levels(self, among: int, limit: int) -> Iterator[tuple[int, int]]:
        """Who has most.

        Args:
            among: the replicas that count.
            limit: most levels.

        Yields:
            (number of leading items, who has just so many), most items first; at least 1 item each.
        """
        for depth, mask in self._top:
            if who := mask & among:
                yield depth, who
                among ^= who
                limit -= 1
                if not limit:
                    return
        yield from self._search(self._below, among, limit)

    def present(self, among: int) -> tuple[int, int]:
        """As the first of `levels`, but what is only expected does not count; (0, 0) = nobody has any."""
        end, _ = next(self.levels(among, 1), (0, 0))
        mask = self._held.get(self._chain[end - 1], 0) & among if end else 0
        if mask or not end:
            return end, mask
        return next(Trail(self._held, {}, self._chain).levels(among, 1), (0, 0))

    def depth(self, slot: int) -> int:
        """How many leading items this replica has."""
        bit = 1 << slot
        for depth, mask in self._top:
            if mask & bit:
                return depth
        return self._last(self._below, bit)

    def _search(self, end: int, among: int, limit: int) -> Iterator[tuple[int, int]]:
        """`levels` of the first `end` items."""
        while limit and (end := self._last(end, among)):
            who = self._seen[end] & among
            yield end, who
            among &= ~who
            end -= 1
            limit -= 1

    def _last(self, end: int, among: int) -> int:
        """How many of the first `end` items anybody of `among` has.

        The numbers that are tried are sums of falling powers of two, whatever the end, so that searches meet.
        """
        seen = self._seen
        if not end or not seen[1] & among:
            return 0
        low, step = 0, 1 << end.bit_length() - 1
        while step:
            middle = low + step
            if middle <= end and (seen[middle] if middle in seen else self._look_up(middle)) & among:
                low = middle
            step >>= 1
        return low

    def _look_up(self, count: int) -> int:
        """Who has so many leading items, at least 1."""
        item = self._chain[count - 1]
        mask = self._seen[count] = self._held.get(item, 0) | self._coming.get(item, 0)
        return mask

"""A set that one process owns and another keeps a copy of, by differences.

The owner numbers its changes. Whoever names the last number that it has seen is told what has changed since, or the whole
set when that is too long ago, or when it has seen nothing. Items are 64-bit numbers: the first bytes of content hashes,
good for finding a place where something probably is, while the place itself compares whole hashes.
"""

from __future__ import annotations

import threading
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

_MAX_CHANGES = 1 << 16
"""Changes that are remembered; a reader that is further behind gets the whole set."""
_MAX_PER_DELTA = 1 << 13
"""Changes that one delta tells, 64 KiB; the next one goes on from there."""


def short_hash(digest: bytes) -> int:
    """The first 8 bytes of a content hash as a number."""
    return int.from_bytes(digest[:8], "little")


@dataclass(frozen=True, slots=True)
class Delta:
    """What changed between two versions of a set."""

    base: int | None
    """The version that it goes on from; None = `added` is the whole set."""
    version: int
    """The version that it leads to."""
    added: bytes = b""
    """8 bytes for each item."""
    removed: bytes = b""

    @property
    def is_empty(self) -> bool:
        """Whether it changes nothing."""
        return self.base == self.version

    @property
    def added_items(self) -> list[int]:
        """What came, in no order."""
        return _unpacked(self.added)

    @property
    def removed_items(self) -> list[int]:
        """What went, in no order; none of it is in `added_items`."""
        return _unpacked(self.removed)


class DeltaLog:
    """Owns a set of numbers and remembers its last changes; for any thread.

    Args:
        max_changes: how many.
        max_per_delta: told at once, at most; a whole set is told at once whatever its size, 8 bytes for each item.
    """

    def __init__(self, max_changes: int = _MAX_CHANGES, max_per_delta: int = _MAX_PER_DELTA) -> None:
        self._items: dict[int, None] = {}
        self._changes: deque[tuple[int, bool]] = deque(maxlen=max_changes)  # (item, whether it came)
        self._max_per_delta = max_per_delta
        self._version = 0  # changes so far
        self._lock = threading.Lock()

    def __contains__(self, item: int) -> bool:
        return item in self._items

    def __iter__(self) -> Iterator[int]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def add(self, item: int) -> None:
        """Put an item in; one that is there changes nothing."""
        with self._lock:
            if item not in self._items:
                self._items[item] = None
                self._note(item, came=True)

    def remove(self, item: int) -> None:
        """Take an item out; one that is not there changes nothing."""
        with self._lock:
            if item in self._items:
                del self._items[item]
                self._note(item, came=False)

    def since(self, version: int | None) -> Delta:
        """What has changed since `version`, or the whole set; None = nothing was seen yet."""
        with self._lock:
            oldest = self._version - len(self._changes)
            if version is None or not oldest <= version <= self._version:
                return Delta(None, self._version, _packed(self._items))
            count = min(self._version - version, self._max_per_delta)
            last = dict(_middle(self._changes, version - oldest, count))  # of each item, whether it is there in the end
        return Delta(
            version,
            version + count,
            _packed(item for item, is_there in last.items() if is_there),
            _packed(item for item, is_there in last.items() if not is_there),
        )

    def _note(self, item: int, *, came: bool) -> None:
        self._changes.append((item, came))
        self._version += 1


def _middle(changes: deque[tuple[int, bool]], first: int, count: int) -> list[tuple[int, bool]]:
    """`count` changes from `first` on; mostly the newest ones are asked for, so the way there starts at the end."""
    tail = list(islice(reversed(changes), len(changes) - first))
    tail.reverse()
    return tail[:count]


def _packed(items: Iterable[int]) -> bytes:
    return array("Q", items).tobytes()


def _unpacked(data: bytes) -> list[int]:
    return list(array("Q", data))

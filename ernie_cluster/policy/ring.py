"""Consistent hashing of pictures over encoders: each picture has a home, and few move when an encoder comes or goes."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator

_POINTS = 32
"""Of each encoder; more spread the pictures more evenly."""


class Ring:
    """Encoders as points on a circle of 64-bit numbers; a picture belongs to the next point."""

    def __init__(self) -> None:
        self._points: list[tuple[int, str, int]] = []  # (place, id, slot)

    def add(self, replica_id: str, slot: int) -> None:
        """An encoder comes; it is not there."""
        for place in _places(replica_id):
            insort(self._points, (place, replica_id, slot))

    def remove(self, replica_id: str) -> None:
        """An encoder that is there goes."""
        for place in _places(replica_id):
            del self._points[bisect_left(self._points, (place, replica_id))]

    def homes(self, item: int) -> Iterator[int]:
        """Slots of the encoders in the order in which this picture belongs to them, each at least once."""
        start = bisect_right(self._points, (item, "\uffff"))
        for i in range(len(self._points)):
            yield self._points[(start + i) % len(self._points)][2]


def _places(replica_id: str) -> list[int]:
    digest = b"".join(hashlib.sha256(f"{i}:{replica_id}".encode()).digest() for i in range(_POINTS // 4))
    return [int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8)]

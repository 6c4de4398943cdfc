"""Allocator of contiguous ranges in one fixed piece of memory. Pure arithmetic; the memory itself is the caller's."""

from __future__ import annotations

from bisect import bisect_left


class Arena:
    """Lowest fit first, free in any order, free neighbours merge.

    The lowest fit keeps the working set as small as what is in flight, so pages and caches stay warm, where a
    circular buffer would walk through all of its memory. Not thread-safe: one thread owns it.

    Args:
        size: bytes, a multiple of `align`.
        align: offsets and sizes are rounded up to this; 64 is a cache line.
    """

    def __init__(self, size: int, align: int = 64) -> None:
        assert size > 0
        assert size % align == 0
        self.size = size
        self._align = align
        self._gaps = [(0, size)]  # (start, end), ascending, never empty, never touching
        self._used: dict[int, int] = {}  # start -> end

    def allocate(self, nbytes: int) -> int | None:
        """Offset of a free run of `nbytes`, or None when there is none now."""
        assert nbytes > 0
        need = -(-nbytes // self._align) * self._align
        for i, (start, end) in enumerate(self._gaps):
            if end - start >= need:
                self._gaps[i : i + 1] = [(start + need, end)] if end - start > need else []
                self._used[start] = start + need
                return start
        return None

    def free(self, offset: int) -> None:
        """Give back the run that `allocate` returned as `offset`."""
        start, end = offset, self._used.pop(offset)
        i = j = bisect_left(self._gaps, (start, end))
        if i > 0 and self._gaps[i - 1][1] == start:
            i -= 1
            start = self._gaps[i][0]
        if j < len(self._gaps) and self._gaps[j][0] == end:
            end = self._gaps[j][1]
            j += 1
        self._gaps[i:j] = [(start, end)]

    def check(self) -> None:
        """Gaps and runs tile the memory exactly once, and no two gaps touch."""
        tiles = sorted([*self._gaps, *self._used.items()])
        assert [start for start, _ in tiles] == [0, *(end for _, end in tiles[:-1])]
        assert tiles[-1][1] == self.size
        assert all(start < end for start, end in tiles)
        assert all(a[1] < b[0] for a, b in zip(self._gaps, self._gaps[1:], strict=False)), "gaps touch"

"""Which sizes a decode step may have, so that each can be captured once. Pure."""

from __future__ import annotations

from dataclasses import dataclass

_POWERS = (1, 2, 4, 8, 16)
_PAUSE, _LONG_PAUSE = 8, 32
_SMALL = 64
"""Up to here sizes are 8 apart, then 32: padding rows cost little where many rows are real."""


@dataclass(frozen=True, slots=True)
class DecodeBuckets:
    """Sizes to which decode steps are padded."""

    sizes: tuple[int, ...]
    """Sequences, ascending."""
    width: int
    """Columns of every padded block table, at least 1."""

    @classmethod
    def up_to(cls, num_sequences: int, width: int) -> DecodeBuckets:
        """1, 2, 4, 8, 16, 24 ... 64, 96, 128 ... and at last `num_sequences` itself."""
        sizes = {*_POWERS, *range(_POWERS[-1], _SMALL, _PAUSE), *range(_SMALL, num_sequences, _LONG_PAUSE)}
        return cls((*sorted(s for s in sizes if s < num_sequences), num_sequences), width)

    def fit(self, num_sequences: int, num_blocks: int) -> int | None:
        """The smallest size for so many sequences, the longest of which has so many blocks; None if none is enough."""
        if num_blocks > self.width:
            return None
        return next((size for size in self.sizes if size >= num_sequences), None)

"""Percentiles of durations in little space that can be added up: counts in buckets whose bounds grow by 2 %.

Sums of counts are exact, so parts that were measured by several processes give what one would have measured, to the last
bit; a percentile is within 1 % of the true one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Self

ERROR = 0.01
"""Most that a percentile is off, as a share of it."""
LEAST_S = 1e-6
"""Shorter durations count as this long."""
_GROWTH = (1 + ERROR) / (1 - ERROR)
_LOG = math.log(_GROWTH)


@dataclass(slots=True)
class Sketch:
    """Durations in seconds."""

    counts: Counter[int] = field(default_factory=Counter)
    """Bucket -> how many; bucket i holds (growth^(i-1), growth^i]."""
    total_ns: int = 0
    """Sum, in whole nanoseconds, so that no order of adding changes it."""
    max_s: float = 0.0

    def __len__(self) -> int:
        return self.counts.total()

    def add(self, value_s: float) -> None:
        value_s = max(value_s, LEAST_S)
        self.counts[math.ceil(math.log(value_s) / _LOG)] += 1
        self.total_ns += round(value_s * 1e9)
        self.max_s = max(self.max_s, value_s)

    def extend(self, values_s: Iterable[float]) -> None:
        for value_s in values_s:
            self.add(value_s)

    def merge(self, other: Sketch) -> None:
        """Take in what another one has seen."""
        self.counts.update(other.counts)
        self.total_ns += other.total_ns
        self.max_s = max(self.max_s, other.max_s)

    @property
    def mean_s(self) -> float | None:
        return self.total_ns / 1e9 / len(self) if self.counts else None

    def percentile(self, share: float) -> float | None:
        """The value that `share` of all do not exceed (nearest rank), within `ERROR`; None of nothing.

        Args:
            share: above 0, at most 1. Of 1, 2, 3 and 4, share 0.5 gives 2 and 0.51 gives 3.
        """
        rank, seen = max(1, math.ceil(share * len(self) - 1e-9)), 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            if seen >= rank:
                return min(2 * _GROWTH**bucket / (_GROWTH + 1), self.max_s)
        return None

    def to_json(self) -> dict[str, Any]:
        return {
            "counts": {str(k): v for k, v in sorted(self.counts.items())},
            "total_ns": self.total_ns,
            "max_s": self.max_s,
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Self:
        return cls(Counter({int(k): v for k, v in raw["counts"].items()}), raw["total_ns"], raw["max_s"])
